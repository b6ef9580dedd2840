"""Mixed requests at the limits of the flags for minutes: never out of memory, every page returned, nothing corrupted.

    python benchmarks/memory_trace.py [--seconds 360] [--models llama8b] [--engine-option max_num_seqs=512 ...]

More requests than may run are always open, and what runs soon wants more pages than there are: prompts of 1 token to
the whole context, a quarter of them begins as an earlier one did, outputs of 1 to 4096 tokens, every kind of sampling,
up to 20 logprobs; one in twenty is aborted at some time. The context, the batch and the step are those of the options,
the share of the card's memory too. A few greedy prompts are computed alone before and after, without the prefix cache:
what the trace did must not show in them.

Writes benchmarks/results/memory_trace-<commit>.json; exits with 1 if a page is still held, or a probe's tokens differ.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from anywhere, installed or not

from benchmarks.h200 import engine_options
from benchmarks.record import RESULTS, commit, file_name, machine, merge
from benchmarks.shapes import SHAPES
from penstock.common.config import EngineConfig
from penstock.common.messages import GenerateRequest
from penstock.common.sampling import SamplingParams
from penstock.engine.build import BuiltEngine, build_engine
from penstock.engine.policy import DecodePolicy

ENGINE = {"max_num_seqs": 256, "max_model_len": 32768, "gpu_memory_utilization": 0.9}
OPEN_AT_ONCE = 1.5  # times max_num_seqs
PROBES = 8
PROBE_TOKENS = 32
MAX_OUTPUT = 4096
REPORT_EVERY_S = 20.0


class Requests:
    """Draws requests, from a seed."""

    def __init__(self, vocab_size: int, max_model_len: int, seed: int) -> None:
        self._vocab_size, self._longest = vocab_size, max_model_len - 1
        self._pick = random.Random(seed)
        self._earlier: list[list[int]] = []
        self.made = 0

    def draw(self) -> GenerateRequest:
        self.made += 1
        prompt = self._prompt()
        most = min(MAX_OUTPUT, self._longest + 1 - len(prompt))
        return GenerateRequest(
            request_id=f"trace-{self.made}",
            prompt_token_ids=prompt,
            sampling=self._sampling(self._pick.randint(1, most)),
            eos_token_ids=[2],
            queue_timeout_s=math.inf,
        )

    def _prompt(self) -> list[int]:
        pick = self._pick
        length = self._longest if pick.random() < 0.02 else self._log_uniform(self._longest)
        start: list[int] = []
        if self._earlier and pick.random() < 0.25:
            earlier = pick.choice(self._earlier)
            start = earlier[: pick.randrange(len(earlier) + 1)][:length]
        prompt = start + pick.choices(range(self._vocab_size), k=length - len(start))
        self._earlier = [*self._earlier[-20:], prompt]
        return prompt

    def _log_uniform(self, most: int) -> int:
        return min(most, int(math.exp(self._pick.uniform(0.0, math.log(most + 1)))))

    def _sampling(self, tokens: int) -> SamplingParams:
        pick = self._pick
        kind: dict[str, Any] = pick.choice(
            [
                {"temperature": 0.0},
                {"temperature": 1.0},
                {"temperature": 0.8, "top_k": 40, "top_p": 0.9},
                {"temperature": 1.0, "min_p": 0.05},
                {"temperature": 0.7, "repetition_penalty": 1.2, "presence_penalty": 0.5, "frequency_penalty": 0.1},
                {"temperature": 0.0, "logprobs": pick.choice((0, 5, 20))},
            ]
        )
        return SamplingParams(max_tokens=tokens, ignore_eos=pick.random() < 0.8, seed=self.made, **kind)


@dataclass
class Trace:
    """The loop, and what it has seen."""

    built: BuiltEngine
    requests: Requests
    open_at_once: int
    pick: random.Random
    running: dict[str, GenerateRequest] = field(default_factory=dict)
    finished: int = 0
    aborted: int = 0
    most_held: int = 0
    least_free_bytes: int = 0

    def run(self, seconds: float) -> None:
        """Steps for so long, then aborts what is open."""
        engine, device = self.built.engine, self.built.pool.device
        begun = reported = time.monotonic()
        while (now := time.monotonic()) < begun + seconds:
            while len(self.running) < self.open_at_once:
                request = self.requests.draw()
                engine.add(request)
                self.running[request.request_id] = request
            if self.pick.random() < 0.05 * self.finished / max(1, engine.steps):
                self._abort(self.pick.choice(list(self.running)))
            for output in engine.step().outputs:
                if output.finish is not None and self.running.pop(output.request.request_id, None):
                    self.finished += 1
            engine.pages.drain_events()
            self.most_held = max(self.most_held, engine.pages.num_held)
            if now > reported + REPORT_EVERY_S:
                reported = now
                engine.pages.check()
                print(f"{now - begun:5.0f} s: {self._state(device)}", flush=True)
        for request_id in list(self.running):
            self._abort(request_id)
        engine.settle()
        print(f"{time.monotonic() - begun:5.0f} s: {self._state(device)}", flush=True)

    def _abort(self, request_id: str) -> None:
        del self.running[request_id]
        self.built.engine.abort(request_id, 0, 0)
        self.aborted += 1

    def _state(self, device: torch.device) -> str:
        engine, free = self.built.engine, "-"
        if device.type == "cuda":
            self.least_free_bytes = free_bytes = torch.cuda.mem_get_info(device)[0]
            free = f"{free_bytes / 2**30:.2f}"
        return (
            f"{engine.steps} steps, {self.finished} finished, {self.aborted} aborted, "
            f"{engine.scheduler.counters.preemptions} preempted, {engine.pages.num_held} of {engine.pages.num_pages} "
            f"pages held, {free} GiB of the device free"
        )


def probe(built: BuiltEngine, salt: str) -> list[list[int]]:
    """Greedy tokens of fixed prompts, each alone and with no page of an earlier run."""
    pick = random.Random(3)
    found = []
    for number in range(PROBES):
        length = pick.randrange(1, min(2000, built.max_model_len - PROBE_TOKENS))
        prompt = pick.choices(range(built.spec.vocab_size), k=length)
        built.engine.add(
            GenerateRequest(
                request_id=f"probe-{salt}-{number}",
                prompt_token_ids=prompt,
                sampling=SamplingParams(temperature=0.0, max_tokens=PROBE_TOKENS, ignore_eos=True),
                cache_salt=salt,
            )
        )
        tokens: list[int] = []
        while built.engine.has_work():
            for output in built.engine.step().outputs:
                tokens += output.token_ids
        found.append(tokens)
    return found


def measure(model: str, options: argparse.Namespace) -> dict[str, Any]:
    """One model's trace."""
    with tempfile.TemporaryDirectory(prefix="penstock-trace-") as folder:
        (Path(folder) / "config.json").write_text(json.dumps(SHAPES[model].config()))
        settings: dict[str, Any] = {**ENGINE, "device": options.device, **options.engine}
        config = EngineConfig(model=folder, load_format="dummy", **settings)
        built = build_engine(config, DecodePolicy())
    engine = built.engine
    before = probe(built, "before")
    requests = Requests(built.spec.vocab_size, built.max_model_len, options.seed)
    trace = Trace(built, requests, int(OPEN_AT_ONCE * config.max_num_seqs) + 1, random.Random(options.seed))
    cuda = built.pool.device.type == "cuda"
    reserved = torch.cuda.memory_reserved() if cuda else 0
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    trace.run(options.seconds)
    engine.pages.check()
    left = engine.pages.num_held
    counters = engine.scheduler.counters
    result = {
        "options": settings,
        "seconds": options.seconds,
        "steps": engine.steps,
        "finished": trace.finished,
        "aborted": trace.aborted,
        "prompt_tokens": counters.prompt_tokens,
        "generation_tokens": counters.generation_tokens,
        "preemptions": counters.preemptions,
        "pages": engine.pages.num_pages,
        "most_pages_held": trace.most_held,
        "pages_held_at_the_end": left,
        "reserved_gib_at_start": round(reserved / 2**30, 2),
        "reserved_gib_at_most": round(torch.cuda.max_memory_reserved() / 2**30, 2) if cuda else 0.0,
        "device_free_gib_at_end": round(trace.least_free_bytes / 2**30, 2),
        "allocator_retries": torch.cuda.memory_stats().get("num_alloc_retries", 0) if cuda else 0,
        "probes_equal": probe(built, "after") == before,
    }
    engine.close()
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["llama8b"], choices=sorted(SHAPES), metavar="NAME")
    parser.add_argument("--seconds", type=float, default=360.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--engine-option", nargs="+", default=[], metavar="NAME=VALUE", help="options of the engine")
    parser.add_argument("--out", type=Path, help="result file (default: benchmarks/results/memory_trace-COMMIT.json)")
    parser.add_argument("--device", default="cuda", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.engine = engine_options(options.engine_option)
    at_commit = commit()
    path = options.out or RESULTS / file_name("memory_trace", at_commit)
    good = True
    for model in options.models:
        result = measure(model, options)
        print(model, json.dumps(result, indent=1), flush=True)
        merge(path, machine(), at_commit, {model: result})
        good = good and result["probes_equal"] and result["pages_held_at_the_end"] == 0
    print(path)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
