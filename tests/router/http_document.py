"""The tables of docs/http.md, for tests that compare them with the router."""

from __future__ import annotations

import re
from pathlib import Path

TEXT = (Path(__file__).parents[2] / "docs" / "http.md").read_text()
NAMES = {  # as the tables call them
    "completions": "/v1/completions",
    "chat": "/v1/chat/completions",
    "responses": "/v1/responses",
    "messages": "/v1/messages",
}
OWN = {"/v1/responses": "Responses", "/v1/messages": "Messages"}
NOWHERE = "Fields that no route has"


def table(heading: str) -> list[list[str]]:
    """The rows of the first table under a heading, without its first two lines."""
    section = re.split(rf"^#+ {heading}$", TEXT, flags=re.MULTILINE)[1]
    lines = section[section.index("|") :].splitlines()
    rows = lines[: next((at for at, line in enumerate(lines) if not line.startswith("|")), len(lines))]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1]] for row in rows[2:]]


def code(cell: str) -> list[str]:
    """What stands in backticks."""
    return re.findall(r"`([^`]*)`", cell)


def fields(path: str) -> dict[str, str]:
    """Field -> "honoured" or "refused": all that the document says of a route that generates."""
    told = {}
    for names, _, where in table("Fields"):
        routes = {NAMES[name] for name in filter(None, where.split(", "))}
        told |= dict.fromkeys(code(names), "refused" if path in routes else "honoured")
    for names, _ in table(NOWHERE):
        told |= dict.fromkeys(code(names), "refused")
    for names, _, refused in table(OWN[path]) if path in OWN else ():
        told |= dict.fromkeys(code(names), "refused" if refused == "always" else "honoured")
    return told
