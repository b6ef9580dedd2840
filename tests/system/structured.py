"""Random schemas against real fleets: one worker, a hand-off, and a decode worker that is killed in the middle.

A schema that is not supported is a 400 that names the keyword; of the other outputs all that finished follow their
schema, and all are the same in every fleet. `python -m tests.system.structured --schemas 500` records a run.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import signal
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openai import AsyncOpenAI, BadRequestError

from benchmarks.record import RESULTS, commit, file_name, machine
from penstock.fleet import Fleet
from tests.schemas import random_schema, validate
from tests.system.fleets import SHORT_LEASE_S, fleet, open_client, wait_restarted

KEYWORDS = re.compile("not|uniqueItems|contains|propertyNames|dependentRequired|if|unevaluated|minProperties")
MAX_TOKENS = 120
FLEETS: dict[str, dict[str, Any]] = {
    "one worker": {"decode_workers": 1},
    "hand-off": {"prefill_workers": 1, "decode_workers": 1, "routing_policy": "round-robin"},
    "a decode worker killed": {"prefill_workers": 1, "decode_workers": 2},
}


@dataclass(frozen=True)
class Answer:
    """What became of one request."""

    finish: str  # "refused", or the reason
    text: str = ""
    ids: tuple[int, ...] = ()


def schema_of(number: int) -> tuple[dict[str, Any], bool]:
    """(a schema, whether a keyword in it is not supported): every fifth."""
    unsupported = number % 5 == 4
    return random_schema(random.Random(number), unsupported=unsupported, depth=2), unsupported


async def ask(client: AsyncOpenAI, number: int) -> Answer:
    """One completion, half of them streamed; by either field."""
    schema, _ = schema_of(number)
    extra: dict[str, Any] = {"return_token_ids": True, "structured_outputs": {"json": schema}}
    if number % 3 == 0:
        extra["structured_outputs"]["disable_any_whitespace"] = True
    if number % 3 == 1:
        json_schema = {"name": "answer", "schema": schema}
        extra = {"return_token_ids": True, "response_format": {"type": "json_schema", "json_schema": json_schema}}
    rng = random.Random(number)
    prompt = [rng.randrange(5, 300) for _ in range(rng.randrange(1, 60))]
    values: dict[str, Any] = {"model": "tiny", "prompt": prompt, "max_tokens": MAX_TOKENS, "seed": number}
    try:
        if number % 2:
            choice = (await client.completions.create(**values, extra_body=extra)).choices[0]
            return Answer(choice.finish_reason, choice.text, tuple(choice.token_ids))  # type: ignore[attr-defined]
        text, ids, finish = "", [], ""
        async for chunk in await client.completions.create(**values, extra_body=extra, stream=True):
            text += chunk.choices[0].text
            ids += chunk.choices[0].token_ids
            finish = chunk.choices[0].finish_reason or finish
        return Answer(finish, text, tuple(ids))
    except BadRequestError as error:
        return Answer("refused", str(error.message))


async def ask_all(running: Fleet, count: int, kill: bool, concurrency: int = 12) -> list[Answer]:
    """All of them; with `kill`, a decode worker dies after a third of the answers."""
    slots, answered = asyncio.Semaphore(concurrency), 0
    async with open_client(running.url, 300) as client:

        async def one(number: int) -> Answer:
            nonlocal answered, kill
            async with slots:
                answer = await ask(client, number)
            answered += 1
            if kill and answered >= count // 3:
                kill = False
                os.kill(running.group.pids()["decode-0"], signal.SIGKILL)
            return answer

        return list(await asyncio.gather(*(one(number) for number in range(count))))


def check(answers: list[Answer]) -> dict[str, int]:
    """How many ended how. Raises for a wrong refusal, or an output that does not follow its schema."""
    counts: dict[str, int] = {}
    for number, answer in enumerate(answers):
        schema, unsupported = schema_of(number)
        assert (answer.finish == "refused") == unsupported, (number, schema, answer)
        if unsupported:
            assert KEYWORDS.search(answer.text), answer
        elif answer.finish == "stop":
            validate(schema, answer.text)
        else:
            assert answer.finish == "length" and len(answer.ids) == MAX_TOKENS, (number, schema, answer)
        counts[answer.finish] = counts.get(answer.finish, 0) + 1
    return counts


def run(model: Path, name: str, count: int) -> list[Answer]:
    """The answers of one fleet, which is idle afterwards."""
    kill = "killed" in name
    options = {"cpu_threads": 1, "lease_s": SHORT_LEASE_S, "kv_cache_memory_bytes": 8 << 20, "max_model_len": 512}
    with fleet(model, **options, **FLEETS[name]) as running:
        pid = running.group.pids()["decode-0"]
        answers = asyncio.run(ask_all(running, count, kill))
        if kill:
            wait_restarted(running, "decode-0", pid)
    return answers


def main() -> None:
    """Run all fleets and record what came out."""
    from tests.tiny_models import make_checkpoint

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--schemas", type=int, default=500)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    record: dict[str, Any] = {"commit": commit(), "machine": machine(), "schemas": options.schemas, "fleets": {}}
    with tempfile.TemporaryDirectory() as folder:
        model = make_checkpoint("llama", Path(folder))
        expected: list[Answer] = []
        for name in FLEETS:
            began = time.monotonic()
            answers = run(model, name, options.schemas)
            counts = check(answers)
            expected = expected or answers
            assert answers == expected, "another fleet, other outputs"
            tokens = sum(len(answer.ids) for answer in answers)
            seconds = round(time.monotonic() - began, 1)
            record["fleets"][name] = {"ended": counts, "tokens": tokens, "seconds": seconds}
            print(name, counts, f"{tokens} tokens in {seconds} s")
    out = options.out or RESULTS / file_name("structured_schemas", record["commit"])
    out.write_text(json.dumps(record, indent=1) + "\n")
    print(f"recorded in {out}")


if __name__ == "__main__":
    main()
