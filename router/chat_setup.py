"""How this router's model speaks in chats: the forms its template takes, and the parsers for its answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import msgspec

from penstock.common.chat_template import PROBE, ChatTemplate
from penstock.common.config import RouterConfig
from penstock.common.errors import BadRequest, ConfigError
from penstock.common.structured_outputs import StructuredOutputsParams
from penstock.common.tokenizer import Tokenizer
from penstock.router.answer_parser import AnswerParsing
from penstock.router.chat_messages import ContentForms
from penstock.router.parsers import Parsers, marker_ids
from penstock.router.reasoning.forms import after_reasoning
from penstock.router.reasoning.parser import Beginning
from penstock.router.tools.forced import NamedCall, RequiredCalls
from penstock.router.tools.parser import ToolParser
from penstock.router.tools.request import ToolUse


@dataclass(frozen=True)
class ChatSetup:
    """`variables` are the template's, where a client gives none of that name; `shown_ids` the parsers' markers."""

    forms: ContentForms = field(default_factory=ContentForms)
    variables: Mapping[str, Any] = field(default_factory=dict)
    parsers: Parsers = field(default_factory=Parsers)
    shown_ids: frozenset[int] = frozenset()

    @classmethod
    def load(cls, config: RouterConfig, tokenizer: Tokenizer, template: ChatTemplate | None) -> ChatSetup:
        """What the options and the template say.

        Raises:
            ConfigError: an option is wrong.
        """
        parsers = Parsers.load(config)
        used = [parser for parser in (parsers.tool, parsers.reasoning) if parser is not None]
        forms = content_forms(config.chat_template_content_format, template)
        return cls(forms, _variables(config.default_chat_template_kwargs), parsers, marker_ids(tokenizer, used))

    def check_tools(self, use: ToolUse) -> None:
        """Raise BadRequest if the model is to choose a tool and nothing here can read its choice."""
        if use.mode == "auto" and self.parsers.tool is None:
            needed = "--enable-auto-tool-choice and --tool-call-parser to be set"
            raise BadRequest(f'"auto" tool choice requires {needed}', param="tool_choice")

    def after_reasoning(
        self, demanded: StructuredOutputsParams, beginning: Beginning
    ) -> StructuredOutputsParams | None:
        """The form of an output that may reason before it takes the form demanded; None if it must not reason."""
        parser = self.parsers.reasoning
        return None if parser is None else after_reasoning(demanded, parser(beginning))

    def parsing(
        self, use: ToolUse, beginning: Beginning, *, reasons: bool, show_reasoning: bool, one_call: bool
    ) -> AnswerParsing | None:
        """How to read an answer; None if all of it is content. `reasons` is False where it cannot have reasoning."""
        reasoning = self.parsers.reasoning if reasons else None
        tools = self._tool_parser(use)
        if reasoning is None and tools is None:
            return None
        return AnswerParsing(
            reasoning=None if reasoning is None else partial(reasoning, beginning),
            tools=tools,
            one_call=one_call,
            named=use.mode == "named",
            show_reasoning=show_reasoning,
            shown_ids=self.shown_ids,
        )

    def _tool_parser(self, use: ToolUse) -> Callable[[], ToolParser] | None:
        schemas = use.tools or {}
        if use.mode == "named":
            return partial(NamedCall, {use.named: schemas[use.named]})
        if use.mode == "required":
            return partial(RequiredCalls, schemas)
        chosen = self.parsers.tool if use.mode == "auto" else None
        return None if chosen is None else partial(chosen, schemas)


def content_forms(option: str, template: ChatTemplate | None) -> ContentForms:
    """The forms of a message's content that the template takes: tried out, unless `option` is no "auto"."""
    if option != "auto" or template is None:
        return ContentForms(text=option != "openai", parts=option == "openai")
    parts = template.shows([{"type": "text", "text": PROBE}])
    return ContentForms(text=not parts or template.shows(PROBE), parts=parts)


def _variables(option: str) -> dict[str, Any]:
    try:
        return msgspec.json.decode(option, type=dict[str, Any]) if option else {}
    except msgspec.DecodeError as error:
        raise ConfigError(f"--default-chat-template-kwargs must be a JSON object: {error}") from error
