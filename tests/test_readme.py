"""If this breaks: a command of the README does not run, or does not give the stated results."""

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
CHINESE = (ROOT / "README.zh-CN.md").read_text(encoding="utf-8")
CONFIGS = (ROOT / "configs" / "README.md").read_text(encoding="utf-8")
SAMPLES = ROOT / "lit_llm" / "samples"
pytestmark = pytest.mark.timeout(900)


def blocks(language: str, text: str = README) -> list[str]:
    """Code blocks of a language, line continuations joined."""
    return [block.replace("\\\n", "") for block in re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)]


class Shell:
    """Types commands in a folder that looks like a fresh clone to them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "configs").symlink_to(ROOT / "configs")
        self.env = os.environ | {
            "PYTHONPATH": str(ROOT),
            "LIT_LLM_CACHE": str(folder / "cache"),
            "NO_COLOR": "1",
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        }

    def run(self, command: str, *, stdin: str = "", timeout: float = 600) -> subprocess.CompletedProcess:
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", command],
            cwd=self.folder,
            env=self.env,
            input=stdin,
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        assert "warning from" not in done.stderr, "an unexpected warning of a library"
        return done

    def start(self, command: str) -> subprocess.Popen:
        return subprocess.Popen(
            ["bash", "-c", f"exec {command}"],
            cwd=self.folder,
            env=self.env,
            start_new_session=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )


@pytest.fixture(scope="module")
def shell(tmp_path_factory) -> Shell:
    return Shell(tmp_path_factory.mktemp("clone"))


@pytest.fixture(scope="module")
def first(shell) -> subprocess.CompletedProcess:
    """The README's first command, without the installed package of this process."""
    install, _, train = blocks("bash")[0].strip().partition(" && ")
    assert install == "pip install -c constraints.txt -e ."
    began = time.monotonic()
    done = shell.run(train)
    done.seconds = time.monotonic() - began
    assert done.returncode == 0, done.stderr[-2000:]
    return done


@pytest.mark.slow
def test_first_command_ends_with_what_came_out(first, shell):
    """Perplexity before and after, answers to three held-out and two training prompts, and the next commands."""
    before, after = map(float, re.search(r"perplexity on .*: ([\d.]+) before, ([\d.]+) after", first.stdout).groups())
    assert before / after >= 2.5
    assert len(re.findall(r"^  prompt ", first.stdout, re.MULTILINE)) == 5
    assert first.stdout.count("(trained)") == 2
    assert len(re.findall(r"^  base ", first.stdout, re.MULTILINE)) == 5
    for verb in ("lit_llm chat", "lit_llm validate", "-m serve"):
        assert verb in first.stdout.split("next:")[1]
    figures = json.loads((shell.folder / "runs/sft/metrics.json").read_text())
    assert figures["val/perplexity"] == pytest.approx(after, abs=1e-3)
    for file in (
        "config.yaml",
        "metrics.csv",
        "checkpoints/LATEST",
        "checkpoints/BEST",
        "export/config.json",
        "export/chat_template.jinja",
        "export/generation_config.json",
        "export/README.md",
        "tokenizer/tokenizer.json",
    ):
        assert (shell.folder / "runs/sft" / file).is_file(), file


@pytest.mark.slow
def test_the_tuned_model_answers_what_it_never_saw(first, shell):
    """At least 80 of 100 held-out questions are answered exactly, in both languages; by the base at most 5."""
    exam = [json.loads(line)["messages"] for line in (SAMPLES / "conversations_val.jsonl").read_text().splitlines()]
    exam = [messages for messages in exam if sum(message["role"] == "user" for message in messages) == 1][:100]
    assert len(exam) == 100
    chinese = [bool(re.search(r"[\u4e00-\u9fff]", messages[-2]["content"])) for messages in exam]
    tuned, base = (grade(folder, exam) for folder in (shell.folder / "runs/sft/export", SAMPLES / "base"))
    by_language = [
        [right for right, zh in zip(tuned, chinese, strict=True) if zh is language] for language in (True, False)
    ]
    assert sum(tuned) >= 80
    assert sum(base) <= 5
    for answers in by_language:
        assert len(answers) >= 30
        assert sum(answers) >= 0.8 * len(answers)


def grade(folder: Path, exam: list) -> list[bool]:
    """Exact answers by `model.generate` on the template's own tokens."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    right = []
    for messages in exam:
        ids = tokenizer.apply_chat_template(
            messages[:-1], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        with torch.no_grad():
            out = model.generate(**ids, max_new_tokens=48, do_sample=False)
        answer = tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
        right.append(answer.strip() == messages[-1]["content"].strip())
    return right


@pytest.mark.slow
def test_the_next_commands(first, shell):
    """chat answers, validate gives the run's own perplexity, serve serves."""
    chat, validate, serve = blocks("sh")[0].strip().splitlines()
    done = shell.run(chat, stdin="Good morning!\nexit\n")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    done = shell.run(validate)
    assert done.returncode == 0, done.stderr
    perplexity = float(re.search(r"val/perplexity\s+([\d.]+)", done.stdout)[1])
    best = json.loads(
        (
            shell.folder
            / "runs/sft/checkpoints"
            / (shell.folder / "runs/sft/checkpoints/BEST").read_text().strip()
            / "manifest.json"
        ).read_text()
    )
    import math

    assert math.log(perplexity) == pytest.approx(best["score"], rel=1e-5)
    printed = first.stdout.split("next:")[1]
    export, config = shell.folder / "runs/sft/export", shell.folder / "runs/sft/config.yaml"
    assert all(command in printed for command in (
        f"chat --model {export}", f"-m serve --model {export}", f"validate --config {config} --ckpt_path best"))
    process = shell.start(serve)
    try:
        answer = _ask_until_up(
            "http://127.0.0.1:8000/chat", {"message": "Good morning!", "max_length": 16, "temperature": 0}
        )
        assert isinstance(answer["response"], str)
        assert answer["response"]
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(20)


