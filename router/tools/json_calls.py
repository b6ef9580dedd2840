"""Calls written as JSON: `{"name": "f", "arguments": {...}}`, alone or in a list. Most formats wrap these."""

from __future__ import annotations

import json
from collections.abc import Collection

from penstock.router.incremental import Arguments, CallBegins, CallEnds, Content, Steps, Text, capture

_ARGUMENTS = ("arguments", "parameters")


def json_call(text: Text, known: Collection[str] | None = None) -> Steps[bool]:
    """One call; False if it is none. Its arguments come as the model writes them, as soon as the name is there.

    With `known` nothing but the JSON itself says that this is a call: then it must be of one of these tools, and have
    arguments. Keys may come in any order; other keys are passed over.
    """
    if not (yield from text.accept("{")):
        return False
    call = _Call(text, known)
    while True:
        yield from text.spaces()
        if (yield from text.accept("}")):
            break
        if not (yield from call.item()):
            break
        yield from text.spaces()
        if not (yield from text.accept(",")):
            yield from text.accept("}")
            break
    return (yield from call.end())


def json_call_list(text: Text, known: Collection[str] | None = None) -> Steps[bool]:
    """`[call, ...]`; False if there is no call in it. What follows a broken one is left."""
    if not (yield from text.accept("[")):
        return False
    any_call = False
    while True:
        yield from text.attempt(_end_of_list(text))
        if not (yield from text.attempt(_item(text, known))):
            return any_call
        any_call = True


def arguments(text: Text) -> Steps[bool]:
    """The value of a call's arguments: an object, or one that is wrapped into a string."""
    if (yield from text.peek()) != '"':
        return (yield from text.json(Arguments))
    written, complete = yield from capture(text.json())
    yield Arguments(_decoded(written) if complete else written)
    return complete


def _item(text: Text, known: Collection[str] | None) -> Steps[bool]:
    yield from text.spaces()
    yield from text.accept(",")
    yield from text.spaces()
    return (yield from json_call(text, known))


def _end_of_list(text: Text) -> Steps[bool]:
    yield from text.spaces()
    return bool((yield from text.accept("]")))


class _Call:
    """One object on its way to a call."""

    def __init__(self, text: Text, known: Collection[str] | None) -> None:
        self._text, self._known = text, known
        self._name = ""
        self._held = ""  # arguments that came before the name
        self._begun = self._given = False

    def item(self) -> Steps[bool]:
        """One key with its value; False if the object goes no further."""
        text = self._text
        key = yield from self._string()
        yield from text.spaces()
        if not key or not (yield from text.accept(":")):
            return False
        yield from text.spaces()
        if key == "name" and not self._name:
            self._name = yield from self._string()
            if not self._name or (self._known is not None and self._name not in self._known):
                return False
            if self._known is None or self._held:
                yield from self._begin()
            return True
        if key not in _ARGUMENTS or self._given:
            _, complete = yield from capture(text.json())
            return complete
        if not self._name:
            self._held, complete = yield from capture(_as_content(arguments(text)))
            return complete
        if not self._begun:
            yield from self._begin()
        self._given = True
        return (yield from arguments(text))

    def end(self) -> Steps[bool]:
        """Whether it was a call."""
        if self._begun:
            if not self._given:
                yield Arguments("{}")
            yield CallEnds()
        return self._begun

    def _begin(self) -> Steps[None]:
        self._begun = True
        yield CallBegins(self._name)
        if self._held:
            self._given = True
            yield Arguments(self._held)

    def _string(self) -> Steps[str]:
        if (yield from self._text.peek()) != '"':
            return ""
        written, complete = yield from capture(self._text.json())
        return _decoded(written) if complete else ""


def _as_content(steps: Steps[bool]) -> Steps[bool]:
    while True:
        try:
            event = next(steps)
        except StopIteration as stop:
            return bool(stop.value)
        yield Content(event.text) if isinstance(event, Arguments) else event


def _decoded(written: str) -> str:
    try:
        text = str(json.loads(written, strict=False))
        text.encode()
        return text
    except ValueError:  # an escape that JSON does not know, or half a surrogate pair
        return written[1:-1]
