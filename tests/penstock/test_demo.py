"""The demo as a person runs it, and what it says when something is missing."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import uuid
from pathlib import Path

import psutil
import pytest
from safetensors import safe_open

from penstock import demo
from penstock.demo_model import CHECKPOINT, make_demo_model

ROOT = Path(__file__).resolve().parent.parent.parent


def _processes_with(mark: str) -> list[str]:
    """Command lines of the processes that have `mark` in their environment."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("PARENT_TEST") == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(" ".join(process.cmdline()))
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


@pytest.mark.system
def test_the_demo_answers_shows_its_fleet_and_leaves_nothing(tmp_path: Path) -> None:
    mark = uuid.uuid4().hex
    home, temporary = tmp_path / "home", tmp_path / "tmp"
    home.mkdir()
    temporary.mkdir()
    places = {"HOME": str(home), "TMPDIR": str(temporary), "PARENT_TEST": mark}
    done = subprocess.run(
        [sys.executable, "-m", "penstock.demo"],
        cwd=ROOT,
        env={"PATH": os.environ["PATH"], **places},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert _processes_with(mark) == []
    assert list(temporary.iterdir()) == []

    pids = dict(re.findall(r"^  (\S+) +pid (\d+)", done.stdout, re.MULTILINE))
    assert {name.partition("-")[0] for name in pids} == {"redis", "router", "prefill", "decode"}
    assert len(set(pids.values())) == 4
    assert "a way of standing in the path of that work" in done.stdout
    assert re.search(r"^assistant  The smaller the pipe, the faster the water must go", done.stdout, re.MULTILINE)
    assert len(re.findall(r"^  transfer .* in \d+ pages over (?:nixl|shm)", done.stdout, re.MULTILINE)) == 2
    assert len(re.findall(r"^  prefill .*█.* \d+ tokens", done.stdout, re.MULTILINE)) == 2
    assert re.search(r"^[\d.]+ [KM]iB of KV pages went", done.stdout, re.MULTILINE)


def test_pages_that_did_not_move_are_a_failure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "_completion", lambda client: 4096)
    monkeypatch.setattr(demo, "_chat", lambda client: 0)
    assert demo._converse("http://127.0.0.1:1") == 1
    assert "No KV bytes moved" in capsys.readouterr().err


def test_a_missing_client_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(demo, "find_spec", lambda name: None)
    assert demo.main() == 2
    assert "`openai`" in capsys.readouterr().err


def test_the_checkpoint_is_an_ordinary_one(tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoTokenizer

    copy = make_demo_model(tmp_path / "model")
    assert sorted(p.name for p in copy.iterdir()) == sorted(p.name for p in CHECKPOINT.iterdir())
    config = AutoConfig.from_pretrained(copy)
    assert (config.model_type, config.max_position_embeddings, config.tie_word_embeddings) == ("llama", 2048, True)
    assert config.num_key_value_heads < config.num_attention_heads
    theirs = AutoTokenizer.from_pretrained(copy)
    assert len(theirs) == config.vocab_size
    with safe_open(copy / "model.safetensors", framework="pt") as weights:
        assert weights.get_slice("model.embed_tokens.weight").get_shape() == [config.vocab_size, config.hidden_size]

    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is a penstock?"}]
    prompt = theirs.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert prompt == "<|begin|><|system|>Be brief.<|end|><|user|>What is a penstock?<|end|><|assistant|>"
    text = "Wörter, 水車 and 🌊\n"
    assert theirs.decode(theirs(text).input_ids, skip_special_tokens=True) == text
