"""Traces to simulate: tiny files in the formats of the public ones, and what is wrong with others."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from penstock.common.errors import ConfigError
from penstock.simulate.trace import TracedRequest, read_trace, repeated, time_scaled

MOONCAKE = """\
{"timestamp": 2000, "input_length": 700, "output_length": 5, "hash_ids": [0, 1]}
{"timestamp": 5000, "input_length": 1024, "output_length": 0, "hash_ids": [0, 2]}
"""
AZURE = """\
TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:17:03.9799600,4808,10
2023-11-16 18:17:04.2299601,3180,8
"""


def written(folder: Path, text: str) -> str:
    path = folder / "trace"
    path.write_text(text)
    return str(path)


def test_a_mooncake_trace(tmp_path: Path):
    assert read_trace(written(tmp_path, MOONCAKE), 512) == [
        TracedRequest(0.0, 700, 5, (0, 1)),
        TracedRequest(3000.0, 1024, 1, (0, 2)),
    ]


def test_an_azure_trace(tmp_path: Path):
    first, second = read_trace(written(tmp_path, AZURE), 512)
    assert (first.prompt_tokens, first.output_tokens, first.pages, first.arrival_ms) == (4808, 10, (), 0.0)
    assert second.arrival_ms == pytest.approx(250.0001, abs=1e-3)


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("", "holds no requests"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n", "holds no requests"),
        ("time,tokens\n1,2\n", "neither a Mooncake trace"),
        (MOONCAKE + "{}\n", "line 3: not a request of a Mooncake trace"),
        (MOONCAKE.replace("700", "1100"), "1100 tokens are not 2 pages of 512"),
        (MOONCAKE.replace("700", "0"), "line 1: a prompt of 0 tokens"),
        (MOONCAKE.replace("2000", "NaN"), "line 1: not a request of a Mooncake trace"),
        (MOONCAKE.replace("5000", "Infinity"), "line 2: not a request of a Mooncake trace"),
        (MOONCAKE.replace('"output_length": 5', '"output_length": Infinity'), "line 1: not a request of a Mooncake"),
        ('{"a": ' + "[" * 100_000, "line 1: not a request of a Mooncake trace"),
        (AZURE + "x" * (1 << 18), "no Azure trace: field larger than field limit"),
        (AZURE + "yesterday,1,2\n", "line 4: not a request of an Azure trace"),
        (AZURE + "2023-11-16 18:17:03.9,1\n", "line 4: not a request of an Azure trace"),
    ],
)
def test_what_is_no_trace(tmp_path: Path, text: str, error: str):
    with pytest.raises(ConfigError, match=error):
        read_trace(written(tmp_path, text), 512)


@pytest.mark.parametrize("name", ["none", "nul\0", "\udcff"])
def test_a_trace_that_is_not_there(tmp_path: Path, name: str):
    with pytest.raises(ConfigError, match="cannot read the trace"):
        read_trace(str(tmp_path / name), 512)


@pytest.mark.parametrize("text", [MOONCAKE, AZURE])
def test_what_may_stand_around_and_within_the_lines(tmp_path: Path, text: str):
    plain = read_trace(written(tmp_path, text), 512)
    assert read_trace(written(tmp_path, "\n" + text + "\n\n"), 512) == plain
    assert read_trace(written(tmp_path, "\ufeff" + text), 512) == plain
    within = text.replace('"input', '"of": "a\u2028b", "input').replace("\n", "\r\n")
    assert read_trace(written(tmp_path, within), 512) == plain


def test_generated_requests_share_beginnings():
    requests = read_trace("generated:2000", 16, seed=3)
    assert requests == read_trace("generated:2000", 16, seed=3) != read_trace("generated:2000", 16, seed=4)
    assert all(-(-r.prompt_tokens // 16) == len(r.pages) for r in requests)
    assert [r.arrival_ms for r in requests] == sorted(r.arrival_ms for r in requests)
    assert requests[-1].arrival_ms == pytest.approx(2e6, rel=0.1)
    sharers = Counter(r.pages[0] for r in requests)
    assert len(sharers) > 20 and sharers.most_common(1)[0][1] > 5 * 2000 / 40, "a few beginnings are many requests'"
    assert len({r.pages[4] for r in requests}) == 2000, "what follows is a request's own"
    for wrong in ("generated:", "generated:0", "generated:1e6"):
        with pytest.raises(ConfigError, match="needs a number of requests"):
            read_trace(wrong, 16)


def test_a_repeated_trace_shares_only_what_all_requests_do():
    once = [TracedRequest(0.0, 10, 1, (0, 1)), TracedRequest(8.0, 10, 1, (0, 1, 2)), TracedRequest(16.0, 9, 1, (0, 7))]
    twice = repeated(once, 2)
    assert twice[:3] == once
    assert [r.pages for r in twice[3:]] == [(0, 9), (0, 9, 10), (0, 15)]
    assert twice[3].arrival_ms - twice[2].arrival_ms == pytest.approx(16.0 / 3), "a mean gap lies between"
    assert [r.arrival_ms for r in time_scaled(once, 0.5)] == [0.0, 4.0, 8.0]
