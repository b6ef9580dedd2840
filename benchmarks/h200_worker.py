"""The measuring process of h200.py: one model, one `LLM`, the works it is told. Started by h200.py, never by hand.

Prints a line `@result {"key": ..., "value": ...}` for each figure as soon as it has it; all else is for people to read.
Prompts are random token ids from fixed seeds. Decode works of one context length share their prompts, so that
the prefix cache is filled once.
"""

from __future__ import annotations

import cProfile
import gc
import io
import json
import pstats
import random
import statistics
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.shapes import Work, parse_work
from penstock import LLM, RequestOutput, SamplingParams

RESULT = "@result "
PROFILED_TOKENS = 33
HOST_FUNCTIONS = 25


@dataclass(frozen=True)
class Job:
    """What to measure; travels as JSON."""

    model: str  # folder with config.json
    keys: tuple[str, ...]
    lengths: str  # file with [input, output] pairs
    engine: dict[str, Any]
    repeats: int  # of a first token
    decode_repeats: int
    profile: bool
    started: float  # time.monotonic() just before this process was started


def work_on(job: Job) -> int:
    """Build the engine, measure each key, report; the number of keys that failed."""
    llm = LLM(job.model, load_format="dummy", skip_tokenizer_init=True, **job.engine)
    startup_s = time.monotonic() - job.started
    print(f"ready after {startup_s:.1f} s: {llm.describe()}", flush=True)
    measuring = Measuring(llm, json.loads(Path(job.lengths).read_text()), job.repeats, job.decode_repeats)
    print(f"first token of a first request: {measuring.first_request_ms():.1f} ms", flush=True)
    failed = 0
    for key in job.keys:
        work = parse_work(key)
        assert work is not None, key
        gc.collect()
        try:
            if job.profile:
                measuring.profile(work)
            else:
                value = round(startup_s, 2) if work.kind == "startup" else measuring.measure(work)
                print(f"{RESULT}{json.dumps({'key': key, 'value': value})}", flush=True)
        except Exception:  # the other keys are still worth having
            failed += 1
            print(f"{key} failed:\n{traceback.format_exc()}", flush=True)
    llm.close()
    return failed


