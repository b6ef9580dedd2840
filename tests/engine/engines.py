"""Engines for tests, and a loop that feeds them requests at chosen steps."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from penstock.common.config import EngineConfig
from penstock.common.messages import Finish, GenerateRequest
from penstock.common.sampling import SamplingParams
from penstock.engine import sampler
from penstock.engine.build import DTYPES, BuiltEngine, build_engine
from penstock.engine.kv_pool import KVLayout
from penstock.engine.outputs import Output
from penstock.engine.policy import DecodePolicy
from penstock.models.spec import read_spec
from tests.engine.late import Late

GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)


def make_engine(
    path: Path, *, pages: int = 512, run_ahead: int = 0, device: str = "cpu", **options: object
) -> BuiltEngine:
    """A decode engine with a pool of `pages` pages."""
    values: dict[str, object] = {"block_size": 4, "max_num_batched_tokens": 64, "max_num_seqs": 16, **options}
    config = EngineConfig(model=str(path), device=device, cpu_threads=1, **values)  # type: ignore[arg-type]
    spec = read_spec(path)
    dtype = DTYPES[spec.dtype if config.dtype == "auto" else config.dtype]
    layout = KVLayout(spec.num_layers, spec.num_kv_heads, spec.head_dim, config.block_size, dtype)
    built = build_engine(replace(config, kv_cache_memory_bytes=pages * layout.page_bytes), DecodePolicy())
    if run_ahead:
        built.engine.executor = Late(built.engine.executor, run_ahead)
    return built


def request(name: str, prompt: list[int], sampling: SamplingParams = GREEDY, **fields: object) -> GenerateRequest:
    return GenerateRequest(request_id=name, prompt_token_ids=prompt, sampling=sampling, **fields)  # type: ignore[arg-type]


def run(
    built: BuiltEngine, arrivals: list[tuple[int, GenerateRequest]], *, limit: int = 5000
) -> tuple[dict[str, list[int]], dict[str, Finish]]:
    """Add each request when its step comes, step until all have ended, check the pages, return tokens and finishes."""
    tokens: dict[str, list[int]] = {r.request_id: [] for _, r in arrivals}
    finishes: dict[str, Finish] = {}
    queue = sorted(arrivals, key=lambda item: item[0])
    for step in range(limit):
        while queue and queue[0][0] <= step:
            built.engine.add(queue.pop(0)[1])
        for output in built.engine.step().outputs:
            assert output.index == len(tokens[output.request.request_id])
            _collect(output, tokens, finishes)
        built.engine.pages.check()
        if not queue and not built.engine.has_work():
            assert built.engine.pages.num_held == 0
            return tokens, finishes
    raise AssertionError(f"no end after {limit} steps")


def _collect(output: Output, tokens: dict[str, list[int]], finishes: dict[str, Finish]) -> None:
    tokens[output.request.request_id] += output.token_ids
    if output.finish is not None:
        finishes[output.request.request_id] = output.finish


@contextlib.contextmanager
def smallest_margin() -> Iterator[list[float]]:
    """For each step, how far the best score of any draw was from the second best: a tie may fall either way."""
    margins: list[float] = []
    original = sampler.draw_scores

    def noting(logits: torch.Tensor, rows: Sequence[sampler.SamplingRow]) -> torch.Tensor:
        scores = original(logits, rows)
        best, second = scores.topk(2).values.unbind(-1)
        margins.append((best - second).min().item())
        return scores

    sampler.draw_scores = noting
    try:
        yield margins
    finally:
        sampler.draw_scores = original
