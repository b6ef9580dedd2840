"""What `LLM` takes as prompts, made token ids: text, ids, vLLM's dictionaries, and conversations through a template."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import Any, NamedTuple

from penstock.common.chat_template import ChatTemplate
from penstock.common.errors import BadRequest, ConfigError
from penstock.common.plain_values import integers, text
from penstock.common.tokenizer import Tokenizer
from penstock.router.chat_messages import template_messages
from penstock.router.chat_setup import content_forms

Prompt = str | Sequence[int] | Mapping[str, Any]
Messages = Sequence[Mapping[str, Any]]
_OTHER_INPUTS = ("prompt_embeds", "multi_modal_data", "multi_modal_uuids", "mm_processor_kwargs", "encoder_prompt")


class TokenPrompt(NamedTuple):
    """A prompt as the engine takes it; `text` is None where ids were given alone."""

    text: str | None
    token_ids: list[int]
    cache_salt: str


class Prompts:
    """Makes prompts with one model's tokenizer and chat template. A template is a file, or its text.

    Raises:
        ConfigError: (constructor) the template cannot be read, or is no valid Jinja.
        ValueError: (`tokenizer`, and what needs it) there is none.
    """

    def __init__(self, tokenizer: Tokenizer | None, chat_template: str | Path | None) -> None:
        self._tokenizer = tokenizer
        self._template = None if tokenizer is None else _template(tokenizer, chat_template)

    @property
    def has_tokenizer(self) -> bool:
        """Whether there is one."""
        return self._tokenizer is not None

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer."""
        if self._tokenizer is None:
            raise ValueError("skip_tokenizer_init=True: there is no tokenizer; give token ids, and no stop strings")
        return self._tokenizer

    def tokens(self, prompt: Prompt, tokenization: Mapping[str, Any] | None = None) -> TokenPrompt:
        """A prompt's token ids, those of its text if there are none.

        Raises:
            ValueError: it has neither, or something that no model here takes.
        """
        if isinstance(prompt, str):
            return TokenPrompt(prompt, self._encode(prompt, tokenization), "")
        if not isinstance(prompt, Mapping):
            return TokenPrompt(None, list(integers(prompt, "a prompt")), "")
        for field in _OTHER_INPUTS:
            if prompt.get(field):
                raise ValueError(f"a prompt's {field} is not supported: text and token ids are")
        words, ids = prompt.get("prompt"), prompt.get("prompt_token_ids")
        if ids is None and words is None:
            raise ValueError("a prompt needs prompt or prompt_token_ids")
        ids = self._encode(words, tokenization) if ids is None else list(integers(ids, "prompt_token_ids"))
        salt = prompt.get("cache_salt")
        return TokenPrompt(words, ids, "" if salt is None else text(salt, "cache_salt"))

    def chat(
        self,
        messages: Messages,
        chat_template: str | None,
        content_format: str,
        tokenization: Mapping[str, Any] | None,
        **options: Any,
    ) -> Prompt:
        """A conversation as a prompt; `options` are those of `ChatTemplate.render`.

        Raises:
            ValueError: there is no template, it is wrong, or it refuses the messages.
        """
        tokenizer, template = self.tokenizer, self._template
        try:
            template = template if chat_template is None else _template(tokenizer, chat_template)
            if template is None:
                raise ValueError("the tokenizer has no chat template")
            forms = content_forms(content_format, template)
            words = template.render(template_messages([dict(message) for message in messages], forms), **options)
        except BadRequest as error:
            raise ValueError(error.message) from error
        except ConfigError as error:
            raise ValueError(str(error)) from error
        special = {"add_special_tokens": False, **(tokenization or {})}
        return {"prompt": words, "prompt_token_ids": self._encode(words, special)}

    def _encode(self, words: Any, options: Mapping[str, Any] | None) -> list[int]:
        options = dict(options or {})
        special = bool(options.pop("add_special_tokens", True))
        if unknown := next(iter(options), None):
            hint = "; see SamplingParams.truncate_prompt_tokens" if unknown.startswith("trunc") else ""
            raise ValueError(f"tokenization_kwargs: {unknown} is not supported, add_special_tokens is{hint}")
        return self.tokenizer.encode(text(words, "prompt"), add_special_tokens=special)


def prompt_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt or several, as a list.

    Raises:
        ValueError: it is neither.
    """
    if isinstance(prompts, str | bytes | Mapping):
        return [prompts]
    if not isinstance(prompts, Iterable):
        raise ValueError(f"prompts must be one prompt or several, got {prompts!r}")
    items: list[Any] = list(prompts)
    return [items] if items and isinstance(items[0], Real) else items  # numpy's numbers are such, too


def refuse(**arguments: object) -> None:
    """Raise ValueError for the first of vLLM's arguments that asks for something which is not here."""
    for name, value in arguments.items():
        if value:
            raise ValueError(f"{name} is not supported")


def _template(tokenizer: Tokenizer, given: str | Path | None) -> ChatTemplate | None:
    if isinstance(given, str) and any(mark in given for mark in ("{", "\n")):
        return ChatTemplate(given, tokenizer.special_tokens)
    return ChatTemplate.load(tokenizer, str(given or ""))
