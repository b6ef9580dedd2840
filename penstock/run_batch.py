"""`penstock run-batch`: answers the requests of an OpenAI batch file, by a fleet of its own or by a running server.

A line of the input is {"custom_id", "method", "url", "body"}; a line of the output {"id", "custom_id", "response":
{"status_code", "request_id", "body"}, "error"}, in the input's order. Every line gets an answer: one that cannot be
sent gets an error of its own, and the others go on.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import uuid
from collections import deque
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from penstock.client_options import api_key
from penstock.common.errors import ConfigError
from penstock.http_client import Client, RequestError, connect

URLS = ("/v1/chat/completions", "/v1/completions", "/v1/responses")
MAX_OPEN = 1024  # requests that are open at a time


@dataclass(frozen=True)
class Line:
    """One line of the input: what to send, or what is wrong with it."""

    custom_id: str | None
    url: str
    body: dict[str, Any]
    error: str = ""


def read_lines(text: str) -> list[Line]:
    """The lines of a batch file that are not blank."""
    return [_line(number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip()]


def _line(number: int, text: str) -> Line:
    def wrong(reason: str, custom_id: str | None = None) -> Line:
        return Line(custom_id, "", {}, f"line {number}: {reason}")

    try:
        found = json.loads(text)
    except ValueError as error:
        return wrong(f"no JSON: {error}")
    if not isinstance(found, dict) or not isinstance(found.get("custom_id"), str):
        return wrong("an object with custom_id, a text, is expected")
    custom_id, body = found["custom_id"], found.get("body")
    if found.get("method") != "POST":
        return wrong(f"method must be POST, got {found.get('method')!r}", custom_id)
    if found.get("url") not in URLS:
        return wrong(f"url must be one of {', '.join(URLS)}, got {found.get('url')!r}", custom_id)
    if not isinstance(body, dict):
        return wrong("body must be an object", custom_id)
    if body.get("stream"):
        return wrong("body.stream must not be set: the answer is one line", custom_id)
    return Line(custom_id, found["url"], body)


def main(arguments: Sequence[str]) -> int:
    """Answer a file; 1 if a line got no answer of status 200.

    Raises:
        ConfigError: an option is wrong, a file cannot be read or written, no server is there.
    """
    parser = argparse.ArgumentParser(prog="penstock run-batch", description=__doc__, allow_abbrev=False)
    parser.add_argument("-i", "--input-file", required=True, type=Path)
    parser.add_argument("-o", "--output-file", required=True, type=Path)
    parser.add_argument(
        "--base-url", help="a running server; without it, a fleet is started: MODEL and serve's options"
    )
    parser.add_argument("--api-key", default=api_key(os.environ), help="of the running server")
    parser.add_argument("--disable-tqdm", action="store_true")
    options, rest = parser.parse_known_args(arguments)
    try:
        lines = read_lines(options.input_file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--input-file {options.input_file} cannot be read: {error}") from None
    if options.base_url and rest:
        raise ConfigError(f"unexpected argument {rest[0]!r}: with --base-url no fleet is started")
    key = options.api_key if options.base_url else ""
    with _open(options.output_file) as out, _server(options, rest) as url:
        failed = asyncio.run(_answer(lines, url, key, out, options.disable_tqdm))
    print(f"{len(lines)} requests, {failed} without an answer: {options.output_file}", file=sys.stderr)
    return 1 if failed else 0


def _open(path: Path) -> Any:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return path.open("w", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--output-file {path} cannot be written: {error}") from None


@contextmanager
def _server(options: argparse.Namespace, rest: Sequence[str]) -> Iterator[str]:
    """The URL of the running server, or of a fleet that lives as long as the block."""
    if options.base_url:
        yield options.base_url
        return
    from penstock.common import logs
    from penstock.common.config import ServeConfig
    from penstock.common.config_loader import load_config
    from penstock.fleet import Fleet

    config = load_config(ServeConfig, rest, os.environ, prog="penstock run-batch", fixed={"port": 0, "api_key": ()})
    logs.setup("run-batch", config.log_level)
    with Fleet(config) as fleet:
        yield fleet.url


async def _answer(lines: Sequence[Line], url: str, key: str, out: Any, quiet: bool) -> int:
    """Write an answer a line, in order, as far as they are there; how many are not of status 200."""
    failed = 0
    with tqdm(total=len(lines), desc="Requests", disable=True if quiet else None) as bar:
        async with connect(url, api_key=key) as client:
            async for answer in _in_order(client, lines):
                out.write(json.dumps(answer, ensure_ascii=False) + "\n")
                out.flush()
                failed += answer["error"] is not None or answer["response"]["status_code"] != 200
                bar.update()
    return failed


async def _in_order(client: Client, lines: Iterable[Line]) -> AsyncIterator[dict[str, Any]]:
    """Answers in the lines' order, up to MAX_OPEN requests ahead of the one that is waited for."""
    waiting: deque[asyncio.Task[dict[str, Any]]] = deque()
    for line in lines:
        waiting.append(asyncio.create_task(_send(client, line)))
        if len(waiting) == MAX_OPEN:
            yield await waiting.popleft()
    while waiting:
        yield await waiting.popleft()


async def _send(client: Client, line: Line) -> dict[str, Any]:
    unique = uuid.uuid4().hex
    answer: dict[str, Any] = {"id": f"batch_req_{unique}", "custom_id": line.custom_id, "response": None, "error": None}
    if line.error:
        return answer | {"error": {"code": "invalid_request", "message": line.error}}
    try:
        status, body = await client.post(line.url, line.body, unique)
    except RequestError as error:
        return answer | {"error": {"code": "connection_error", "message": str(error)}}
    return answer | {"response": {"status_code": status, "request_id": unique, "body": body}}