def _ask_until_up(url: str, body: dict, seconds: float = 90) -> dict:
    end = time.monotonic() + seconds
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    while True:
        try:
            with urllib.request.urlopen(request, timeout=30) as reply:
                return json.load(reply)
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(0.5)


@pytest.mark.slow
def test_own_data_and_own_model(shell, tiny_model):
    """The README's command for a user's own file, with a tiny model; then the run is resumed."""
    rows = [
        {"messages": [{"role": "user", "content": f"Say {n}."}, {"role": "assistant", "content": str(n)}]}
        for n in range(60)
    ]
    (shell.folder / "my_chats.jsonl").write_text("\n".join(map(json.dumps, rows)))
    command = (
        blocks("sh")[1].strip().replace("FOLDER_OR_HUB_ID", tiny_model("qwen3")).replace("seq_len 1024", "seq_len 128")
    )
    command += " --trainer.default_root_dir runs/own --trainer.max_steps"
    done = shell.run(f"{command} 2")
    assert done.returncode == 0, done.stderr[-2000:]
    done = shell.run(f"{command} 4 --ckpt_path last")
    assert done.returncode == 0, done.stderr[-2000:]
    steps = [line.split(",")[0] for line in (shell.folder / "runs/own/metrics.csv").read_text().splitlines()[1:]]
    assert len(steps) == len(set(steps))


@pytest.mark.slow
@pytest.mark.parametrize("overlays", [("cpu", "full", "wandb"), ("zero3",), ("offload",), ("fsdp2",)], ids="+".join)
def test_overlays_train(overlays, shell, tiny_model):
    """Each overlay of the table trains for real."""
    words = " ".join(f"--config configs/with/{name}.yaml" for name in overlays)
    assert all(f"configs/with/{name}.yaml" in CONFIGS for name in overlays)
    done = shell.run(
        f"python -m lit_llm fit --config configs/sft.yaml {words} --model.base {tiny_model('llama')} "
        f"--trainer.max_steps 2 --trainer.num_sanity_val_steps 1 --trainer.limit_val_batches 1 --data.seq_len 128 "
        f"--trainer.default_root_dir runs/{overlays[0]}"
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert (shell.folder / "runs" / overlays[0] / "export" / "model.safetensors").is_file()


def test_second_command_is_what_ci_runs():
    """The test command installs the test extra and runs pytest; CI reads it from here."""
    assert blocks("bash")[1].strip() == "pip install -c constraints.txt -e '.[test]' && python -m pytest"
    assert "block == 2" in (ROOT / ".ci" / "run").read_text()


@pytest.mark.slow
def test_the_code(shell):
    """The Python of the README trains, measures and exports."""
    (code,) = blocks("python")
    (shell.folder / "code.py").write_text(code)
    done = shell.run("python code.py")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "val/perplexity" in done.stdout
    assert (shell.folder / "runs" / "python" / "export" / "model.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.parametrize(("command", "printed"), [
    ("inspect --config configs/sft.yaml --html page.html", "supervised"), ("plan --config configs/sft.yaml", "parameters")])
def test_looking_before_training(command, printed, shell):
    assert f"`python -m lit_llm {command}`" in README + CONFIGS
    done = shell.run(f"python -m lit_llm {command}")
    assert done.returncode == 0, done.stderr[-2000:]
    assert printed in done.stdout


def test_every_config_named_exists():
    """No table row, in either language, names a missing file."""
    for text in (README, CHINESE, CONFIGS):
        for name in re.findall(r"configs/[\w/]+\.yaml", text):
            assert (ROOT / name).is_file(), name


def test_both_languages_say_the_same():
    """The same code, headings, tables and links; both fit on a few screens."""
    for language in ("bash", "sh", "python"):
        assert blocks(language) == blocks(language, CHINESE)
    headings = [re.findall(r"^(#+) ", text, re.MULTILINE) for text in (README, CHINESE)]
    assert headings[0] == headings[1]
    links = [set(re.findall(r"\]\(([^)]+)\)", text)) - {"README.md", "README.zh-CN.md"} for text in (README, CHINESE)]
    assert links[0] == links[1]
    figures = [re.findall(r"\d[\d.,]*(?: of \d[\d.,]*)? GiB|[✓◐✗]", text) for text in (README, CHINESE)]
    assert figures[0] == figures[1]
    assert max(len(text.splitlines()) for text in (README, CHINESE)) <= 200


def test_links_lead_somewhere():
    """Files, folders and pictures that a README of a folder names; the pictures are small."""
    for file in [*ROOT.glob("*.md"), *ROOT.glob("[a-z]*/README.md"), *ROOT.glob("[a-z]*/*/README.md")]:
        for link in re.findall(r"\]\(([^)#]+)\)", file.read_text(encoding="utf-8")):
            if "://" not in link and not link.startswith("<"):
                assert (file.parent / link).exists(), f"{file}: {link}"
                assert not link.endswith(".png") or (file.parent / link).stat().st_size <= 150_000, link
