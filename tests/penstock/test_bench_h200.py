"""benchmarks/h200.py without a GPU: floors, keys, merged result files, and the whole of it on a tiny shape."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks import h200, record
from benchmarks.h200_worker import RESULT, Job, work_on
from benchmarks.shapes import NEW_TOKENS, SHAPES, Card, floor, parse_work
from penstock.models.spec import parse_spec

ROOT = Path(__file__).parents[2]
LENGTHS = json.loads(h200.LENGTHS.read_text())
PEER = json.loads((h200.PEERS / "vllm-0.22.1-h200.json").read_text())
CARD = {"gpu": "NVIDIA H200", "driver": "580"}


@pytest.mark.parametrize(
    ("model", "key", "expected"),
    [
        ("llama8b", "decode_b1_c1024_ms", 3.52),
        ("llama8b", "decode_b64_c1024_ms", 5.61),
        ("llama8b", "decode_b256_c1024_ms", 13.4),
        ("llama8b", "decode_b32_c8192_ms", 11.5),
        ("qwen1b5", "decode_b1_c1024_ms", 0.72),
        ("qwen1b5", "decode_b256_c1024_ms", 2.86),
        ("llama8b", "ttft_31744_ms", 898.0),
        ("llama8b", "ttft_8192_ms", 0.79 * 211),
    ],
)
def test_floors_are_those_that_were_worked_out_by_hand(model: str, key: str, expected: float) -> None:
    work = parse_work(key)
    assert work is not None
    assert floor(SHAPES[model], work, LENGTHS) == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("model", ["llama8b", "qwen1b5"])
def test_no_figure_of_the_peer_is_under_its_floor(model: str) -> None:
    assert PEER[model].keys() | {"startup_warm_s"} == set(h200.TABLE)
    for key, value in PEER[model].items():
        work = parse_work(key)
        assert work is not None
        least = floor(SHAPES[model], work, LENGTHS)
        measured = value["s"] if isinstance(value, dict) else value
        assert least is None or 0 < least < measured, key


def test_a_faster_card_has_lower_floors() -> None:
    work = parse_work("in1024_out128_x512")
    assert work is not None and (work.input_len, work.output_len, work.requests) == (1024, 128, 512)
    slow, fast = (floor(SHAPES["llama8b"], work, (), Card(4e12 * n, 8e14 * n)) for n in (1, 2))
    assert slow is not None and fast is not None and slow == pytest.approx(2 * fast)


def test_the_workload_is_the_one_that_the_peer_ran() -> None:
    theirs = PEER["llama8b"]["sharegptlike"]
    assert len(LENGTHS) == theirs["n"]
    assert sum(pair[0] for pair in LENGTHS) == theirs["in_tok"]
    assert sum(pair[1] for pair in LENGTHS) == theirs["out_tok"]


@pytest.mark.parametrize("model", SHAPES)
def test_the_configuration_has_the_sizes_of_the_shape(model: str) -> None:
    shape, spec = SHAPES[model], parse_spec(SHAPES[model].config())
    assert (spec.hidden_size, spec.intermediate_size, spec.num_layers) == (shape.hidden, shape.mlp, shape.layers)
    assert (spec.num_heads, spec.num_kv_heads, spec.head_dim) == (shape.heads, shape.kv_heads, shape.head_dim)
    assert (spec.vocab_size, spec.tie_word_embeddings, spec.dtype) == (shape.vocab, shape.tied, "bfloat16")
    assert spec.qkv_bias == (model != "llama8b")


def test_weights_are_as_many_as_the_models_have() -> None:
    """Published sizes, less the input embedding (Llama) or with the tied one once, norms and biases left out."""
    llama, qwen = SHAPES["llama8b"], SHAPES["qwen1b5"]
    assert llama.layer_weights + 2 * llama.head_weights == pytest.approx(8.03e9, rel=0.001)
    assert qwen.layer_weights + qwen.head_weights == pytest.approx(1.54e9, rel=0.005)
    assert llama.kv_bytes == 128 << 10


def test_keys_are_chosen_by_pattern_and_others_by_name() -> None:
    assert h200.keys_of("llama8b", ["*"]) == list(h200.TABLE)
    chosen = h200.keys_of("llama8b", ["decode_b1_*", "decode_b16_c2048_ms", "nonsense", "ttft_128_ms"])
    assert chosen == ["ttft_128_ms", "decode_b1_c128_ms", "decode_b1_c1024_ms", "decode_b16_c2048_ms"]
    work = parse_work("decode_b16_c2048_ms")
    assert work is not None
    assert (work.kind, work.requests, work.input_len, work.output_len) == ("decode", 16, 2048, NEW_TOKENS)
    assert parse_work("decode_b16") is None


def test_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    options = h200.parse(
        ["--engine-option", "max_num_batched_tokens=8192", "dtype=float16", "enable-prefix-caching=True"]
    )
    assert options.engine == {"max_num_batched_tokens": 8192, "dtype": "float16", "enable_prefix_caching": True}
    assert options.models == ["llama8b", "qwen1b5"] and options.cold and options.device == "cuda"
    for wrong in (["--engine-option", "seed"], ["--profile", "decode"], ["--models", "gpt5"]):
        with pytest.raises(SystemExit):
            h200.parse(wrong)
    assert "give NAME=VALUE" in capsys.readouterr().err


def test_rows_show_ours_beside_the_peers_and_the_floor() -> None:
    table = h200.rows("llama8b", {"decode_b1_c1024_ms": 3.97, "sharegptlike": {"s": 14.0}, "ttft_99_ms": 150.25})
    assert table[0] == ["", "Penstock", "vLLM", "first mark", "aim", "floor", "/ vLLM", "/ floor"]
    assert table[1] == ["decode_b1_c1024_ms", "3.97", "4.96", "4.50", "3.90", "3.52", "0.80", "1.13"]
    assert table[2][:5] == ["sharegptlike", "14.00", "18.41", "17.00", "14.00"]
    assert table[3][:5] == ["ttft_99_ms", "150", "-", "-", "-"] and table[3][6] == "-"
    h200.print_table(table)


def test_a_later_run_updates_its_keys_only(tmp_path: Path) -> None:
    path = tmp_path / "new" / "h200-abc.json"
    record.merge(path, CARD, "abc", {"llama8b": {"a": 1, "b": {"s": 2}}})
    record.merge(path, {**CARD, "driver": "581"}, "abc", {"llama8b": {"b": {"s": 3}}, "kernels": [1]})
    record.merge(path, CARD, "abc", {"kernels": [2]})
    expected = {"commit": "abc", "machine": CARD, "llama8b": {"a": 1, "b": {"s": 3}}, "kernels": [2]}
    assert json.loads(path.read_text()) == expected
    before = path.read_text()
    for found_on, commit in (({"gpu": "NVIDIA H100"}, "abc"), (CARD, "def")):
        with pytest.raises(SystemExit, match="name another file"):
            record.merge(path, found_on, commit, {"llama8b": {"a": 9}})
    assert path.read_text() == before and list(path.parent.iterdir()) == [path]


def test_the_commit_without_git_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert record.commit()
    folders = {link.name for link in (ROOT / "penstock").iterdir() if link.is_symlink()}
    assert folders <= set(record.MEASURED), "a change there would be recorded under a commit that lacks it"
    monkeypatch.setattr(record, "ROOT", tmp_path)  # no repository
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.delenv(record.COMMIT_ENV, raising=False)
    assert record.commit() == "unknown"
    monkeypatch.setenv(record.COMMIT_ENV, "1a2b3c4")
    assert record.commit() == "1a2b3c4"
    assert record.file_name("h200", "1a2b3c4+changes") == "h200-1a2b3c4.json"


@pytest.mark.system
def test_the_whole_of_it_on_a_tiny_shape(tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    engine = ["--engine-option", "cpu_threads=1", "dtype=float32"]
    command = [sys.executable, "benchmarks/h200.py", "--models", "tiny", "--device", "cpu", "--quick"]
    done = subprocess.run(
        [*command, "--out", str(path), *engine], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found: dict[str, Any] = json.loads(path.read_text())
    assert found.keys() == {"commit", "machine", "tiny"} and set(found["tiny"]) == set(h200.TINY_TABLE)
    assert found["tiny"]["in8_out4_x6"].keys() == {"s", "out_tok_s", "tot_tok_s"}
    assert all(value > 0 for value in found["tiny"].values() if not isinstance(value, dict))
    assert "/ floor" in done.stdout


@pytest.fixture
def job(tmp_path: Path) -> Job:
    (tmp_path / "config.json").write_text(json.dumps(SHAPES["tiny"].config()))
    engine = {**h200.TINY_ENGINE, "device": "cpu", "cpu_threads": 1, "dtype": "float32"}
    return Job(str(tmp_path), (), str(h200.LENGTHS), engine, 2, 1, False, time.monotonic())


def test_a_work_that_fails_is_said_and_the_others_are_kept(job: Job, capsys: pytest.CaptureFixture[str]) -> None:
    engine = {**job.engine, "enable_prefix_caching": False}
    keys = ("ttft_16_cached_ms", "ttft_8_ms", "in8_out4_x6")
    assert work_on(replace(job, keys=keys, engine=engine)) == 1
    out = capsys.readouterr().out
    assert "ttft_16_cached_ms failed:" in out and "16 of 16 prompt tokens were not in the cache" in out
    found = [json.loads(line.removeprefix(RESULT)) for line in out.splitlines() if line.startswith(RESULT)]
    assert [result["key"] for result in found] == ["ttft_8_ms", "in8_out4_x6"]


def test_a_profile_shows_kernels_and_the_hosts_functions(job: Job, capsys: pytest.CaptureFixture[str]) -> None:
    assert work_on(replace(job, keys=("decode_b2_c8_ms", "ttft_8_ms"), profile=True)) == 0
    out = capsys.readouterr().out
    assert "33 steps, " in out and "1 steps, " in out and "aten::" in out and "tottime" in out and RESULT not in out
