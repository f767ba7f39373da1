"""If this breaks: `export --push` publishes a model that should be private or was not checked, or says that it uploaded what it did not.

The real client of huggingface_hub talks to a stand-in of the hub on this machine. The real hub is not measured.
"""

import json
import os
import shutil
import subprocess
import sys

import pytest

from lit_llm.errors import InputError
from lit_llm.exports import hub_upload
from lit_llm.exports.command import export
from tests.exports.hub_server import Hub

TOKEN = "hf_" + "a1" * 12


def pushed(hub, run, folder, *words):
    """`export --push` in a process of its own, because huggingface_hub reads its settings when it is imported."""
    surroundings = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    surroundings |= {"HF_ENDPOINT": hub.address, "HF_TOKEN": TOKEN, "HF_HOME": str(folder / "home"), "HF_HUB_DISABLE_XET": "1"}
    return subprocess.run([sys.executable, "-m", "lit_llm", "export", run, "--out", folder / "out", "--push", "me/handed", *words],
                          env=surroundings, capture_output=True, text=True, check=False, timeout=300)


def test_a_checked_export_is_uploaded_after_a_busy_answer(run, tmp_path):
    """Private, byte for byte, by the environment's token, which is neither printed nor uploaded."""
    with Hub(busy=1) as hub:
        done = pushed(hub, run, tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"uploaded to {hub.address}/me/handed" in done.stdout
    repository = hub.repositories["me/handed"]
    assert repository["private"]
    assert repository["files"] == {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    assert hub.tokens == {f"Bearer {TOKEN}"}
    assert not any(TOKEN.encode() in content for content in repository["files"].values())
    assert TOKEN not in done.stdout + done.stderr
    assert 'from_pretrained("me/handed")' in repository["files"]["README.md"].decode()


def test_a_public_repository_needs_the_flag(run, tmp_path):
    with Hub(public=["me/handed"]) as hub:
        done = pushed(hub, run, tmp_path)
        assert done.returncode == 2
        assert "is public" in done.stderr
        assert "--public" in done.stderr
        assert "Traceback" not in done.stderr
        assert hub.repositories["me/handed"]["files"] == {}
        assert pushed(hub, run, tmp_path, "--public").returncode == 0
    assert "model.safetensors" in hub.repositories["me/handed"]["files"]


def test_a_folder_that_was_changed_after_its_check_is_not_uploaded(run, tmp_path):
    folder = export(str(run), out=str(tmp_path / "out"))
    hub_upload.check_files(folder)
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[:-1] + bytes([weights[-1] ^ 1]))
    with pytest.raises(InputError, match="not the file that was checked"):
        hub_upload.upload(folder, "me/handed", public=False)
    (folder / "model.safetensors").write_bytes(weights)
    shutil.copy(folder / "model.safetensors", folder / "more.safetensors")
    with pytest.raises(InputError, match=r"more\.safetensors is not the file"):
        hub_upload.check_files(folder)
    (folder / "more.safetensors").unlink()
    facts = json.loads((folder / "check.json").read_text())
    for broken in ({}, facts | {"measured": facts["measured"] | {"difference": 9.0}}):
        (folder / "check.json").write_text(json.dumps(broken))
        with pytest.raises(InputError, match="does not show that this export was checked"):
            hub_upload.check_files(folder)


def test_what_cannot_work_is_refused_before_anything_is_computed(tmp_path, monkeypatch):
    with pytest.raises(InputError, match="owner/name"):
        export(str(tmp_path), push="a name")
    with pytest.raises(InputError, match="only a pushed model"):
        export(str(tmp_path), public=True)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(InputError, match="hf auth login"):
        export(str(tmp_path), push="me/handed")
    monkeypatch.setattr("huggingface_hub.get_token", lambda: TOKEN)
    with pytest.raises(InputError, match="not reachable"):
        export(str(tmp_path), push="me/handed")


def test_an_adapter_of_a_local_base_is_not_uploaded(run, tmp_path, monkeypatch):
    """Its adapter_config.json would name a folder of this machine."""
    monkeypatch.setattr(hub_upload, "check", lambda repository: None)
    with pytest.raises(InputError, match="local folder"):
        export(str(run), out=str(tmp_path / "out"), adapter=True, push="me/handed")
