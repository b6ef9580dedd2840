"""`penstock chat` and `penstock complete`: a running server in the terminal, its answers as they come.

Each line on standard input is a turn. `chat` keeps the conversation; Ctrl-C stops an answer, Ctrl-D ends. With --quick
there is one turn, and the answer is all that goes to standard output.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import io
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from penstock.client_options import ClientParser, api_key, server_url
from penstock.common.logs import ERROR_PREFIX
from penstock.http_client import RequestError, connect

FORGET = "/clear"
_DIM, _PLAIN = "\x1b[2m", "\x1b[0m"


def chat(arguments: Sequence[str]) -> int:
    """Talk; 1 if the server could not be asked, or gave no answer to --quick.

    Raises:
        ConfigError: an option is wrong.
    """
    parser = _parser("chat", "A conversation with a running server.")
    parser.add_argument("--system-prompt", default="", help="what every conversation begins with")
    options = parser.parse(arguments, os.environ)
    start = [{"role": "system", "content": options.system_prompt}] if options.system_prompt else []
    conversation = list(start)

    def turn(text: str) -> str:
        if text == FORGET:
            conversation[:] = start
            return ""
        return _chat_turn(options, conversation, text)

    return _run(options, turn, f"{FORGET} forgets the conversation")


def complete(arguments: Sequence[str]) -> int:
    """Continue texts; 1 if the server could not be asked, or gave no answer to --quick.

    Raises:
        ConfigError: an option is wrong.
    """
    options = _parser("complete", "Continues texts on a running server.").parse(arguments, os.environ)

    def turn(text: str) -> str:
        fields = {"prompt": text} | ({} if options.max_tokens is None else {"max_tokens": options.max_tokens})
        return _answer(options, "/v1/completions", fields, _completion_text)

    return _run(options, turn, "each line is a text to continue")


def _chat_turn(options: argparse.Namespace, conversation: list[dict[str, str]], text: str) -> str:
    """Ask with the conversation so far; it grows by both turns, unless there was no answer."""
    conversation.append({"role": "user", "content": text})
    fields: dict[str, Any] = {"messages": conversation}
    if options.max_tokens is not None:
        fields["max_completion_tokens"] = options.max_tokens
    try:
        said = _answer(options, "/v1/chat/completions", fields, _chat_text)
    except RequestError:
        conversation.pop()
        raise
    conversation.append({"role": "assistant", "content": said})
    return said


def _answer(
    options: argparse.Namespace,
    path: str,
    fields: dict[str, Any],
    text_of: Callable[[dict[str, Any]], tuple[str, bool]],
) -> str:
    """Ask, print what comes as it comes, and return what was said; Ctrl-C ends it early.

    Args:
        text_of: an event's (text, whether it is reasoning); reasoning is shown on a terminal, and not returned.
    """
    said: list[str] = []

    async def ask() -> None:
        async with connect(options.url, api_key=options.api_key, verify=not options.insecure) as client:
            model = options.model_name = options.model_name or (await client.models())[0]
            body = {"model": model, "stream": True, **fields}
            if options.temperature is not None:
                body["temperature"] = options.temperature
            async with contextlib.aclosing(client.stream(path, body)) as events:
                async for event in events:
                    text, is_reasoning = text_of(event)
                    if text and not is_reasoning:
                        said.append(text)
                        print(text, end="", flush=True)
                    elif text and sys.stdout.isatty():
                        print(f"{_DIM}{text}{_PLAIN}", end="", flush=True)

    try:
        asyncio.run(ask())
    except KeyboardInterrupt:
        if options.quick is not None:
            raise
    finally:
        if said:
            print(flush=True)
    return "".join(said)


def _run(options: argparse.Namespace, turn: Callable[[str], str], hint: str) -> int:
    if options.quick is not None:
        try:
            turn(options.quick)
        except RequestError as error:
            return _say(error)
        return 0
    if sys.stdin is not None and sys.stdin.isatty():
        print(f"{options.url}: {hint}, Ctrl-D ends", file=sys.stderr)
    status = 0
    for text in _lines():
        try:
            turn(text)
            status = 0
        except RequestError as error:
            status = _say(error)
    return status


def _say(error: RequestError) -> int:
    print(f"{ERROR_PREFIX}{error}", file=sys.stderr)
    return 1


def _lines() -> Iterator[str]:
    """What is typed, line by line, without empty ones; with history and editing keys on a terminal.

    Bytes that are no text in UTF-8 become U+FFFD.
    """
    if sys.stdin is None:  # closed: `<&-`
        return
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")
    prompt = "> " if sys.stdin.isatty() else ""
    if prompt:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401
    while True:
        try:
            text = input(prompt).encode(errors="surrogateescape").decode(errors="replace").strip()
        except EOFError:
            return
        except KeyboardInterrupt:
            print()
            return
        if text:
            yield text


def _parser(name: str, description: str) -> ClientParser:
    parser = ClientParser(f"penstock {name}", description)
    parser.add_argument(
        "--url", type=server_url, default="http://localhost:8000/v1", help="the server, with or without /v1"
    )
    parser.add_argument("--model-name", "--model", default="", help="default: the first that the server has")
    parser.add_argument("--api-key", default=api_key(os.environ), help="default: $OPENAI_API_KEY")
    parser.add_argument("-q", "--quick", metavar="TEXT", help="one turn with this text, and leave")
    parser.add_argument("--max-tokens", type=int, help="most tokens of an answer; default: the server's")
    parser.add_argument("--temperature", type=float, help="default: the server's")
    parser.add_argument("--insecure", action="store_true", help="do not check the server's certificate")
    return parser


def _chat_text(event: dict[str, Any]) -> tuple[str, bool]:
    delta = (event.get("choices") or [{}])[0].get("delta") or {}
    reasoning = delta.get("reasoning_content") or delta.get("reasoning") or ""
    return (delta["content"], False) if delta.get("content") else (reasoning, True)


def _completion_text(event: dict[str, Any]) -> tuple[str, bool]:
    return (event.get("choices") or [{}])[0].get("text") or "", False
