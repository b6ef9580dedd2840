"""An OpenAI-compatible server, as its clients see it: one answer, or a stream of events.

`penstock bench serve`, `run-batch`, `chat` and `complete` ask through it. What goes wrong is a `RequestError` in words;
nothing of aiohttp is seen outside.
"""

from __future__ import annotations

import json
import os
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from typing import Any, NamedTuple

import aiohttp

CONNECT_TIMEOUT_S = 30.0


class RequestError(Exception):
    """No usable answer; the text says why. `status` is the server's, 0 if it said nothing."""

    def __init__(self, message: str, status: int = 0) -> None:
        super().__init__(message)
        self.status = status


class Reply(NamedTuple):
    """The whole answer to one request."""

    status: int
    headers: Mapping[str, str]  # names in any case
    text: str


class Client:
    """An open session with one server; see `connect`."""

    def __init__(self, session: aiohttp.ClientSession, base_url: str) -> None:
        self._session = session
        self.base_url = base_url

    async def models(self) -> list[str]:
        """Names of the models it serves, at least one.

        Raises:
            RequestError: it is not there, refuses, or names none.
        """
        with _in_words():
            async with self._session.get(f"{self.base_url}/v1/models") as response:
                if response.status != 200:
                    raise await _refusal(response)
                found = await response.json(content_type=None)
        try:
            names = [str(card["id"]) for card in found["data"]]
        except (KeyError, TypeError):
            names = []
        if not names:
            raise RequestError(f"{self.base_url}/v1/models names no model")
        return names

    async def post(self, path: str, body: Any, request_id: str = "") -> Reply:
        """The answer, whatever its status is.

        Raises:
            RequestError: there was none.
        """
        with _in_words():
            async with self._session.post(self.base_url + path, json=body, headers=_named(request_id)) as response:
                return Reply(response.status, response.headers, await response.text())

    async def stream(self, path: str, body: Any, request_id: str = "") -> AsyncGenerator[dict[str, Any], None]:
        """Payloads of the server-sent events, each as soon as it is complete, without the closing [DONE].

        Raises:
            RequestError: the server refused, broke off, or sent an error.
        """
        with _in_words():
            async with self._session.post(self.base_url + path, json=body, headers=_named(request_id)) as response:
                if response.status != 200:
                    raise await _refusal(response)
                rest = b""
                async for piece in response.content.iter_any():
                    *whole, rest = (rest + piece).replace(b"\r\n", b"\n").split(b"\n\n")
                    for event in whole:
                        lines = [line[5:].strip() for line in event.split(b"\n") if line.startswith(b"data:")]
                        data = b"\n".join(lines)
                        if data and data != b"[DONE]":
                            payload = json.loads(data)
                            if "error" in payload:
                                raise RequestError(_message(data.decode(errors="replace")))
                            yield payload


@asynccontextmanager
async def connect(
    base_url: str, *, api_key: str = "", headers: Mapping[str, str] | None = None, verify: bool = True
) -> AsyncIterator[Client]:
    """A client of the server at `base_url`, with or without /v1, for as many requests at a time as anyone wants."""
    whole = dict(headers or {}) | ({"Authorization": f"Bearer {api_key}"} if api_key else {})
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT_S)
    connector = aiohttp.TCPConnector(limit=0, ssl=verify)
    async with aiohttp.ClientSession(headers=whole, timeout=timeout, connector=connector) as session:
        yield Client(session, base_url.rstrip("/").removesuffix("/v1"))


@contextmanager
def _in_words() -> Iterator[None]:
    try:
        yield
    except aiohttp.ClientConnectorError as error:
        number = error.os_error.errno or 0  # below 0: of name resolution, which has words of its own
        reason = os.strerror(number) if number > 0 else error.os_error.strerror or error
        raise RequestError(f"cannot connect to {error.host} port {error.port}: {reason}") from error
    except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
        raise RequestError(f"{type(error).__name__}: {error}") from error


def _named(request_id: str) -> dict[str, str] | None:
    return {"X-Request-Id": request_id} if request_id else None


async def _refusal(response: aiohttp.ClientResponse) -> RequestError:
    text = _message(await response.text())
    return RequestError(f"{response.status} {response.reason}: {text}", response.status)


def _message(body: str) -> str:
    """What an error body says: OpenAI's form, else its beginning."""
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return body[:200]
