"""What a tool parser is; a plugin's, too (docs/tools.md)."""

from __future__ import annotations

import secrets
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

from penstock.router.incremental import Steps, Text


class ToolParser(ABC):
    """Finds tool calls in one answer; one object a choice.

    `names` are those of `--tool-call-parser`. `markers` are the strings a format is made of: where they are special
    tokens of the model, they are shown to the parser all the same. `tools` maps the request's tools to their
    parameters' JSON schemas.
    """

    names: ClassVar[tuple[str, ...]]
    markers: ClassVar[tuple[str, ...]] = ()

    def __init__(self, tools: Mapping[str, Mapping[str, Any]]) -> None:
        self.tools = tools

    @abstractmethod
    def parse(self, text: Text) -> Steps[None]:
        """Content and calls as they come. What is no call after all is content; nothing raises, nothing is lost."""

    @staticmethod
    def call_id() -> str:
        """A new id of a call."""
        return f"call_{secrets.token_hex(12)}"
