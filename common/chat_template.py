"""Renders chat messages to the prompt text of a model: Jinja2 in a sandbox, set up as Hugging Face documents it.

Source of the environment: transformers' "Chat templates" guide (trim_blocks, lstrip_blocks, loop controls,
`raise_exception`, `strftime_now`, `tojson` without HTML escaping, `{% generation %}` blocks). Used by the router and
by `LLM.chat`.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from penstock.common.errors import BadRequest, ConfigError
from penstock.common.tokenizer import Tokenizer

PROBE = "penstock-probe"


class ChatTemplate:
    """One compiled template.

    Raises:
        ConfigError: (constructor) the source is not valid Jinja.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str] | None = None, with_tools: str = "") -> None:
        """`with_tools` is the source for conversations with tools, where the model has one of its own for them."""
        try:
            self._template = _environment().from_string(source)
            self._with_tools = _environment().from_string(with_tools) if with_tools else self._template
        except jinja2.TemplateError as error:
            raise ConfigError(f"the chat template is not valid: {error}") from error
        self._special_tokens = dict(special_tokens or {})

    @classmethod
    def load(cls, tokenizer: Tokenizer, path: str = "") -> ChatTemplate | None:
        """The template in the file `path`, else the tokenizer's default one, else None.

        Raises:
            ConfigError: the file cannot be read, or the template is not valid Jinja.
        """
        source, with_tools = tokenizer.chat_templates.get("default"), tokenizer.chat_templates.get("tool_use", "")
        if path:
            try:
                source, with_tools = Path(path).read_text(encoding="utf-8"), ""
            except (OSError, UnicodeDecodeError) as error:
                raise ConfigError(f"--chat-template: {error}") from error
        return None if source is None else cls(source, tokenizer.special_tokens, with_tools)

    def shows(self, content: object) -> bool:
        """Whether a user's message with this content, which holds `PROBE`, becomes text that has it as it should."""
        try:
            text = self.render([{"role": "user", "content": content}])
        except BadRequest:
            return False
        return PROBE in text and "'type'" not in text and '"type"' not in text

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        variables: Mapping[str, Any] | None = None,
        tools: Sequence[Any] | None = None,
        documents: Sequence[Any] | None = None,
    ) -> str:
        """The prompt text; `variables` are the client's `chat_template_kwargs`.

        Raises:
            BadRequest: the template refuses the messages, or cannot deal with them.
        """
        # As transformers does: templates deal with an absent key, but write "None" for one that is None.
        chat = [{key: value for key, value in message.items() if value is not None} for message in messages]
        marker = ""
        if continue_final_message:
            marker = f"\ue000{secrets.token_hex(8)}\ue000"
            # The space tells whether the template trims the end of a message: then it does so with ours, too.
            chat[-1]["content"] = _with_end(chat[-1].get("content"), marker + " ")
        values = {**self._special_tokens, **(variables or {})}
        values |= {"messages": chat, "add_generation_prompt": add_generation_prompt}
        for name, value in (("tools", tools), ("documents", documents)):
            if value is not None or name not in values:
                values[name] = value
        try:
            text = (self._with_tools if tools else self._template).render(values)
        except jinja2.TemplateError as error:
            raise BadRequest(f"the chat template refuses these messages: {error}", param="messages") from error
        except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
            kind = type(error).__name__
            raise BadRequest(
                f"the chat template cannot render these messages: {kind}: {error}", param="messages"
            ) from error
        return _cut_at(text, marker) if marker else text


def _with_end(content: Any, end: str) -> Any:
    """A message's content with more text: a string, or a list of text parts."""
    if isinstance(content, list) and content:
        *parts, last = content
        return [*parts, {**last, "text": last["text"] + end}]
    return str(content or "") + end


def _cut_at(text: str, marker: str) -> str:
    at = text.rfind(marker)
    if at < 0:
        raise BadRequest("continue_final_message: the chat template changes the final message", param="messages")
    return text[:at] if text.startswith(marker + " ", at) else text[:at].rstrip()


class _GenerationBlock(Extension):
    """`{% generation %}...{% endgeneration %}` marks what the assistant said, for training: only its body counts."""

    tags = {"generation"}  # noqa: RUF012 (the base class declares it so)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)