class Measuring:
    """An engine and the clock."""

    def __init__(self, llm: LLM, lengths: Sequence[Sequence[int]], repeats: int, decode_repeats: int) -> None:
        self.llm = llm
        self.lengths = lengths
        self.repeats = repeats
        self.decode_repeats = decode_repeats
        self._fresh = 0

    def measure(self, work: Work) -> Any:
        """A work's figure, as the baseline file has it."""
        if work.kind == "ttft":
            return self._first_token(work)
        if work.kind == "cached":
            return self._cached(work)
        if work.kind == "decode":
            return self._decode(work)
        return self._throughput(work)

    def first_request_ms(self) -> float:
        """Of a short prompt: far above a later one's, if the start left something to be done."""
        return self._seconds([self._fresh_prompt(16)], 1) * 1e3

    def profile(self, work: Work) -> None:
        """Print where a work's time goes: kernels, and the host's functions."""
        from penstock.bench.profiling import profile

        runs = self._profiled(work)
        runs()
        print(f"{work.key}:\n{profile(self.llm, runs)}")
        recorder = cProfile.Profile()
        recorder.runcall(runs)
        text = io.StringIO()
        pstats.Stats(recorder, stream=text).sort_stats("tottime").print_stats(HOST_FUNCTIONS)
        print("\n".join(line for line in text.getvalue().splitlines() if line.strip()), flush=True)

    def _profiled(self, work: Work) -> Callable[[], object]:
        if work.kind == "decode":
            prompts = self._prompts_of(work)
            return lambda: self._run(prompts, PROFILED_TOKENS)
        if work.kind == "ttft":
            return lambda: self._run([self._fresh_prompt(work.input_len)], 1)
        if work.kind == "cached":
            prompt = self._fresh_prompt(work.input_len)
            return lambda: self._run([prompt], 1)
        requests, outputs = self._requests(work)
        return lambda: self._run(requests, outputs)

    def _first_token(self, work: Work) -> float:
        prompts = [self._fresh_prompt(work.input_len) for _ in range(self.repeats + 1)]
        return _median_ms([self._seconds([prompt], 1) for prompt in prompts][1:])

    def _cached(self, work: Work) -> float:
        prompt = self._fresh_prompt(work.input_len)
        self._run([prompt], 1)
        return _median_ms([self._seconds([prompt], 1, cached=True) for _ in range(self.repeats + 1)][1:])

    def _decode(self, work: Work) -> float:
        prompts = self._prompts_of(work)
        self._run(prompts, 1)
        self._run(prompts, 2)
        short = [self._seconds(prompts, 1, cached=True) for _ in range(self.decode_repeats)]
        long = [self._seconds(prompts, work.output_len, cached=True) for _ in range(self.decode_repeats)]
        step_s = (statistics.median(long) - statistics.median(short)) / (work.output_len - 1)
        return round(step_s * 1e3, 3)

    def _throughput(self, work: Work) -> dict[str, Any]:
        requests, outputs = self._requests(work)
        few = min(len(requests), 32)
        warm = [self._fresh_prompt(len(prompt)) for prompt in requests[:few]]
        self._run(warm, [min(output, 8) for output in outputs[:few]])
        seconds = self._seconds(requests, outputs)
        tokens_in, tokens_out = sum(map(len, requests)), sum(outputs)
        found: dict[str, Any] = {}
        if work.kind == "sharegptlike":
            found = {"n": len(requests), "in_tok": tokens_in, "out_tok": tokens_out}
        return found | {
            "s": round(seconds, 2),
            "out_tok_s": round(tokens_out / seconds),
            "tot_tok_s": round((tokens_in + tokens_out) / seconds),
        }

    def _requests(self, work: Work) -> tuple[list[list[int]], list[int]]:
        """Fresh prompts and output lengths of a throughput work."""
        lengths = [(work.input_len, work.output_len)] * work.requests if work.kind == "equal" else self.lengths
        return [self._fresh_prompt(length) for length, _ in lengths], [output for _, output in lengths]

    def _prompts_of(self, work: Work) -> list[list[int]]:
        return [self._random(f"{work.input_len}.{i}", work.input_len) for i in range(work.requests)]

    def _fresh_prompt(self, length: int) -> list[int]:
        self._fresh += 1
        return self._random(f"fresh.{self._fresh}", length)

    def _random(self, seed: str, length: int) -> list[int]:
        return random.Random(seed).choices(range(3, self.llm.vocab_size), k=length)

    def _run(self, prompts: list[list[int]], outputs: int | list[int]) -> list[RequestOutput]:
        return self.llm.generate(prompts, _sampling(len(prompts), outputs), use_tqdm=False)

    def _seconds(self, prompts: list[list[int]], outputs: int | list[int], *, cached: bool = False) -> float:
        """Time of one `generate`, whose answer is then checked for what it was to be.

        Raises:
            RuntimeError: tokens are missing, or (cached) a prompt was not in the prefix cache.
        """
        params = _sampling(len(prompts), outputs)
        begun = time.perf_counter()
        answers = self.llm.generate(prompts, params, use_tqdm=False)
        elapsed_s = time.perf_counter() - begun
        for answer, asked in zip(answers, params, strict=True):
            if len(answer.outputs[0].token_ids) != asked.max_tokens:
                raise RuntimeError(f"asked for {asked.max_tokens} tokens, got {len(answer.outputs[0].token_ids)}")
            missing = len(answer.prompt_token_ids) - answer.num_cached_tokens
            if cached and missing > self.llm.engine.pages.page_size:
                raise RuntimeError(f"{missing} of {len(answer.prompt_token_ids)} prompt tokens were not in the cache")
        return elapsed_s


def _sampling(number: int, outputs: int | list[int]) -> list[SamplingParams]:
    wanted = [outputs] * number if isinstance(outputs, int) else outputs
    made = {
        tokens: SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        for tokens in set(wanted)
    }
    return [made[tokens] for tokens in wanted]


def _median_ms(seconds: list[float]) -> float:
    return round(statistics.median(seconds) * 1e3, 2)
