"""Bounds of numbers that people set: options of processes (config.py) and of commands (client_options.py). Pure."""

from __future__ import annotations

LARGEST_INT = 2**63 - 1  # what the wire and torch take
LONGEST_S = 1e9  # 30 years; Redis, threads and sleep take no time that has no end


def out_of_bounds(value: float, least: float, most: float) -> str:
    """What a number must be that is not from `least` to `most`, as NaN never is; "" for one that is."""
    if least <= value <= most:
        return ""
    if value < least or most == float("inf"):
        return f"must be at least {least:g}, got {value}"
    return f"must be from {least:g} to {most:g}, got {value}"
