"""`python -m penstock.demo`: the whole path in a minute, on any machine, without network.

Starts Redis, a prefill worker, a decode worker and a router on the embedded model, asks for a completion and a streamed
chat with the official `openai` client, and shows the answers, the processes and where each request's milliseconds went.
Exit status: 0; 1 if no KV bytes moved or the fleet did not start; 2 if the `openai` package is missing.
"""

from __future__ import annotations

import shutil
import signal
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, NoReturn, cast

from penstock.common import logs
from penstock.common.config import ServeConfig
from penstock.common.errors import ConfigError
from penstock.demo_model import CHECKPOINT
from penstock.fleet import Fleet
from penstock.process_group import LaunchError
from penstock.waterfall import in_words, moved_bytes, waterfall

if TYPE_CHECKING:
    from openai import OpenAI
    from openai.types.chat import ChatCompletionMessageParam

MODEL = "penstock-demo"
PROMPT = (
    "A river does work whether anyone asks it to or not. It carries gravel from the hills to the plain, it cuts its "
    "banks in spring and mends them with mud in summer, and it turns every loose thing that falls into it. A mill is"
)
CHAT = (
    ("system", "You are the keeper of a mill."),
    ("user", "What is a penstock?"),
    (
        "assistant",
        "A penstock is the pipe that carries water from a reservoir to a turbine. It is closed at the top by a gate, "
        "and it is full from end to end when it works.",
    ),
    ("user", "Why is a wide pipe better than a narrow one?"),
)
ROLES = {
    "router": "speaks the OpenAI API",
    "prefill": "computes prompts",
    "decode": "generates",
    "redis": "who is alive",
}
TIMELINE = {"X-Penstock-Timeline": "1"}

Timeline = list[dict[str, Any]]


def main() -> int:
    """Run the demo and return its exit status."""
    if find_spec("openai") is None:
        print(
            "The demo speaks to the server with the `openai` package: pip install 'penstock[worker,demo]'",
            file=sys.stderr,
        )
        return 2
    signal.signal(signal.SIGTERM, _leave)
    logs.setup("demo", "warning")
    config = ServeConfig(
        model=str(CHECKPOINT),
        served_model_name=(MODEL,),
        port=0,
        prefill_workers=1,
        decode_workers=1,
        routing_policy="round-robin",  # each prompt is handed off, also where the cost policy would compute it in place
        log_level="warning",
    )
    _title("A fleet on the embedded model")
    try:
        with Fleet(config) as fleet:
            _show_processes(fleet)
            return _converse(fleet.url)
    except (ConfigError, LaunchError) as error:
        print(f"The demo's fleet did not start: {error}", file=sys.stderr)
        return 1


def _converse(url: str) -> int:
    from openai import DefaultHttpxClient, OpenAI

    # trust_env: a proxy that the environment names is not on the way to this machine's own port.
    with OpenAI(base_url=f"{url}/v1", api_key="none", http_client=DefaultHttpxClient(trust_env=False)) as client:
        moved = [_completion(client), _chat(client)]
    if not all(moved):
        print("\nNo KV bytes moved: the prefill worker's pages did not reach the decode worker.", file=sys.stderr)
        return 1
    print(
        f"\n{in_words(sum(moved))} of KV pages went from the prefill worker to the decode worker. That was all of it."
    )
    return 0


def _completion(client: OpenAI) -> int:
    _title("A completion")
    answer = client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=59, temperature=0, extra_headers=TIMELINE)
    print(f"{PROMPT} ...{answer.choices[0].text}")
    return _show_timeline((answer.model_extra or {}).get("timeline", []))


def _chat(client: OpenAI) -> int:
    _title("A streamed chat")
    for role, content in CHAT:
        print(f"{role:<11}{content}")
    print("assistant  ", end="", flush=True)
    stream = client.chat.completions.create(
        model=MODEL,
        messages=cast("list[ChatCompletionMessageParam]", [{"role": role, "content": text} for role, text in CHAT]),
        max_tokens=96,
        temperature=0,
        stream=True,
        extra_headers=TIMELINE,
    )
    timeline: Timeline = []
    for chunk in stream:
        timeline = (chunk.model_extra or {}).get("timeline", timeline)
        print("".join(choice.delta.content or "" for choice in chunk.choices), end="", flush=True)
    print()
    return _show_timeline(timeline)


def _show_processes(fleet: Fleet) -> None:
    print(f"{fleet.url}/v1")
    for name, pid in sorted(fleet.group.pids().items()):
        print(f"  {name:<10} pid {pid:<8} {ROLES.get(name.partition('-')[0], '')}")


def _show_timeline(timeline: Sequence[dict[str, Any]]) -> int:
    """Draws it and returns the KV bytes that moved."""
    width = max(16, min(56, shutil.get_terminal_size((100, 24)).columns - 56))
    print()
    for line in waterfall(timeline, width):
        print(f"  {line}")
    return moved_bytes(timeline)


def _title(text: str) -> None:
    print(f"\n{text}\n{'-' * len(text)}", flush=True)


def _leave(number: int, frame: object) -> NoReturn:
    """SIGTERM unwinds the stack, so that the fleet is stopped."""
    raise SystemExit(128 + number)


if __name__ == "__main__":
    sys.exit(main())
