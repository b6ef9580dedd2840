"""Decode steps on CPU: Penstock's engine beside transformers' generate, same weights, same process, in turns.

    python benchmarks/cpu_vs_transformers.py

The model is a Llama shape of 246 million random bfloat16 parameters. Rounds alternate between the two, so that whatever
else the machine does falls on both; a row gives the median step of each and the median of the rounds' ratios. On a busy
machine look at the undisturbed steps: the fastest tenth of each. The floor is the time to read every weight once, at
the bandwidth that this run measures.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import tempfile
import time
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM, StoppingCriteria, StoppingCriteriaList

from penstock.common.config import EngineConfig
from penstock.common.messages import GenerateRequest
from penstock.common.sampling import SamplingParams
from penstock.engine.build import build_engine
from penstock.engine.core import Engine
from penstock.engine.policy import DecodePolicy

ROOT = Path(__file__).resolve().parents[1]
MEASURED = ("common", "engine", "kernels", "models", "benchmarks/cpu_vs_transformers.py")
PROMPT_TOKENS = 128
NEW_TOKENS = 64
SHAPE: dict[str, Any] = {
    "hidden_size": 1024,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "intermediate_size": 2816,
    "vocab_size": 32000,
    "max_position_embeddings": 2048,
}


@dataclass(frozen=True)
class Timing:
    """One run of a batch, in seconds."""

    prefill_s: float
    steps_s: list[float]  # decode steps

    @property
    def step_s(self) -> float:
        return statistics.median(self.steps_s)


@dataclass(frozen=True)
class Row:
    """A batch size: medians over the rounds."""

    batch: int
    rounds: int
    penstock_step_ms: float
    transformers_step_ms: float
    step_ratio: float  # transformers' step time over ours, of the same round
    step_ratio_min: float
    step_ratio_max: float
    penstock_undisturbed_ms: float  # 10th percentile of all steps of all rounds
    transformers_undisturbed_ms: float
    undisturbed_ratio: float
    penstock_prefill_ms: float
    transformers_prefill_ms: float
    floor_ms: float


class StepClock(StoppingCriteria):
    """Notes the time after every step of generate, and never stops it."""

    def __init__(self) -> None:
        self.times = [time.perf_counter()]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        self.times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool)


def time_transformers(model: LlamaForCausalLM, prompts: torch.Tensor) -> Timing:
    clock = StepClock()
    out = model.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        max_new_tokens=NEW_TOKENS,
        min_new_tokens=NEW_TOKENS,
        do_sample=False,
        stopping_criteria=StoppingCriteriaList([clock]),
    )
    assert out.shape == (len(prompts), PROMPT_TOKENS + NEW_TOKENS)
    return _timing(clock.times)


def time_penstock(engine: Engine, prompts: torch.Tensor) -> Timing:
    sampling = SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS, ignore_eos=True)
    times = [time.perf_counter()]
    for i, prompt in enumerate(prompts.tolist()):
        engine.add(GenerateRequest(request_id=f"request-{i}", prompt_token_ids=prompt, sampling=sampling))
    while engine.has_work():
        engine.step()
        times.append(time.perf_counter())
    assert len(times) >= NEW_TOKENS + 1
    return _timing(times[: NEW_TOKENS + 1])


def _timing(times: list[float]) -> Timing:
    gaps = [after - before for before, after in pairwise(times)]
    return Timing(prefill_s=gaps[0], steps_s=gaps[1:])


def compare(model: LlamaForCausalLM, engine: Engine, batch: int, rounds: int, floor_ms: float) -> Row:
    """Alternate for `rounds` rounds, after one that does not count; who goes first changes every round."""
    prompts = torch.randint(
        0, SHAPE["vocab_size"], (batch, PROMPT_TOKENS), generator=torch.Generator().manual_seed(batch)
    )
    ours: list[Timing] = []
    theirs: list[Timing] = []
    for turn in range(rounds + 1):
        if turn % 2:
            theirs.append(time_transformers(model, prompts))
            ours.append(time_penstock(engine, prompts))
        else:
            ours.append(time_penstock(engine, prompts))
            theirs.append(time_transformers(model, prompts))
    ours, theirs = ours[1:], theirs[1:]
    ratios = [their.step_s / our.step_s for our, their in zip(ours, theirs, strict=True)]
    return Row(
        batch=batch,
        rounds=rounds,
        penstock_step_ms=_median_ms([timing.step_s for timing in ours]),
        transformers_step_ms=_median_ms([timing.step_s for timing in theirs]),
        step_ratio=round(statistics.median(ratios), 2),
        step_ratio_min=round(min(ratios), 2),
        step_ratio_max=round(max(ratios), 2),
        penstock_undisturbed_ms=_undisturbed_ms(ours),
        transformers_undisturbed_ms=_undisturbed_ms(theirs),
        undisturbed_ratio=round(_undisturbed_ms(theirs) / _undisturbed_ms(ours), 2),
        penstock_prefill_ms=_median_ms([timing.prefill_s for timing in ours]),
        transformers_prefill_ms=_median_ms([timing.prefill_s for timing in theirs]),
        floor_ms=floor_ms,
    )


def _median_ms(seconds: list[float]) -> float:
    return round(statistics.median(seconds) * 1e3, 2)


def _undisturbed_ms(timings: list[Timing]) -> float:
    steps_s = [step_s for timing in timings for step_s in timing.steps_s]
    return round(statistics.quantiles(steps_s, n=10)[0] * 1e3, 2)


def floor_ms(weight_bytes: int) -> float:
    """Time to read the weights once: the best of several sums over as much memory."""
    data = torch.ones(weight_bytes // 8, dtype=torch.int64)
    best_s = float("inf")
    for _ in range(8):
        start = time.perf_counter()
        data.sum()
        best_s = min(best_s, time.perf_counter() - start)
    return round(best_s * 1e3, 2)


def describe_machine() -> dict[str, Any]:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    return {"cpu": name, "isa": torch.backends.cpu.get_cpu_capability(), "threads": torch.get_num_threads()}


def git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    transformers.logging.set_verbosity_error()

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE, attn_implementation="sdpa")).to(torch.bfloat16).eval()
    read_bytes = sum(p.nbytes for p in model.parameters()) - model.get_input_embeddings().weight.nbytes
    floor = floor_ms(read_bytes)
    with tempfile.TemporaryDirectory() as directory:
        model.save_pretrained(directory)
        config = EngineConfig(
            model=directory,
            device="cpu",
            cpu_threads=options.threads,
            max_num_batched_tokens=max(options.batch) * PROMPT_TOKENS,
            max_num_seqs=max(options.batch),
            enable_prefix_caching=False,
        )
        engine = build_engine(config, DecodePolicy()).engine
    rows = []
    for batch in options.batch:
        row = compare(model, engine, batch, options.rounds, floor)
        rows.append(asdict(row))
        print(json.dumps(rows[-1]), flush=True)
    engine.close()
    commit = git("rev-parse", "--short", "HEAD")
    record = {
        "commit": commit + ("" if not git("status", "--porcelain", "--", *MEASURED) else "+changes"),
        "machine": describe_machine(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__}
        | {"transformers": transformers.__version__},
        "rows": rows,
    }
    options.results.mkdir(parents=True, exist_ok=True)
    path = options.results / f"cpu_vs_transformers-{commit}.json"
    path.write_text(json.dumps(record, indent=2) + "\n")
    print(path)


if __name__ == "__main__":
    main()
