"""`penstock run-batch`: answers the requests of an OpenAI batch file, by a fleet of its own or by a running server.

A line of the input is {"custom_id", "method", "url", "body"}; a line of the output {"id", "custom_id", "response":
{"status_code", "request_id", "body"}, "error"}, in the input's order. Every line gets an answer: one that cannot be
sent gets an error of its own, and the others go on. A fleet of its own has no limits on who waits, and how long; what
a server has no room for (429, 503) is tried again after its Retry-After.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import stat
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections import deque
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from http.client import HTTPException
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import Any

from tqdm import tqdm

from penstock.client_options import api_key, number, server_url
from penstock.common.errors import ConfigError
from penstock.http_client import Client, Reply, RequestError, connect

URLS = ("/v1/chat/completions", "/v1/completions", "/v1/responses")
MAX_OPEN = 1024  # requests that are open at a time
NO_ROOM = (429, 503)
ANSWERED_S = 30.0  # a running server says that it is there
RETRY_TIMEOUT_S = 600.0
DOUBLINGS = 4  # of a second, before tries of a line that is refused again and again


@dataclass(frozen=True)
class Line:
    """One line of the input: what to send, or what is wrong with it."""

    custom_id: str | None
    url: str
    body: dict[str, Any]
    error: str = ""


class Retries:
    """Which answers stand, and when a line that the server had no room for is tried again.

    A busy server serves lines one after another, and each may wait for all before it. So what is bounded is not the
    time of a line, but how long a server goes without room for any.
    """

    def __init__(self, timeout_s: float, now: float) -> None:
        self._timeout_s = timeout_s
        self._served_at = now  # when there last was room

    def wait_s(self, reply: Reply, tries: int, now: float, date: float) -> float | None:
        """Seconds until the next try; None: `reply` stands.

        Args:
            tries: how often the line has been tried again.
            now: monotonic seconds.
            date: seconds since the epoch, in which a server may say when.
        """
        if reply.status not in NO_ROOM:
            self._served_at = now
            return None
        if reply.headers.get("x-should-retry") == "false":
            return None
        # The doubling is for servers that name no time, or always their shortest, to a thousand lines at once.
        wait_s = max(_told_s(reply.headers.get("retry-after", ""), date), 2.0 ** min(tries, DOUBLINGS))
        return wait_s if now + wait_s <= self._served_at + self._timeout_s else None


def _told_s(retry_after: str, date: float) -> float:
    """What a Retry-After asks for, in seconds or as a date; 0 if it is neither."""
    try:
        wait_s = float(retry_after)
    except ValueError:
        try:
            wait_s = parsedate_to_datetime(retry_after).timestamp() - date
        except (ValueError, OverflowError):
            return 0.0
    return wait_s if wait_s > 0 else 0.0  # no number is not above 0, either


def read_lines(text: str) -> list[Line]:
    """The lines of a batch file that are not blank."""
    # Not `splitlines`: JSON's texts may hold what else ends a line for it, such as U+2028.
    return [_line(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]


def _line(number: int, text: str) -> Line:
    def wrong(reason: str, custom_id: str | None = None) -> Line:
        return Line(custom_id, "", {}, f"line {number}: {reason}")

    try:
        found = json.loads(text)
    except ValueError as error:
        return wrong(f"no JSON: {error}")
    except RecursionError:
        return wrong("nested too deeply")
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
        "--base-url",
        type=server_url,
        help="a running server; without it, a fleet is started: MODEL and serve's options, of which those that limit "
        "how many requests wait, and how long, do not hold",
    )
    parser.add_argument("--api-key", default=api_key(os.environ), help="of the running server")
    parser.add_argument(
        "--retry-timeout-s",
        type=number(),
        default=RETRY_TIMEOUT_S,
        metavar="X",
        help="lines that the server has no room for (429 and 503) are tried again after its Retry-After, until it has "
        "had no room for any line for this long (default: %(default)g); 0: never. Other errors are the line's answer",
    )
    parser.add_argument("--disable-tqdm", action="store_true")
    options, rest = parser.parse_known_args(arguments)
    try:
        lines = read_lines(options.input_file.read_bytes().decode())
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--input-file {options.input_file} cannot be read: {error}") from None
    if options.base_url and rest:
        raise ConfigError(f"unexpected argument {rest[0]!r}: with --base-url no fleet is started")
    key = options.api_key if options.base_url else ""
    with OutputFile(options.output_file, options.input_file) as out, _server(options, rest) as url:
        out.begin()
        failed = asyncio.run(_answer(lines, url, key, out, options))
    print(f"{len(lines)} requests, {failed} without an answer: {options.output_file}", file=sys.stderr)
    return 1 if failed else 0


class OutputFile:
    """The output file. It is opened at once, to know that it can be written; what is in it stays until `begin`.

    Raises:
        ConfigError: (constructor, `begin`, `write`) it cannot be written, or is the input.
    """

    def __init__(self, path: Path, source: Path) -> None:
        self._path = path
        with self._in_words():
            if path.is_file() and path.samefile(source):
                raise ConfigError(f"--output-file {path} is the input file: it would be overwritten")
            path.parent.mkdir(parents=True, exist_ok=True)
            # Half a surrogate pair is legal in JSON, as an escape only: backslashreplace writes that very escape.
            self._file = path.open("a", encoding="utf-8", errors="backslashreplace")

    def __enter__(self) -> OutputFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            with self._in_words():
                self._file.close()
        except ConfigError:
            if error is None:  # else what could not be written before cannot be written now
                raise

    def begin(self) -> None:
        """Empty it, if it is a file and no terminal or pipe."""
        with self._in_words():
            if stat.S_ISREG(os.fstat(self._file.fileno()).st_mode):
                self._file.truncate(0)

    def write(self, answer: str) -> None:
        """Add a line, to be seen at once."""
        with self._in_words():
            self._file.write(answer + "\n")
            self._file.flush()

    @contextmanager
    def _in_words(self) -> Iterator[None]:
        try:
            yield
        except BrokenPipeError:
            raise  # who read it has left
        except OSError as error:
            raise ConfigError(f"--output-file {self._path} cannot be written: {error}") from None


@contextmanager
def _server(options: argparse.Namespace, rest: Sequence[str]) -> Iterator[str]:
    """The URL of the running server, or of a fleet that lives as long as the block."""
    if options.base_url:
        try:
            with urllib.request.urlopen(f"{options.base_url}/health", timeout=ANSWERED_S):
                pass
        except urllib.error.HTTPError:
            pass  # somebody answers
        except (OSError, HTTPException) as error:
            raise ConfigError(f"no server answers at {options.base_url}: {error}") from None
        yield options.base_url
        return
    from penstock.common import logs
    from penstock.common.config import ServeConfig
    from penstock.common.config_loader import load_config
    from penstock.fleet import WITHOUT_LIMITS, Fleet

    fixed = {"port": 0, "api_key": (), "api_key_weights": (), "slo_ttft": 0.0, "slo_tpot": 0.0, **WITHOUT_LIMITS}
    config = load_config(ServeConfig, rest, os.environ, prog="penstock run-batch", fixed=fixed)
    logs.setup("run-batch", config.log_level)
    with Fleet(config) as fleet:
        yield fleet.url


async def _answer(lines: Sequence[Line], url: str, key: str, out: OutputFile, options: argparse.Namespace) -> int:
    """Write an answer a line, in order, as far as they are there; how many are not of status 200."""
    failed = 0
    retries = Retries(options.retry_timeout_s, time.monotonic())
    with tqdm(total=len(lines), desc="Requests", disable=True if options.disable_tqdm else None) as bar:
        async with connect(url, api_key=key) as client:
            async for answer, good in _in_order(client, lines, retries):
                out.write(answer)
                failed += not good
                bar.update()
    return failed


async def _in_order(client: Client, lines: Iterable[Line], retries: Retries) -> AsyncIterator[tuple[str, bool]]:
    """Answers in the lines' order, up to MAX_OPEN requests ahead of the one that is waited for."""
    waiting: deque[asyncio.Task[tuple[str, bool]]] = deque()
    for line in lines:
        waiting.append(asyncio.create_task(_send(client, line, retries)))
        if len(waiting) == MAX_OPEN:
            yield await waiting.popleft()
    while waiting:
        yield await waiting.popleft()


