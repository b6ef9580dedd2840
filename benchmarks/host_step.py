"""What a step costs the host: planning, updating, and the answers' bytes, over an executor that computes nothing.

    python benchmarks/host_step.py [--sequences 256] [--prompt 512] [--steps 160]

`decode`: microseconds a decode step of all sequences together (1, 64 and --sequences of them), when each has produced
10 tokens, and 2000: the two must be alike. `plan` and `update` are the scheduler's (engine/scheduler.py); `answer`
makes the deltas of a step and encodes them as a worker does for one router. Means, as the pages that fill up are not
the same number every step.
`offline`: all requests are there from the start, as in `LLM`; `Engine.step` with everything in it, requests that begin
and end included. The executor's own time (it makes one `SampledTokens` a sequence) is not counted. All are CPU times of
the thread.
Writes benchmarks/results/host_step-<commit>.json.
"""

from __future__ import annotations

import argparse
import gc
import os
import platform
import random
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from penstock.common.messages import GenerateRequest, TokenBatch, encode
from penstock.common.sampling import SamplingParams
from penstock.engine.core import Engine
from penstock.engine.outputs import StepOutput
from penstock.engine.pages import PageManager
from penstock.engine.plan import SampledTokens, StepPlan, StepResult
from penstock.engine.policy import THROUGHPUT, BatchPolicy, DecodePolicy
from penstock.engine.replies import to_delta
from penstock.engine.scheduler import Scheduler

ROOT = Path(__file__).resolve().parent.parent
PAGE_SIZE = 16
EOS = 2


class Done:
    """A step that "sampled" the same token for every sequence."""

    def __init__(self, result: StepResult) -> None:
        self._result = result

    def done(self) -> bool:
        return True

    def wait(self) -> None: ...

    def result(self) -> StepResult:
        return self._result


class InstantExecutor:
    """Has every result at once, is asked for it a step late, and notes its own time."""

    run_ahead = 1

    def __init__(self) -> None:
        self.seconds = 0.0
        self.work = 0

    def submit(self, plan: StepPlan) -> Done:
        start = time.thread_time()
        sampled = tuple([SampledTokens(work.key, (7,)) for work in plan.work if work.samples])
        self.work += len(plan.work)
        done = Done(StepResult(plan.step, sampled))
        self.seconds += time.thread_time() - start
        return done

    def close(self) -> None: ...


class Timed:
    """Calls a function and adds up the time."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self.seconds: list[float] = []

    def __call__(self, *args: Any) -> Any:
        start = time.thread_time()
        value = self._function(*args)
        self.seconds.append(time.thread_time() - start)
        return value

    def mean_us(self) -> float:
        """Of the calls since the last time; forgets them."""
        seconds, self.seconds = self.seconds, []
        return round(sum(seconds) / len(seconds) * 1e6, 1)


def make_engine(sequences: int, num_pages: int, policy: BatchPolicy) -> tuple[Engine, InstantExecutor]:
    scheduler = Scheduler(
        PageManager(num_pages, PAGE_SIZE),
        policy,
        max_num_seqs=sequences,
        max_num_batched_tokens=8192,
        max_model_len=num_pages * PAGE_SIZE,
        hash_scope="benchmark",
    )
    executor = InstantExecutor()
    return Engine(scheduler, executor), executor


def make_request(number: int, prompt_len: int, max_tokens: int, chooser: random.Random) -> GenerateRequest:
    return GenerateRequest(
        request_id=f"cmpl-{chooser.getrandbits(128):032x}",
        prompt_token_ids=[chooser.randrange(10, 32000) for _ in range(prompt_len)],
        sampling=SamplingParams(max_tokens=max_tokens, seed=number),
        eos_token_ids=[EOS],
    )


def encode_answer(output: StepOutput) -> bytes:
    """The message that a worker sends for a step whose requests are all of one router."""
    return encode(TokenBatch(deltas=[to_delta(item) for item in output.outputs]))


def measure_decode(sequences: int, prompt: int, steps: int) -> dict[str, Any]:
    """Decode steps of a full batch, early and late in its outputs."""
    chooser = random.Random(1)
    last = 2000 + 2 * steps
    pages = sequences * ((prompt + last) // PAGE_SIZE + 2)
    engine, _ = make_engine(sequences, pages, DecodePolicy())
    for number in range(sequences):
        engine.add(make_request(number, prompt + number % PAGE_SIZE, last, chooser))
    scheduler: Any = engine.scheduler
    plan, update, answer = Timed(scheduler.plan), Timed(scheduler.update), Timed(encode_answer)
    scheduler.plan, scheduler.update = plan, update

    def run_until(tokens: int) -> None:
        while engine.scheduler.running == [] or engine.scheduler.running[-1].num_output < tokens:
            engine.pages.drain_events()
            answer(engine.step())

    figures: dict[str, Any] = {}
    for tokens in (10, 2000):
        run_until(tokens)
        for timed in (plan, update, answer):
            timed.mean_us()
        run_until(tokens + steps)
        figures[f"after_{tokens}_tokens"] = {
            "plan_us": plan.mean_us(),
            "update_us": update.mean_us(),
            "answer_us": answer.mean_us(),
        }
    return figures


def measure_offline(sequences: int, requests: int) -> dict[str, Any]:
    """A throughput run: prompts of 20 to 420 tokens, outputs of 20 to 380."""
    chooser = random.Random(2)
    engine, executor = make_engine(sequences, 40_000, THROUGHPUT)
    sources = [
        make_request(number, chooser.randrange(20, 420), chooser.randrange(20, 380), chooser)
        for number in range(requests)
    ]
    start = time.thread_time()
    for source in sources:
        engine.add(source)
    added_s = time.thread_time() - start
    tokens, mixed = 0, 0
    scheduler = engine.scheduler
    start = time.thread_time()
    while engine.has_work():
        prompt_tokens = scheduler.counters.prompt_tokens
        for output in engine.step().outputs:
            tokens += len(output.token_ids)
        mixed += scheduler.counters.prompt_tokens > prompt_tokens
    seconds = time.thread_time() - start - executor.seconds
    return {
        "sequences": sequences,
        "requests": requests,
        "output_tokens": tokens,
        "steps": engine.steps,
        "steps_with_prompts": mixed,
        "mean_sequences": round(executor.work / engine.steps, 1),
        "add_us_per_request": round(added_s / requests * 1e6, 1),
        "step_us": round(seconds / engine.steps * 1e6, 1),
        "us_per_token": round(seconds / tokens * 1e6, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=int, default=256)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--steps", type=int, default=160, help="to average over; a multiple of 16")
    parser.add_argument("--no-write", action="store_true", help="print only")
    options = parser.parse_args()
    gc.freeze()
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
    result = {
        "commit": commit.strip(),
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "load_before": os.getloadavg(),
        "prompt_tokens": options.prompt,
        "decode": {
            f"{count}_sequences": measure_decode(count, options.prompt, options.steps)
            for count in sorted({1, 64, options.sequences})
        },
        "offline": measure_offline(options.sequences, 4 * options.sequences),
        "load_after": os.getloadavg(),
    }
    text = msgspec.json.format(msgspec.json.encode(result), indent=2).decode()
    print(text)
    if not options.no_write:
        path = ROOT / "benchmarks" / "results" / f"host_step-{result['commit']}.json"
        path.write_text(text + "\n")


if __name__ == "__main__":
    main()
