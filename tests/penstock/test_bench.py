"""`penstock bench`: vLLM's flags and result keys, its datasets, and what it refuses."""

from __future__ import annotations

import json
import logging
import random
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from penstock import LLM
from penstock.bench.config import LatencyConfig, ThroughputConfig
from penstock.bench.datasets import custom, sharegpt, with_lengths
from penstock.bench.profiling import KernelTime, RunProfile
from penstock.bench.result import percentiles
from penstock.bench.throughput import samples
from penstock.cli import main
from penstock.common.beam_search import BeamSearchParams
from penstock.common.errors import ConfigError
from penstock.common.tokenizer import Tokenizer

ENGINE = [
    *("--device", "cpu", "--cpu-threads", "1", "--block-size", "4", "--max-model-len", "64"),
    *("--max-num-batched-tokens", "32", "--kv-cache-memory-bytes", "4MiB", "--log-level", "error"),
]


@pytest.fixture(autouse=True)
def logging_as_before() -> Iterator[None]:
    """The command sets up logging for its process, which here is everybody's."""
    root, ours = logging.getLogger(), logging.getLogger("penstock")
    before = root.handlers[:], root.level, ours.level
    yield
    root.handlers[:], level, our_level = before
    root.setLevel(level)
    ours.setLevel(our_level)


@pytest.fixture(scope="module")
def model(checkpoints: dict[str, Path]) -> str:
    return str(checkpoints["qwen2"])


@pytest.fixture(scope="module")
def tokenizer(model: str) -> Tokenizer:
    return Tokenizer.load(model)


