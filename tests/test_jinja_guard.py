"""If this breaks: a downloaded chat template takes all memory of a machine, or keeps a run or a server busy for hours."""

import json
import os
import resource
import shutil
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import pytest

import lit_llm
from lit_llm.errors import GivenUpError, InputError
from lit_llm.text.templates import jinja, jinja_guard, jinja_process
from tests.hostile_templates import HOSTILE, UNREADABLE
from tests.test_cli import call, place

assert place                                        # a fixture
TALK = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Tom."}]
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
SLOW = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"


def render(source, talk=TALK, **args):
    return jinja.compiled(source, TOKENS)(talk, None, False, args)


@pytest.mark.parametrize("kind", HOSTILE)
def test_what_cannot_be_bounded_never_runs_in_this_process(kind, monkeypatch):
    """Each leaves it soon and with little memory, also while its variables are looked for."""
    monkeypatch.setattr(jinja_guard, "SECONDS", 0.05)
    monkeypatch.setattr(jinja_process, "render", lambda *_: "outside")
    jinja.variables("", {})                         # imports what it needs
    tracemalloc.start()
    began = time.process_time()
    try:
        jinja.variables(HOSTILE[kind], TOKENS)
        assert render(HOSTILE[kind]) == "outside"
        assert time.process_time() - began < 3
        assert tracemalloc.get_traced_memory()[1] < 300 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(("kind", "why"), [
    ("square", "takes longer than 1 seconds"), ("power", "takes longer than 1 seconds"),
    ("shared hash", "takes longer than 1 seconds"), ("tojson indent", "takes (more than 1 GiB|longer)"),
    ("percent dot", "takes (more than 1 GiB|longer)"), ("center", "takes more than 1 GiB of memory"),
    ("format method", "(writes|takes) ")])
def test_it_is_cut_in_the_other_process(kind, why, monkeypatch):
    monkeypatch.setattr(jinja, "SECONDS", 1)
    began = time.monotonic()
    with pytest.raises(InputError, match=why):
        render(HOSTILE[kind])
    assert time.monotonic() - began < 30            # two of them to start it again
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss < 3 << 20      # kilobytes


@pytest.mark.parametrize("kind", UNREADABLE)
def test_a_template_that_cannot_be_compiled(kind):
    with pytest.raises(InputError, match="chat template"):
        jinja.variables(UNREADABLE[kind], {})
    with pytest.raises(InputError, match="chat template"):
        render(UNREADABLE[kind])


def test_the_other_process_writes_the_same_text():
    sources = ["{{ messages[0].content|center(11) }}|{{ bos_token }}|{{ x }}", "{{ '%3d' % 7 }}\n{{ messages|tojson(indent=9) }}",
               "{{ 'ü\ud800' }}{{ '{:>4}'.format(x) }}", "{% for m in messages recursive %}{{ m.role }}{% endfor %}"]
    assert [render(source, x=3) for source in sources] == [
        "    Who?   |<s>|3", "  7\n" + json.dumps(TALK, indent=9), "ü\ud800   3", "userassistant"]
    with pytest.raises(jinja_process.TemplateFaultError, match="no such talk"):
        render("{{ 'a'.zfill(3) }}{{ raise_exception('no such talk') }}")
    talk = [TALK[0] | {"content": "x" * 2_000_000}]
    assert render("{{ messages[0].content }}", talk) == "x" * 2_000_000


def test_a_process_that_was_killed_is_started_again():
    source = "{{ messages[0].content.zfill(6) }}"
    assert render(source) == "00Who?"
    os.kill(jinja_process._home.process._child.pid, 9)
    jinja_process._home.process._child.wait()
    assert render(source) == "00Who?"


def test_the_other_process_runs_the_code_of_this_one(tmp_path):
    """Also where that code is not installed, as in a checkout, or another version of it is."""
    copy = shutil.copytree(Path(lit_llm.__file__).parent, tmp_path / "lit_llm", ignore=shutil.ignore_patterns("__pycache__"))
    with (copy / "text" / "templates" / "jinja_process.py").open("a", encoding="utf-8") as file:
        file.write("\ndef _answer(answers, kind, text, real=_answer):\n    real(answers, kind, text and text + '!')\n")
    code = (f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from lit_llm.text.templates.jinja_process import render; "
            "print(render('{{ x }}', {}, {'x': 1}, 9.0, 99))")
    ended = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert ended.stdout == "1!\n", ended.stderr[-2000:]


def test_published_templates_never_leave_this_process(shared_data, monkeypatch):
    """They are rendered as fast as ever."""
    monkeypatch.setattr(jinja_process, "render", lambda *_: pytest.fail("it left"))
    files = sorted((shared_data / "templates").rglob("*.jinja"))
    assert files
    for file in files:
        try:
            assert render(file.read_text(encoding="utf-8"), TALK * 40)
        except TypeError:
            assert "tool_use" in file.name          # which wants tools


def test_a_template_that_is_slow_again_and_again_is_given_up(monkeypatch):
    monkeypatch.setattr(jinja, "SECONDS", 0.2)
    monkeypatch.setattr(jinja, "LOST", 0.5)
    monkeypatch.setattr(jinja_process, "render", slow)
    hostile = jinja.compiled(SLOW, TOKENS)
    for _ in range(9):
        with pytest.raises(InputError):
            hostile(TALK, None, False, {})
    began = time.monotonic()
    with pytest.raises(GivenUpError, match="too slow too often"):
        hostile(TALK, None, False, {})
    assert time.monotonic() - began < 0.1


def slow(*_):
    time.sleep(0.2)
    raise InputError("it takes longer than 0.2 seconds")


def test_a_preparation_ends_when_its_template_is_given_up(place, monkeypatch):
    """Also where bad records are set aside: which ones are slow depends on the machine."""
    monkeypatch.setattr(jinja, "LOST", 1.0)
    monkeypatch.setattr(jinja, "SECONDS", 0.5)
    Path("slow.jinja").write_text("{% if messages|length > 1 %}" + SLOW + "{% endif %}{{ messages[0].content }}")
    Path("many.jsonl").write_text("".join(json.dumps({"messages": [*TALK, TALK[0] | {"content": str(number)}, TALK[1]]})
                                          + "\n" for number in range(500)))
    began = time.monotonic()
    code, _, err = call("prepare", "--config", "ok.yaml", "--data.chat_template", "slow.jinja", "--data.sources",
                        "[{path: many.jsonl}]", "--data.on_bad_record", "quarantine", "--data.num_proc", "1")
    assert code == 2
    assert "too slow too often" in err
    assert "Traceback" not in err
    assert time.monotonic() - began < 60
