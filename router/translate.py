"""Other APIs' bodies as chat requests: the one way to a prompt is chat's. Used by anthropic/ and responses/."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

import msgspec

from penstock.common.errors import BadRequest, PenstockError
from penstock.router.protocol import ChatRequest, decode_request

_decoder = msgspec.json.Decoder(ChatRequest)


def chat_request(fields: Mapping[str, Any], names: Mapping[str, str]) -> ChatRequest:
    """The checked request of a chat with `fields`; None is absent. What is wrong is said in the client's `names`.

    Raises:
        BadRequest: as for the same body sent to /v1/chat/completions.
    """
    given = {name: value for name, value in fields.items() if value is not None}
    with in_words_of(names):
        try:
            body = msgspec.json.encode(given)
        except UnicodeEncodeError as error:  # half of a surrogate pair
            raise BadRequest(f"the body is not valid Unicode: {error}") from error
        return decode_request(_decoder, body)


@contextlib.contextmanager
def in_words_of(names: Mapping[str, str]) -> Iterator[None]:
    """Errors about a chat's field are raised as errors about the field that it was made of: `names` has those."""
    try:
        yield
    except PenstockError as error:
        field = re.match(r"\w*", error.param or "")
        name = names.get(field[0]) if field else None
        if name is None or field is None:
            raise
        message = re.sub(rf"\b{field[0]}\b", lambda _: name, error.message)
        renamed = type(error)(message, param=name)
        raise renamed from error
