"""What a response in the background costs Redis, and how soon who follows it at another router has its tokens.

    python benchmarks/responses.py [--tokens 1000] [--followers 50]

Two routers and a Redis, all real; a scripted worker says a token every 20 ms. `bytes_a_token`: what reaches Redis while
a response is made that nobody follows, one of a quarter of the tokens and one of all.
`idle_commands_a_second`: of Redis, while so many follow a response that says nothing, less those without followers.
`later_ms`: how much later than at the router that makes it an event is at a follower of the other one. Records
benchmarks/results/responses-COMMIT.json.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from anywhere, installed or not

import redis

from benchmarks import record
from tests.conftest import RedisServer
from tests.router.fake_router import Router, ids_of, running, say

STEP_S = 0.02
IDLE_S = 10.0


def paced(router: Router, tokens: int) -> None:
    """Have the router's worker say so many tokens, one a step."""
    service = router.service
    service.model_info = lambda: SimpleNamespace(max_model_len=1 << 20, vocab_size=404, eos_token_ids=[2])  # type: ignore[method-assign]

    async def play(request: Any, sink: Any) -> None:
        for item in say("a" * tokens)(request):
            await asyncio.sleep(STEP_S)
            if (request.request_id, request.choice) in service.cancelled:
                return
            sink.on_delta(item)

    service._play = play  # type: ignore[method-assign]


def create(router: Router, **fields: Any) -> Any:
    body = {"model": "tiny", "input": "Hello?", "background": True, "max_output_tokens": 1 << 16, **fields}
    return router.openai.responses.create(**body)


def bytes_a_token(router: Router, client: redis.Redis, tokens: int, stream: bool) -> float:
    paced(router, tokens)
    before = client.info("stats")["total_net_input_bytes"]
    made = create(router, stream=stream)
    response_id = made.id if not stream else next(made).response.id
    while router.openai.responses.retrieve(response_id).status != "completed":  # asks the router's own memory
        time.sleep(0.2)
    return round((client.info("stats")["total_net_input_bytes"] - before) / tokens, 1)


def idle_commands(here: Router, there: Router, client: redis.Redis, followers: int) -> float:
    """Commands a second, of so many."""
    vars(here.service).pop("_play", None)
    here.service.pause_after = 1
    response_id = next(create(here, stream=True)).response.id
    with contextlib.ExitStack() as stack:
        path, follows = f"/v1/responses/{response_id}", {"stream": "true"}
        streams = [
            stack.enter_context(there.http.stream("GET", path, params=follows)).iter_raw() for _ in range(followers)
        ]
        for stream in streams:
            next(stream)
        before = client.info("stats")["total_commands_processed"]
        time.sleep(IDLE_S)
        commands = client.info("stats")["total_commands_processed"] - before
    here.openai.responses.cancel(response_id)
    return float(commands / IDLE_S)


def later_ms(here: Router, there: Router, tokens: int) -> dict[str, float]:
    paced(here, tokens)
    arrived: dict[str, dict[int, float]] = {"here": {}, "there": {}}

    def follow(name: str, router: Router, response_id: str) -> None:
        with router.openai.responses.retrieve(response_id, stream=True) as stream:
            for event in stream:
                arrived[name][event.sequence_number] = time.monotonic()

    response_id = next(create(here, stream=True)).response.id
    threads = [
        threading.Thread(target=follow, args=(name, router, response_id))
        for name, router in (("here", here), ("there", there))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert arrived["here"].keys() == arrived["there"].keys(), "all events are at both"
    late = sorted(1000 * (at - arrived["here"][number]) for number, at in arrived["there"].items())
    return {"p50": round(statistics.median(late), 1), "p99": round(late[len(late) * 99 // 100], 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1000)
    parser.add_argument("--followers", type=int, default=50)
    options = parser.parse_args()
    assert len(ids_of("a" * 9)) == 9, "a letter is a token"
    found: dict[str, Any] = {"tokens": options.tokens, "followers": options.followers}
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        server = RedisServer(Path(folder))
        server.start()
        stack.callback(server.stop)
        here, there = (stack.enter_context(running(redis_url=server.url)) for _ in range(2))
        client = stack.enter_context(contextlib.closing(server.client()))
        found["bytes_a_token"] = {
            f"{kind}_{tokens}": bytes_a_token(here, client, tokens, kind == "streamed")
            for kind in ("polled", "streamed")
            for tokens in (options.tokens // 4, options.tokens)
        }
        found["later_ms"] = later_ms(here, there, options.tokens // 2)
        idle = [idle_commands(here, there, client, followers) for followers in (0, options.followers)]
        found["idle_commands_a_second"] = round(idle[1] - idle[0], 1)
    print(json.dumps(found, indent=1))
    commit = record.commit()
    path = record.RESULTS / record.file_name("responses", commit)
    path.write_text(json.dumps({"commit": commit, "machine": record.machine(), **found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
