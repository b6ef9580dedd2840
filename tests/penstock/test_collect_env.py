"""`penstock collect-env`: every section is there, and no secret is."""

from __future__ import annotations

import json
import platform

import pytest

from penstock import __version__
from penstock.cli import main
from penstock.collect_env import as_text, variables


def test_everything_is_there_and_secrets_are_not(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PENSTOCK_API_KEY", "sk-secret")
    monkeypatch.setenv("PENSTOCK_BLOCK_SIZE", "16")
    assert main(["collect-env", "--json"]) == 0
    text = capsys.readouterr().out
    found = json.loads(text)
    assert list(found) == ["Penstock", "System", "CPU", "GPU", "Redis", "Packages", "Environment"]
    assert found["Penstock"]["version"] == __version__ and platform.python_version() in found["System"]["Python"]
    assert found["Packages"]["torch"] and found["Redis"]["server"].startswith("redis-server ")
    assert found["Environment"]["PENSTOCK_BLOCK_SIZE"] == "16" and "sk-secret" not in text
    shown = as_text(found)
    assert all(f"\n{section}\n" in f"\n{shown}" for section in found) and "PENSTOCK_API_KEY" in shown


def test_what_counts_as_secret() -> None:
    environ = {
        "PENSTOCK_REDIS_URL": "rediss://user:hidden@host:6379/0",
        "PENSTOCK_CLUSTER_KEY": "hidden",
        "HF_TOKEN": "hidden",
        "VLLM_API_KEY": "https://hidden",
        "OPENAI_BASE_URL": "http://me:hidden@host/v1",
        "CUDA_VISIBLE_DEVICES": "0,1",
        "HOME": "/somewhere",
    }
    found = variables(environ)
    assert "hidden" not in " ".join(found.values())
    assert found["CUDA_VISIBLE_DEVICES"] == "0,1" and "host:6379" in found["PENSTOCK_REDIS_URL"]
    assert found.keys() == environ.keys() - {"HOME"}
