"""Draws a request's timeline as a waterfall of text: which step took which milliseconds, and what ran side by side.

In: the `timeline` field of an answer (see common/timeline.py): marks with the time since the request came, spans with
a duration only. Out: lines. Workers' spans carry no start, so they are placed by what they are known to end with:
prefill with the first token, the transfer its exposed part later, decode with the end. Used by the demo.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

BLOCK, THIN = "█", "▏"
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


@dataclass(frozen=True)
class Bar:
    """One step of the request, in milliseconds since it came."""

    name: str
    start_ms: float
    length_ms: float
    note: str = ""


def bars(timeline: Sequence[dict[str, Any]]) -> list[Bar]:
    """The steps of a timeline, placed; those that took no time are left out, except the transfer."""
    at = {entry["name"]: entry["ms"] for entry in timeline if entry["kind"] == "mark"}
    end = at.get("finished", max(at.values(), default=0.0))
    first_token = at.get("first_token", end)
    tokenised = at.get("tokenised", 0.0)
    routed = at.get("routed", tokenised)
    placed = [Bar("tokenise", 0.0, tokenised), Bar("route", tokenised, routed - tokenised)]
    cursor = routed
    for entry in timeline:
        if entry["kind"] != "span":
            continue
        name, length = entry["name"], entry["ms"]
        if name == "prefill":
            start = first_token - length
        elif name == "transfer":
            start = first_token + entry.get("exposed_ms", 0.0) - length
        elif name == "decode":
            start = end - length
        else:  # waiting: one after the other, from when the request was sent on
            start, cursor = cursor, cursor + length
        placed.append(Bar(name, min(max(start, 0.0), end), min(length, end), _note(entry)))
    return [bar for bar in placed if bar.length_ms > 0.0 or bar.name == "transfer"]


def waterfall(timeline: Sequence[dict[str, Any]], width: int) -> list[str]:
    """The lines of the picture; bars take `width` columns, names, figures and notes stand around them."""
    placed = bars(timeline)
    marks = [entry["ms"] for entry in timeline if entry["kind"] == "mark"]
    total_ms = max([bar.start_ms + bar.length_ms for bar in placed] + marks, default=0.0)
    lines = []
    for bar in placed:
        before = min(round(width * bar.start_ms / total_ms), width - 1) if total_ms else 0
        length = min(round(width * bar.length_ms / total_ms), width - before) if total_ms else 0
        picture = (" " * before + (BLOCK * length or THIN)).ljust(width)
        lines.append(f"{bar.name:<10}{bar.length_ms:9.1f} ms  {picture}  {bar.note}".rstrip())
    return lines


def moved_bytes(timeline: Sequence[dict[str, Any]]) -> int:
    """KV bytes that travelled between workers for this request."""
    return sum(int(entry.get("transfer_bytes", 0)) for entry in timeline)


def in_words(size_bytes: int) -> str:
    """A size in the unit that people read: 1536 -> 1.5 KiB."""
    size, unit = float(size_bytes), 0
    while size >= 1024 and unit < len(_UNITS) - 1:
        size, unit = size / 1024, unit + 1
    return f"{size:.0f} {_UNITS[unit]}" if unit == 0 else f"{size:.1f} {_UNITS[unit]}"


def _note(entry: dict[str, Any]) -> str:
    if entry["name"] == "prefill":
        cached = entry.get("cached_tokens", 0)
        return f"{entry.get('computed_tokens', 0)} tokens" + (f", {cached} more from the cache" if cached else "")
    if entry["name"] == "transfer":
        size, pages = in_words(entry.get("transfer_bytes", 0)), entry.get("transfer_pages", 0)
        return f"{size} in {pages} pages over {entry.get('transport', '?')}"
    return ""