def test_latency_has_vllms_keys(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "new" / "latency.json"
    sizes = ["--input-len", "6", "--output-len", "3", "--batch-size", "2"]
    counts = ["--num-iters-warmup", "1", "--num-iters", "4", "--output-json", str(path)]
    assert main(["bench", "latency", "--model", model, *ENGINE, *sizes, *counts]) == 0
    result = json.loads(path.read_text())
    assert result.keys() == {"avg_latency", "latencies", "percentiles"}
    assert len(result["latencies"]) == 4 and result["percentiles"].keys() == {"10", "25", "50", "75", "90", "99"}
    assert result["avg_latency"] == pytest.approx(statistics.fmean(result["latencies"]))
    assert result["percentiles"]["50"] == pytest.approx(statistics.median(result["latencies"]))
    out = capsys.readouterr().out
    assert "Average latency:" in out and "4 tokens" in out  # the page size, in the line that describes the engine


def test_latency_of_a_search(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    searched: list[BeamSearchParams] = []
    search = LLM.beam_search

    def noted(llm: LLM, prompts: Any, params: BeamSearchParams) -> Any:
        searched.append(params)
        return search(llm, prompts, params)

    monkeypatch.setattr(LLM, "beam_search", noted)
    sizes = [
        "--input-len",
        "6",
        "--output-len",
        "3",
        "--batch-size",
        "2",
        "--num-iters-warmup",
        "0",
        "--num-iters",
        "2",
    ]
    beams = ["--use-beam-search", "--n", "4", "--output-json", str(tmp_path / "r.json")]
    assert main(["bench", "latency", model, *ENGINE, *sizes, *beams]) == 0
    assert searched == [BeamSearchParams(beam_width=4, max_tokens=3, ignore_eos=True)] * 2
    assert len(json.loads((tmp_path / "r.json").read_text())["latencies"]) == 2


def test_throughput_counts_what_was_asked_for(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "throughput.json"
    lengths = tmp_path / "lengths.json"
    lengths.write_text("[[3, 5], [20, 1], [9, 8], [1, 1]]")
    dataset = ["--dataset-name", "lengths", "--dataset-path", str(lengths), "--num-prompts", "3", "--num-warmups", "1"]
    dataset += ["--backend", "vllm"]
    more = ["--n", "2", "--skip-tokenizer-init", "--load-format", "dummy", "--output-json", str(path)]
    assert main(["benchmark", "throughput", model, *ENGINE, *dataset, *more]) == 0
    result = json.loads(path.read_text())
    keys = {"elapsed_time", "num_requests", "total_num_tokens", "requests_per_second", "tokens_per_second"}
    assert result.keys() == keys
    assert (result["num_requests"], result["total_num_tokens"]) == (3, 3 + 20 + 9 + 2 * (5 + 1 + 8))
    assert result["tokens_per_second"] == pytest.approx(result["total_num_tokens"] / result["elapsed_time"])
    assert "3 requests in" in capsys.readouterr().out


def test_a_profile_names_operators_and_counts_steps(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--input-len", "4", "--output-len", "3", "--batch-size", "1", "--num-iters-warmup", "1", "--profile"]
    assert main(["bench", "latency", model, *ENGINE, *sizes]) == 0
    out = capsys.readouterr().out
    assert "3 steps, " in out and "aten::" in out and "Average latency" not in out


def test_a_profile_adds_up() -> None:
    kernels = tuple(KernelTime(f"kernel_{i}", 4, 100.0 - i) for i in range(30))
    lines = str(RunProfile(steps=2, wall_us=5000.0, waited_us=3000.0, kernels=kernels, on_gpu=True)).splitlines()
    assert "2500.0 us each" in lines[0] and "host 1000.0 us" in lines[0]
    assert len(lines) == 2 + 25 + 1 and lines[-1].endswith("5 others")
    assert lines[2].split() == ["0.100", "3.9%", "4", "25.00", "2.00", "kernel_0"]


def test_help_lists_vllms_flags(capsys: pytest.CaptureFixture[str]) -> None:
    promised = {
        "latency": "input-len output-len batch-size n num-iters-warmup num-iters profile output-json "
        "disable-detokenize max-model-len tokenizer skip-tokenizer-init enable-prefix-caching",
        "throughput": "dataset-name dataset-path dataset input-len output-len n num-prompts num-warmups output-json "
        "disable-detokenize profile prefix-len random-input-len random-output-len random-range-ratio seed",
    }
    for name, flags in promised.items():
        with pytest.raises(SystemExit) as caught:
            main(["bench", name, "--help"])
        assert caught.value.code == 0
        listed = {word.strip("[],") for word in capsys.readouterr().out.split()}
        assert {f"--{flag}" for flag in flags.split()} - listed == set()
        assert "--redis-url" not in listed
    assert main(["bench", "--help"]) == 0 and main(["bench"]) == 2
    assert "throughput" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["latncy"], "unknown benchmark 'latncy'; there are latency, throughput"),
        (["latency"], "MODEL is missing"),
        (["latency", "m", "-tp=2"], "-tp 2 is not supported: one worker uses one device"),
        (["throughput", "m", "--backend", "hf"], "--backend: must be one of vllm, got 'hf'"),
        (["throughput", "m", "--async_engine"], "vLLM's --async_engine is not supported"),
        (["latency", "m", "--num-itters", "3"], "unknown option --num-itters; did you mean --num-iters?"),
        (["latency", "m", "--batch-size", "0"], "batch_size must be at least 1, got 0"),
        (["latency", "m", "--output-json", "/proc/x/r.json"], "cannot write /proc/x/r.json"),
        (["throughput", "m", "--random-range-ratio", "1.0"], "random_range_ratio must be a number in [0, 1)"),
        (["throughput", "m", "--random-range-ratio", '{"input": 0.5}'], "random_range_ratio must be"),
        (["throughput", "m", "--dataset", "a", "--dataset-path", "b"], "exclude each other"),
        (["throughput", "m", "--dataset-name", "lengths"], "dataset_name lengths needs dataset_path"),
        (["throughput", "m", "--dataset-path", "a", "--input-len", "4"], "input_len is for random prompts"),
        (["throughput", "m", "--dataset-path", "a", "--skip-tokenizer-init"], "it needs the tokenizer"),
    ],
)
def test_what_cannot_be_measured_is_one_line(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", *arguments]) == 2
    err = capsys.readouterr().err
    assert words in err and err.count("\n") == 1


def test_requests_beyond_the_context_are_refused(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "latency", model, *ENGINE, "--input-len", "60", "--output-len", "5"]) == 2
    assert "a request of 60 + 5 tokens is longer than the engine's context of 64" in capsys.readouterr().err


def test_percentiles_are_linear_between_values() -> None:
    assert percentiles([3.0]) == dict.fromkeys((10, 25, 50, 75, 90, 99), 3.0)
    assert percentiles([4.0, 0.0, 1.0, 3.0, 2.0]) == pytest.approx({10: 0.4, 25: 1, 50: 2, 75: 3, 90: 3.6, 99: 3.96})


def test_latency_turns_prefix_caching_off_by_itself() -> None:
    assert not LatencyConfig(model="m").enable_prefix_caching and ThroughputConfig(model="m").enable_prefix_caching


@pytest.fixture(scope="module")
def llm(model: str) -> Any:
    llm = LLM(model, device="cpu", cpu_threads=1, max_model_len=64, kv_cache_memory_bytes=4 << 20)
    yield llm
    llm.close()


def test_random_requests_are_as_long_as_asked(llm: LLM) -> None:
    config = ThroughputConfig(
        model="m", input_len=20, output_len=10, prefix_len=3, random_range_ratio='{"input": 0.5, "output": 0.1}'
    )
    drawn = samples(config, llm, 200, random.Random(1))
    lengths = [len(sample.prompt_token_ids) - 3 for sample in drawn]
    assert (min(lengths), max(lengths)) == (10, 30)
    assert {sample.output_len for sample in drawn} == {9, 10, 11}
    assert len({tuple(sample.prompt_token_ids[:3]) for sample in drawn}) == 1
    assert len({tuple(sample.prompt_token_ids[3:]) for sample in drawn}) == 200
    used = {token for sample in drawn for token in sample.prompt_token_ids}
    assert used.isdisjoint(llm.get_tokenizer().special_ids) and max(used) < llm.vocab_size and len(used) > 300
    assert drawn == samples(config, llm, 200, random.Random(1)) != samples(config, llm, 200, random.Random(2))


def test_prefixes_prompts_of_a_file_and_traces(llm: LLM, tokenizer: Tokenizer, tmp_path: Path) -> None:
    sizes = {"prefix_repetition_prefix_len": 5, "prefix_repetition_suffix_len": 3, "prefix_repetition_num_prefixes": 2}
    config = ThroughputConfig(model="m", dataset_name="prefix_repetition", output_len=4, **sizes)
    drawn = samples(config, llm, 6, random.Random(0))
    beginnings = [tuple(sample.prompt_token_ids[:5]) for sample in drawn]
    assert {beginnings.count(beginning) for beginning in beginnings} == {3}
    assert {(len(sample.prompt_token_ids), sample.output_len) for sample in drawn} == {(8, 4)}
    lines = tmp_path / "lines.jsonl"
    lines.write_text('{"prompt": "The river"}\n{"prompt": "The mill", "output_tokens": 3}\n{"prompt": "more"}')
    found = samples(
        ThroughputConfig(model="m", dataset_name="custom", dataset_path=str(lines)), llm, 2, random.Random(0)
    )
    assert [sample.prompt_token_ids for sample in found] == [
        tokenizer.encode("The river"),
        tokenizer.encode("The mill"),
    ]
    assert [sample.output_len for sample in found] == [256, 3]
    trace = tmp_path / "trace.jsonl"
    trace.write_text('{"timestamp": 9, "input_length": 6, "output_length": 2, "hash_ids": [3, 4]}')
    options: dict[str, Any] = {"dataset_name": "trace", "dataset_path": str(trace), "trace_page_tokens": 4}
    (only,) = samples(ThroughputConfig(model="m", **options), llm, 5, random.Random(0))
    assert (len(only.prompt_token_ids), only.output_len, only.at_s) == (6, 2, 0.0)
    with pytest.raises(ConfigError, match="no request of at most 7 tokens"):
        samples(ThroughputConfig(model="m", trace_max_len=7, **options), llm, 5, random.Random(0))


@pytest.mark.parametrize("line", ["{", "[]", '{"text": "a"}', '{"prompt": 3}', '{"prompt": "a", "output_tokens": -1}'])
def test_a_line_of_prompts_that_is_none(line: str) -> None:
    with pytest.raises(ConfigError, match="line 2 of a custom dataset"):
        custom('{"prompt": "a"}\n' + line, None, 9, None)


def test_a_prompt_may_hold_whatever_json_holds() -> None:
    prompts = [f"a{mark}b" for mark in ("\u2028", "\u2029", "\x85", "\r\n", "\n")]
    text = "\r\n".join(json.dumps({"prompt": prompt}, ensure_ascii=False) for prompt in prompts) + "\n"
    assert [sample.text for sample in custom(text, None, 9, None)] == prompts


def test_sharegpt_keeps_what_vllm_keeps(tokenizer: Tokenizer) -> None:
    def talk(*texts: str) -> dict[str, Any]:
        return {"conversations": [{"from": "human", "value": text} for text in texts]}

    good = [talk(f"The reservoir fills, number {i}", "and drains " * (i + 1), "more") for i in range(6)]
    bad = [talk("only one turn here"), talk("ok", "too short a prompt"), talk("a good prompt here", "x"), {"id": 3}]
    bad += [talk("long " * 1100, "an answer to that"), talk("a good prompt here", "long " * 2100)]
    kept = sharegpt(good + bad, tokenizer, 100, None, random.Random(0))
    expected = {(turns[0]["value"], turns[1]["value"]) for turns in (entry["conversations"] for entry in good)}
    assert {(tuple(tokenizer.encode(p)), len(tokenizer.encode(a))) for p, a in expected} == {
        (tuple(sample.prompt_token_ids), sample.output_len) for sample in kept
    }
    assert len(sharegpt(good + bad, tokenizer, 2, None, random.Random(0))) == 2
    assert {sample.output_len for sample in sharegpt(good, tokenizer, 9, 1, random.Random(0))} == {1}


@pytest.mark.parametrize("found", [{}, [], [[1]], [[1, 0]], [[1, 2], [True, 2]], [["1", 2]]])
def test_lengths_that_are_none(found: Any) -> None:
    with pytest.raises(ConfigError, match="a lengths dataset must be"):
        with_lengths(found, [1], 3, None, random.Random(0))


def test_a_dataset_that_cannot_be_read(llm: LLM, tokenizer: Tokenizer, tmp_path: Path) -> None:
    config = ThroughputConfig(model="m", dataset_path=str(tmp_path / "none.json"))
    with pytest.raises(ConfigError, match=r"none\.json cannot be read"):
        samples(config, llm, 1, random.Random(0))
    for found, words in (
        ({}, "must be a JSON list"),
        ([], "no conversation"),
        ([{"conversations": [1, 2]}], "no value"),
    ):
        with pytest.raises(ConfigError, match=words):
            sharegpt(found, tokenizer, 1, None, random.Random(0))
