"""What Python programs write, as the exact values that travel: int, float, bool, text that UTF-8 can hold. Pure.

`SamplingParams`, its kin and `LLM` use it. Numbers of numpy and torch, bools, sets, ranges and arrays mean what they
say; the rest is a ValueError that names the field. It is found here because messages are encoded far from whoever wrote
the value, and a worker that cannot decode one refuses its sender.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import msgspec

Plain = Callable[[Any, str], Any]  # (what was given, the field's name) -> what is kept; raises ValueError
_INTS, _FLOATS, _FLAGS = {int}, {float}, {True, False}


def make_plain(struct: msgspec.Struct, rules: Mapping[str, Plain]) -> None:
    """Make of each field in `rules` what is to be kept; for a struct that is being made."""
    for field, plain in rules.items():
        given = getattr(struct, field)
        made = plain(given, field)
        if made is not given:
            msgspec.structs.force_setattr(struct, field, made)


def unless_none(plain: Plain) -> Plain:
    """The rule of an optional field."""
    return lambda value, field: None if value is None else plain(value, field)


def integer(value: Any, field: str) -> int:
    """An integer of any size."""
    if type(value) is int:
        return value
    try:
        return int(operator.index(value))
    except TypeError:
        raise ValueError(f"{field} must be an integer, got {value!r}") from None


def number(value: Any, field: str) -> float:
    """A real number as a float."""
    return value if type(value) is float else numbers([value], field)[0]


def flag(value: Any, field: str) -> bool:
    """True or False, or what equals one of them."""
    try:
        if value in _FLAGS:
            return bool(value)
    except TypeError:  # nothing that has no hash does
        pass
    raise ValueError(f"{field} must be True or False, got {value!r}")


def text(value: Any, field: str) -> str:
    """A text."""
    if not isinstance(value, str):
        raise ValueError(f"{field} must be text, got {value!r}")
    return texts([value], field)[0]


def integers(values: Any, field: str) -> list[int]:
    """Integers of any size, of anything that can be gone through."""
    if type(values) is list and (not values or set(map(type, values)) <= _INTS):
        return values  # soon seen, were they a whole vocabulary
    try:
        if isinstance(values, bytes | bytearray):
            raise TypeError(f"got {type(values).__name__}")
        return list(map(int, map(operator.index, values)))
    except TypeError as error:
        raise ValueError(f"{field} must be integers: {error}") from None


def numbers(values: Any, field: str) -> list[float]:
    """Real numbers as floats, of anything that can be gone through."""
    try:
        found = list(values)
        if any(issubclass(kind, str | bytes | bytearray) for kind in set(map(type, found))):
            raise TypeError("got text")  # which `float` would read
        return list(map(float, found))
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{field} must be numbers: {error}") from None


def texts(values: Any, field: str) -> list[str]:
    """Texts, of anything that can be gone through; one stands for a list of it."""
    if type(values) is list and not values:
        return values
    try:
        found = [values] if isinstance(values, str) else list(values)
        "".join(found).encode()
    except (TypeError, UnicodeEncodeError) as error:
        raise ValueError(f"{field} must be text: {error}") from None
    return list(map(str.__str__, found))  # not what members of an enumeration call themselves


def biases(values: Any, field: str) -> dict[int, float]:
    """Numbers by integer."""
    if not isinstance(values, Mapping):
        raise ValueError(f"{field} must be a dictionary, got {values!r}")
    if type(values) is dict and set(map(type, values)) <= _INTS and set(map(type, values.values())) <= _FLOATS:
        return values
    return dict(zip(integers(list(values), field), numbers(values.values(), field), strict=True))