async def _send(client: Client, line: Line, retries: Retries) -> tuple[str, bool]:
    """(the output's line, whether it has a response of status 200)."""
    unique = uuid.uuid4().hex

    def answer(response: Mapping[str, Any] | None, error: Mapping[str, str] | None) -> str:
        whole = {"id": f"batch_req_{unique}", "custom_id": line.custom_id, "response": response, "error": error}
        return json.dumps(whole, ensure_ascii=False)

    def wrong(code: str, message: str) -> tuple[str, bool]:
        return answer(None, {"code": code, "message": message}), False

    if line.error:
        return wrong("invalid_request", line.error)
    try:
        status, _, text = await _ask(client, line, unique, retries)
        try:
            body = json.loads(text)
        except ValueError as error:
            return wrong("invalid_response", f"status {status}, and no JSON: {error}")
        return answer({"status_code": status, "request_id": unique, "body": body}, None), status == 200
    except RequestError as error:
        return wrong("connection_error", str(error))
    except RecursionError as error:  # of the line's body, or of the answer's
        return wrong("nested_too_deeply", str(error))


async def _ask(client: Client, line: Line, request_id: str, retries: Retries) -> Reply:
    """The answer that stands, after as many tries as it takes. Raises RequestError."""
    for tries in count():
        reply = await client.post(line.url, line.body, request_id)
        wait_s = retries.wait_s(reply, tries, time.monotonic(), time.time())
        if wait_s is None:
            break
        await asyncio.sleep(wait_s)
    return reply
