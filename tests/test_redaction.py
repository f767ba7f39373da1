"""If this breaks: a password or key is written into a run's files, a message or a logger's folder.

The secrets are made up; each has the form that its issuer uses.
"""

import json
from pathlib import Path

import pytest
import wandb
import yaml

from lit_llm.system.redaction import looks_random, names_secret, redact, redact_text
from tests.test_cli import call, place, refused

assert place                                        # a fixture
PART = "a8Kd72LmQz41XwPv93Rt"
SECRETS = {
    "openai": "sk-proj-" + PART * 2, "anthropic": "sk-ant-api03-" + PART, "github": "github_pat_11AB" + PART,
    "github_old": "ghp_" + PART, "gitlab": "glpat-" + PART, "slack": "xoxb-1234567890-" + PART, "google": "AIza" + PART,
    "jwt": f"eyJhbGciOi.eyJzdWIiOi{PART}.{PART}", "aws_id": "AKIA" + "QWERTYUIOPAS4321", "hub": "hf_" + PART,
    "stripe": "sk_live_" + PART, "npm": "npm_" + PART, "pypi": "pypi-" + PART * 2, "wandb": "wandb_v1_" + PART,
    "sendgrid": f"SG.{PART}.{PART}", "telegram": "1234567890:" + (PART * 2)[:35], "google_oauth": "GOCSPX-" + PART,
    "aws_secret": "wJalrXUtnFEMI/K7MDENG/bPxRfiCY9zSAMPLEKEY", "hex": "0123456789abcdef0123456789abcdef01234567",
    "azure": "AccountKey=" + PART * 2 + "==",
}
BY_NAME = {"auth": "open-sesame-1", "passwd": "hunter2hunter2", "hf_token_2": "plain-words-here", "apiKey": "some value",
           "db_password": "correct horse", "client_secret": "battery staple", "webhook": "staple-battery"}


@pytest.mark.parametrize("name", SECRETS)
def test_each_form_is_found_in_a_config(name):
    secret = SECRETS[name]
    redacted = json.dumps(redact({"notes": secret, "tags": ["x", secret], "more": {"deep": {"value": secret}}}))
    assert secret not in redacted
    assert '"x"' in redacted


@pytest.mark.parametrize("name", sorted(set(SECRETS) - {"aws_secret", "hex"}))
def test_each_form_is_found_in_a_text(name):
    redacted = redact_text(f"error: cannot log in with {SECRETS[name]}, try again")
    assert SECRETS[name] not in redacted
    assert redacted.startswith("error: cannot log in with ")
    assert redacted.endswith("try again")


def test_what_no_form_tells_the_key_tells():
    assert all(names_secret(name) for name in BY_NAME)
    redacted = redact({"logger": BY_NAME | {"headers": {"Authorization": ["Basic Zm9v"]}, "credentials": {"user": "me"}}})
    assert not [value for value in BY_NAME.values() if value in json.dumps(redacted)]
    assert redacted["logger"]["credentials"] == {"user": "(removed)"}


@pytest.mark.parametrize("text", [
    "https://user:password1@host/x", "postgres://user:pa%20ss@db:5432/x", "https://abcdef123456@github.com/a/b.git"])
def test_a_url_keeps_its_host_only(text):
    redacted = redact_text(f"cannot reach {text}")
    assert "user" not in redacted
    assert "pass" not in redacted
    assert "abcdef123456" not in redacted
    assert "@" in redacted


@pytest.mark.parametrize("value", [
    "meta-llama/Llama-3.2-1B-Instruct", "Qwen/Qwen2.5-0.5B-Instruct-GPTQ-Int4", "runs/2026-11-30/sft_lora_r64_alpha128",
    "/data/My_Corpus_2024/Train_Shard_00001_of_00128", "lightning.pytorch.loggers.WandbLogger", "sample:base",
    "deepspeed_stage_2_offload", "unsloth/DeepSeek-R1-Distill-Qwen-1.5B-bnb-4bit", "DeepSeekR1DistillQwen15BInstruct2025"])
def test_ordinary_values_stay(value):
    assert redact({"base": value}) == {"base": value}


def test_ordinary_keys_stay():
    config = {"tokenizer": "gpt2", "train_tokens": ["<|im_end|>"], "pad_token_id": 3, "eos_token": "</s>", "seq_len": 8,
              "revision": "0123456789abcdef0123456789abcdef01234567", "author": "me", "betas": [0.9, 0.95], "x": None,
              "sort_key": "length"}
    assert redact(config) == config


def test_a_random_string_is_distinguished_from_words():
    assert looks_random("q7Rz1KxW9bTn4VdYp2LsJm8HfGc6Aa3E")
    assert not looks_random("ThisIsAVeryLongNameOfAModel2024Version")


def test_no_planted_secret_is_written_printed_or_logged(place, monkeypatch):
    """In YAML, typed options, URLs and the environment: in no file of the run, of wandb, and in no output."""
    wandb.finish()                                      # otherwise the run of an earlier test would be continued
    planted = SECRETS | BY_NAME | {"environment": "Xy-" + PART + "-env", "url": "s3cretInUrl99", "typed": "sk-" + PART[::-1]}
    monkeypatch.setenv("MY_SERVICE_TOKEN", planted["environment"])
    notes = f"see https://me:{planted['url']}@host.example/x and {planted['environment']}"
    logger = {"class_path": "lightning.pytorch.loggers.WandbLogger", "init_args": {
        "offline": True, "project": "x", "save_dir": str(place / "logs"), "notes": notes, "config": {**SECRETS, **BY_NAME}}}
    Path("wandb.yaml").write_text(yaml.safe_dump({"trainer": {"logger": logger}}))
    tags = ["--trainer.logger.init_args.tags", json.dumps([planted["typed"]])]
    words = ["fit", "--config", "ok.yaml", "--config", "wandb.yaml", *tags]
    monkeypatch.setattr("sys.argv", ["lit_llm", *words])
    code, out, err = call(*words)
    assert code == 0, err
    wandb.finish()                                      # all of it is on the disk
    sources = {file.resolve() for file in Path(".").glob("*.yaml")}
    written = [file for file in Path(".").rglob("*") if file.is_file() and file.resolve() not in sources]
    assert {".wandb", "debug.log"} <= {part for file in written for part in (file.suffix, file.name)}
    for name, secret in planted.items():
        leaks = [str(file) for file in written if secret.encode() in file.read_bytes()]
        assert not leaks, f"{name} is in {leaks}"
        assert secret not in out + err, name


def test_a_message_repeats_no_password(place):
    message = refused("fit", "--config", "ok.yaml", "--model.base", "https://me:hunter2hunter2@host.example/x")
    assert "hunter2" not in message
    assert "host.example" in message
