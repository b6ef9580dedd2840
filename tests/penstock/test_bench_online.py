"""benchmarks/online.py without a GPU: loads, figures, the table, and the whole of it on a tiny shape."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from benchmarks import online
from benchmarks.online_figures import Load, figures, hand_off_figures, read_loads, table
from benchmarks.shape_folder import make_shape_folder
from benchmarks.shapes import SHAPES
from penstock.bench.serving_metrics import RequestRecord
from penstock.common.tokenizer import Tokenizer
from penstock.placement import place_workers

LOAD = Load("W", 4, 3, 7, 1000.0, (0.0, 0.5, 0.6, 0.7))


def record(ttft: float, gaps: list[float], exposed_ms: float | None = None, error: str = "") -> RequestRecord:
    transfer = {"name": "transfer", "ms": 9.0, "exposed_ms": exposed_ms}
    found = RequestRecord(4, ttft=ttft, latency=ttft + sum(gaps), itl=gaps, output_len=len(gaps) + 1, error=error)
    found.timeline = [{"name": "received", "ms": 0.0}] + ([transfer] if exposed_ms is not None else [])
    return found


def test_loads_are_those_that_the_peer_got() -> None:
    loads = read_loads()
    peers = json.loads((online.RESULTS.parent / "peers" / "vllm-0.22.1-2xh200-online.json").read_text())
    theirs = {name: load for name, load in loads.items() if not load.mix}
    assert set(online.TABLE) < theirs.keys() == {name for name in peers["A"] if "low" not in name}
    assert all(len(load.arrivals_s) == peers["A"][name]["n"] for name, load in theirs.items())
    chooser = random.Random(108007)
    expected = [[chooser.randrange(10, 100000) for _ in range(2048)] for _ in range(2)]
    assert [question.prompt for question in loads["W1@8"].questions(128256)[:2]] == expected
    small = loads["W2@4"].shrunk()
    assert (small.input_tokens, small.output_tokens, len(small.arrivals_s)) == (256, 8, 12)
    assert max(max(question.prompt) for question in small.questions(400)) < 400


def test_a_load_of_mixed_lengths() -> None:
    load = read_loads()["M@10"]
    questions = load.questions(128256)
    lengths = [question.prompt_len for question in questions]
    assert {*lengths} == {*load.mix} and max(load.mix) == load.input_tokens and len(lengths) == len(load.arrivals_s)
    assert all(len(question.prompt) == question.prompt_len for question in questions)
    assert lengths == [question.prompt_len for question in load.questions(400)], "whatever the vocabulary"
    assert max(question.prompt_len for question in load.shrunk().questions(400)) <= load.input_tokens // 32


def test_figures_and_what_counts_as_good() -> None:
    good, late = record(0.1, [0.02, 0.02], 6.0), record(1.1, [0.02, 0.02])
    slow, torn = record(0.1, [0.03, 0.03]), record(0.1, [0.001] * 20 + [0.11])
    found = figures(LOAD, [good, late, slow, torn, record(0.0, [], error="gone")], 2.0)
    assert (found["n"], found["ok"], found["goodput"]) == (5, 4, 0.2)
    assert (found["ttft_p50"], found["itl_max"], found["out_tok_s"]) == (100.0, 110.0, (3 + 3 + 3 + 22) / 2)
    assert (found["handed_off"], found["exposed_share_p99"]) == (0.25, round(0.006 / 0.14, 4))
    assert figures(LOAD, [record(0.0, [], error="gone")], 1.0)["goodput"] == 0.0


def test_a_hand_off_alone() -> None:
    found = hand_off_figures([record(0.1, [0.012, 0.005, 0.005], 2.0), record(0.2, [0.014, 0.007, 0.005], 4.0)])
    assert (found["first_gap_ms"], found["decode_step_ms"], found["over_a_step_ms"]) == (13.0, 5.0, 8.0)
    assert (found["exposed_ms"], found["transfer_ms"], found["handed_off"]) == (3.0, 9.0, 1.0)


def test_the_table_shows_the_peer_and_the_marks() -> None:
    ours = figures(LOAD, [record(0.1, [0.02])], 1.0)
    lines = table({"loads": {"W1@8": ours}, "one_phase": {"W1@8": ours, "W1@4": ours}}, with_peers=True)
    assert [line.split("  ")[0] for line in lines if line[0] != " "] == ["load", "W1@8", "W1@4"]
    names = ("1 + 1", "two one-phase", "vLLM A", "vLLM Bx", "first mark", "aim")
    assert all(name in line for name, line in zip(names, lines[1:7], strict=True))
    assert lines[3].split()[2:5] == ["56", "81", "5.11"] and lines[6].split()[1:3] == ["52", "78"]
    assert len(table({"loads": {"W1@8": ours}}, with_peers=False)) == 2


def test_fleets_have_their_places(capsys: pytest.CaptureFixture[str]) -> None:
    options = online.parse(["--serve-option", "min_remote_prefill_tokens=64", "--loads", "W1@8"])
    split, whole = (online.serve_config("m", online.FLEETS[name], options) for name in ("1+1", "one-phase"))
    assert [(p.role, p.device) for p in place_workers(split, 2, 8)] == [("prefill", "cuda:0"), ("decode", "cuda:1")]
    assert [(p.role, p.device) for p in place_workers(whole, 2, 8)] == [("decode", "cuda:0"), ("decode", "cuda:1")]
    assert split.load_format == "dummy" and split.min_remote_prefill_tokens == 64
    for wrong in (["--loads", "W9"], ["--serve-option", "seed"]):
        with pytest.raises(SystemExit):
            online.parse(wrong)
    assert "--serve-option seed: give NAME=VALUE" in capsys.readouterr().err


def test_every_token_of_a_shape_is_text(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(str(make_shape_folder(SHAPES["tiny"], tmp_path)))
    assert tokenizer.vocab_size == SHAPES["tiny"].vocab
    assert tokenizer.decode([256, 399]) == " w256 w399" and all(tokenizer.decode([i]) for i in range(400))


@pytest.mark.system
def test_the_whole_of_it_on_a_tiny_shape(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, lines = tmp_path / "out.json", tmp_path / "requests.jsonl"
    flags = ["--cpu", "--loads", "W1@24", "--fleets", "1+1", "--hand-off", "--append", str(path)]
    flags += ["--requests", str(lines)]
    assert online.main([*flags, "--serve-option", "routing_policy=round-robin"]) == 0
    found = json.loads(path.read_text())
    assert found.keys() == {"commit", "machine", "loads", "hand_off"}
    load = found["loads"]["W1@24"]
    assert (load["n"], load["ok"], load["handed_off"]) == (12, 12, 1.0)
    assert load["ttft_p50"] > 0 and load["out_tok_s"] > 0
    requests = [json.loads(line) for line in lines.read_text().splitlines()]
    assert len(requests) == 12 and requests[0]["sent_ms"] == 0.0
    assert all(r["load"] == "loads W1@24" and r["ttft_ms"] + sum(r["itl_ms"]) <= r["e2e_ms"] + 1 for r in requests)
    assert all(any(entry["name"] == "transfer" for entry in r["timeline"]) for r in requests)
    assert found["hand_off"].keys() == {"64", "256", "1000"}
    assert all(alone["handed_off"] == 1.0 and alone["transfer_ms"] > 0 for alone in found["hand_off"].values())
    assert "W1@24  1 + 1" in capsys.readouterr().out
