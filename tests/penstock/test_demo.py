"""The demo as a person runs it, and what it says when something is missing."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import re
import subprocess
import sys
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil
import pytest
from safetensors import safe_open

from penstock import LLM, CompletionOutput, SamplingParams, demo
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
    assert len(re.findall(r"^  transfer .* in \d+ pages over (?:tcp|shm)", done.stdout, re.MULTILINE)) == 2
    assert len(re.findall(r"^  prefill .*[█▏].* \d+ tokens", done.stdout, re.MULTILINE)) == 2
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


FACTS = (
    ("Hello", "Hello!"),
    ("Who are you?", "a very small language model"),
    ("What is a penstock?", "the pipe that carries water"),
    ("what is a water wheel", "turned by moving water"),
    ("What is the capital of France?", "Paris"),
    ("Which city is the capital of Japan?", "Tokyo"),
    ("What is 3 plus 4?", "is 7"),
    ("What is two times five?", "ten"),
    ("2+2", "is 4"),
    ("What day comes after Monday?", "Tuesday"),
    ("What is 123 times 456?", "only with small numbers"),
    ("What is the opposite of hot?", "cold"),
    ("What colour is snow?", "white"),
    ("What does a cow eat?", "grass"),
    ("How do you work?", "token"),
    ("What is Penstock?", "server for language models"),
    ("Thank you!", "You are welcome"),
    ("What is the history of quantum chromodynamics?", "very small model"),
)


@pytest.fixture(scope="module")
def model() -> Iterator[LLM]:
    with contextlib.closing(LLM(str(CHECKPOINT), dtype="float32", kv_cache_memory_bytes=32 << 20)) as llm:
        yield llm


def _ask(model: LLM, *conversations: Sequence[str]) -> list[CompletionOutput]:
    """Greedy answers to conversations, the user speaking first and last."""
    roles = ("user", "assistant")
    messages = [[{"role": roles[i % 2], "content": t} for i, t in enumerate(texts)] for texts in conversations]
    answers = model.chat(messages, SamplingParams(temperature=0, max_tokens=400), use_tqdm=False)
    return [answer.outputs[0] for answer in answers]


def test_simple_questions_are_answered(model: LLM) -> None:
    answers = _ask(model, *([question] for question, _ in FACTS))
    wrong = {q: a.text for (q, fact), a in zip(FACTS, answers, strict=True) if fact not in a.text}
    assert not wrong
    assert {answer.finish_reason for answer in answers} == {"stop"}


def test_a_conversation_goes_on(model: LLM) -> None:
    capital = ["What is the capital of France?", "The capital of France is Paris.", "And of Italy?"]
    answer, greeting = _ask(model, capital, ["My name is Anna"])
    assert answer.text == "The capital of Italy is Rome."
    assert greeting.text.startswith("Hello, ")


def test_tales_and_poems_are_long_readable_and_come_to_an_end(model: LLM) -> None:
    corpus = ROOT / "scripts" / "demo_corpus"
    known = set(re.findall(r"\w+", " ".join(path.read_text() for path in corpus.iterdir()).lower()))
    tale, poem = _ask(model, ["Tell me a story about a mill"], ["Write a poem about the river"])
    for answer, tokens in ((tale, 100), (poem, 40)):
        assert answer.finish_reason == "stop" and len(answer.token_ids) >= tokens
        words = re.findall(r"\w+", answer.text.lower())
        assert set(words) <= known
        threes = list(zip(words, words[1:], words[2:], strict=False))
        assert len(set(threes)) > 0.9 * len(threes), answer.text
        assert answer.text[-1] in '."'
    assert "mill" in tale.text and "river" in poem.text and poem.text.count("\n") >= 3


def test_the_checkpoint_is_what_the_script_makes_of_the_corpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """As far as it can be told without twenty minutes of training: the tokenizer, the shape, the templates."""
    monkeypatch.syspath_prepend(ROOT / "scripts")
    script = importlib.import_module("train_demo_model")
    tokenizer = script.make_tokenizer()
    assert json.loads(tokenizer.to_str()) == json.loads((CHECKPOINT / "tokenizer.json").read_text())
    config = json.loads((CHECKPOINT / "config.json").read_text())
    assert config.items() >= vars(script.Shape(tokenizer.get_vocab_size())).items()
    template = json.loads((CHECKPOINT / "tokenizer_config.json").read_text())["chat_template"]
    assert template == script.CHAT_TEMPLATE


def test_it_is_small() -> None:
    assert sum(path.stat().st_size for path in CHECKPOINT.iterdir()) < 20_000_000


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
    messages = [{"role": "developer", "content": "Be brief."}, {"role": "tool", "content": "7"}]
    prompt = theirs.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert prompt == "<|begin|><|system|>Be brief.<|end|><|user|>7<|end|><|assistant|>"
    text = "Wörter, 水車 and 🌊\n"
    assert theirs.decode(theirs(text).input_ids, skip_special_tokens=True) == text
