"""Calls written as a Python list: `[f(city="Paris"), g()]` is the whole answer. Llama 3.2 and 4, ToolACE."""

from __future__ import annotations

from penstock.router.incremental import Arguments, CallBegins, CallEnds, Steps, Text, capture
from penstock.router.tools.parser import ToolParser
from penstock.router.tools.schema_types import json_of, python_as_json


class Pythonic(ToolParser):
    """An argument is streamed, as JSON, when it is complete."""

    names = ("pythonic",)

    def parse(self, text: Text) -> Steps[None]:
        """See `ToolParser`. Only calls of the request's tools are calls: nothing else marks them."""
        yield from text.attempt(self._list(text))

    def _list(self, text: Text) -> Steps[bool]:
        yield from text.spaces()
        if not (yield from text.accept("[")):
            return False
        any_call = False
        while (yield from text.attempt(self._call(text))):
            any_call = True
        if any_call:
            yield from text.attempt(_literal(text, "]"))
        return any_call

    def _call(self, text: Text) -> Steps[bool]:
        yield from _literal(text, ",")
        yield from text.spaces()
        name = yield from text.word()
        if name not in self.tools or not (yield from text.accept("(")):
            return False
        if (yield from text.attempt(_literal(text, ")"))):
            yield CallBegins(name)
            yield Arguments("{}")
            yield CallEnds()
            return True
        key = yield from _key(text)
        if not key:
            return False
        yield CallBegins(name)
        opening = "{"
        while key:
            yield Arguments(f"{opening}{json_of(key)}: ")
            opening = ", "
            value, complete = yield from capture(text.python())
            yield Arguments(python_as_json(value) if complete else value)
            yield from _literal(text, ",")
            key = (yield from _key(text)) if complete else ""
        if (yield from text.attempt(_literal(text, ")"))):
            yield Arguments("}")
        yield CallEnds()
        return True


def _key(text: Text) -> Steps[str]:
    """The name of the next keyword argument; "" if there is none."""
    key = ""

    def keyword() -> Steps[bool]:
        nonlocal key
        yield from text.spaces()
        word = yield from text.word()
        yield from text.spaces()
        if word and (yield from text.accept("=")):
            key = word
        return bool(key)

    yield from text.attempt(keyword())
    return key


def _literal(text: Text, literal: str) -> Steps[bool]:
    yield from text.spaces()
    return bool((yield from text.accept(literal)))
