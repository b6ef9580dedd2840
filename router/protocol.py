"""The request bodies of the OpenAI API, as msgspec structs, and what is wrong with them.

A body becomes a struct by `decode_request`; the struct checks itself and gives `SamplingParams`. Unknown fields are
ignored; known ones that a route does not have must ask for nothing (known_fields.py). Every complaint is a
`BadRequest` that names the field. Called by completions.py and chat.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Annotated, Any, Literal, Protocol, TypeVar

import msgspec

from penstock.common.bad_words import bad_word_ids
from penstock.common.beam_search import MAX_BEAM_WIDTH, MAX_LENGTH_PENALTY
from penstock.common.errors import BadRequest
from penstock.common.generation_defaults import GenerationDefaults
from penstock.common.sampling import MAX_BAD_WORDS, SamplingParams
from penstock.router.chat_messages import check_messages
from penstock.router.known_fields import not_supported, refuse_unsupported
from penstock.router.structured import FormFields
from penstock.router.tools.request import ToolUse, tool_use

MAX_LOGPROBS = 20
COMPLETION_TOKENS = 16  # OpenAI's default of max_tokens for completions
MAX_STOP_STRINGS = 64
MAX_STOP_LENGTH = 1024  # characters
MAX_STOP_TOKEN_IDS = 1024
MAX_SALT_LENGTH = 256  # characters
MAX_CHOICES = 1024  # of one HTTP request: prompts times n
MAX_BAD_WORD_LENGTH = 1024  # characters
MAX_RULE_IDS = 1 << 18  # ids of logit_bias and allowed_token_ids, times choices: each choice has its own

MAX_REQUEST_ID = 256  # characters: every event of a stream has it
_AT_PATH = re.compile(r"(.*) - at (?:`key` in )?`\$\.?(.*)`", re.DOTALL)
_SAMPLED_AS_GIVEN = (
    "temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty",
    "min_tokens", "stop_token_ids", "ignore_eos", "include_stop_str_in_output", "skip_special_tokens",
    "logit_bias", "allowed_token_ids", "bad_words",
)  # fmt: skip
_NOT_WITH_BEAMS = (
    "echo", "prompt_logprobs", "logit_bias", "allowed_token_ids", "bad_words", "presence_penalty",
    "frequency_penalty", "min_tokens", "stop_token_ids", "structured_outputs",
)  # fmt: skip
_IDS_SCHEMA = {"type": "array", "items": {"type": "integer"}, "minItems": 1}
_PROMPT_SCHEMA = {
    "anyOf": [
        {"type": "string", "minLength": 1},
        {"type": "array", "items": {"type": "string", "minLength": 1}, "minItems": 1},
        _IDS_SCHEMA,
        {"type": "array", "items": _IDS_SCHEMA, "minItems": 1},
    ]
}


class StreamOptions(msgspec.Struct):
    """What a stream tells besides text."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class GenerationRequest(FormFields, kw_only=True):
    """Fields that completions and chat share; None means absent."""

    model: str | None = None
    n: int | None = None
    best_of: int | None = None
    stream: bool | None = None
    request_id: str | None = None  # as X-Request-Id, which goes first
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None  # "token_id:7" instead of a token's text, in logprobs
    stream_options: StreamOptions | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    min_tokens: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    logit_bias: dict[int, float] | None = None
    allowed_token_ids: list[int] | None = None
    bad_words: list[str] | None = None
    prompt_logprobs: int | None = None
    truncate_prompt_tokens: int | None = None
    truncation_side: Literal["left", "right"] | None = None
    priority: int | None = None
    use_beam_search: bool | None = None  # with `n` beams
    length_penalty: float | None = None
    add_special_tokens: bool | None = None
    echo: bool | None = None
    cache_salt: str | None = None
    timeline: bool | None = None
    user: str | None = None

    def check(self) -> None:
        """Raise BadRequest for what no later step would notice. Repeated stop token ids are dropped."""
        self.take_form()
        if self.best_of is not None and self.best_of != self.choices_per_prompt:
            if self.best_of < self.choices_per_prompt:
                raise BadRequest(f"best_of must be at least n, got {self.best_of}", param="best_of")
            raise not_supported("best_of")
        if self.stream_options is not None and not self.stream:
            raise BadRequest("stream_options is only allowed with stream=true", param="stream_options")
        if self.request_id is not None:
            check_request_id(self.request_id, "request_id")
        if self.cache_salt == "":
            raise BadRequest("cache_salt must not be empty", param="cache_salt")
        if self.cache_salt is not None and len(self.cache_salt) > MAX_SALT_LENGTH:
            raise BadRequest(f"cache_salt must be at most {MAX_SALT_LENGTH} characters", param="cache_salt")
        if self.stop_token_ids is not None:
            self.stop_token_ids = list(dict.fromkeys(self.stop_token_ids))
            if len(self.stop_token_ids) > MAX_STOP_TOKEN_IDS:
                raise BadRequest(f"stop_token_ids must be at most {MAX_STOP_TOKEN_IDS} ids", param="stop_token_ids")

        if self.allowed_token_ids is not None:
            self.allowed_token_ids = list(dict.fromkeys(self.allowed_token_ids))
        kept = self.truncate_prompt_tokens
        if kept is not None and kept < 1 and kept != -1:
            field = "truncate_prompt_tokens"
            raise BadRequest(f"{field} must be -1 or at least 1, got {kept}", param=field)
        if self.use_beam_search:
            self._check_beams()
        scored = self.prompt_logprobs
        if scored is not None and not 0 <= scored <= MAX_LOGPROBS:
            field = "prompt_logprobs"
            raise BadRequest(f"{field} must be from 0 to {MAX_LOGPROBS}, got {scored}", param=field)
        if scored is not None and self.stream:
            raise BadRequest("prompt_logprobs does not go with stream=true", param="prompt_logprobs")
        if self.priority is not None and not -(2**31) <= self.priority < 2**31:
            raise BadRequest(f"priority must be a 32-bit integer, got {self.priority}", param="priority")
        if len(self.bad_words or ()) > MAX_BAD_WORDS:  # before they are tokenised
            raise BadRequest(f"bad_words: at most {MAX_BAD_WORDS}, got {len(self.bad_words or ())}", param="bad_words")
        if any(len(word) > MAX_BAD_WORD_LENGTH for word in self.bad_words or ()):
            raise BadRequest(f"bad_words must be of at most {MAX_BAD_WORD_LENGTH} characters", param="bad_words")

    def _check_beams(self) -> None:
        """Beams are compared by the model's own logprobs: what would change those cannot be asked for."""
        if self.choices_per_prompt > MAX_BEAM_WIDTH:
            raise BadRequest(f"n must be at most {MAX_BEAM_WIDTH} with use_beam_search", param="n")
        if self.length_penalty is not None and abs(self.length_penalty) > MAX_LENGTH_PENALTY:
            limit = f"in [-{MAX_LENGTH_PENALTY:g}, {MAX_LENGTH_PENALTY:g}]"
            raise BadRequest(f"length_penalty must be {limit}, got {self.length_penalty}", param="length_penalty")
        for field in _NOT_WITH_BEAMS:
            if getattr(self, field, None):
                raise not_supported(field, f"{field} together with use_beam_search")
        if self.repetition_penalty not in (None, 1.0):
            raise not_supported("repetition_penalty", "repetition_penalty together with use_beam_search")

    def check_choices(self, prompts: int) -> None:
        """Raise BadRequest for no choice, or more than one request may have."""
        n = self.choices_per_prompt
        if n < 1 or n * prompts > MAX_CHOICES:
            limit = f"n must be at least 1, and prompts times n at most {MAX_CHOICES}"
            raise BadRequest(f"{limit}, got {prompts} prompts and n={n}", param="n" if n != 1 else "prompt")
        ids = len(self.logit_bias or ()) + len(self.allowed_token_ids or ())
        if ids * n * prompts > MAX_RULE_IDS:
            field = "allowed_token_ids" if self.allowed_token_ids else "logit_bias"
            raise BadRequest(f"{field}: ids times choices must be at most {MAX_RULE_IDS}", param=field)

    def truncated(self, token_ids: list[int], max_model_len: int) -> list[int]:
        """The part of a prompt that `truncate_prompt_tokens` leaves, its end unless `truncation_side` says otherwise.

        Raises:
            BadRequest: more is to be kept than the context holds.
        """
        kept = self.truncate_prompt_tokens
        if kept is None:
            return token_ids
        if kept > max_model_len:
            limit = f"truncate_prompt_tokens must be at most {max_model_len}, the context"
            raise BadRequest(f"{limit}, got {kept}", param="truncate_prompt_tokens")
        if kept == -1:
            kept = max(1, max_model_len - max(1, self.asked_max_tokens or 1))
        return token_ids[:kept] if self.truncation_side == "right" else token_ids[-kept:]

    @property
    def asked_prompt_logprobs(self) -> int | None:
        """How many logprobs each prompt token gets; None: none is scored."""
        return self.prompt_logprobs

    @property
    def choices_per_prompt(self) -> int:
        """`n`."""
        return 1 if self.n is None else self.n

    @property
    def asked_max_tokens(self) -> int | None:
        """`max_completion_tokens`, else the older `max_tokens`."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def usage_in_stream(self) -> tuple[bool, bool]:
        """(a last chunk with usage, usage in every chunk)."""
        options = self.stream_options
        return (
            (False, False) if options is None else (bool(options.include_usage), bool(options.continuous_usage_stats))
        )

    def sampling(
        self,
        defaults: GenerationDefaults,
        max_tokens: int,
        logprobs: int | None,
        seed: int,
        vocab_size: int,
        encode: Callable[[str], list[int]],
    ) -> SamplingParams:
        """Sampling parameters of one choice (`n` is 1); `seed` is used if the request has none.

        `encode` makes token ids of banned words, without special tokens.

        Raises:
            BadRequest: a value out of its range.
        """
        values: dict[str, Any] = defaults.sampling()
        values |= {name: value for name in _SAMPLED_AS_GIVEN if (value := getattr(self, name)) is not None}
        if values.get("top_k", 0) > vocab_size:
            values["top_k"] = vocab_size
        if logprobs is not None and not 0 <= logprobs <= MAX_LOGPROBS:
            field = "logprobs" if isinstance(self, CompletionRequest) else "top_logprobs"
            raise BadRequest(f"{field} must be from 0 to {MAX_LOGPROBS}, got {logprobs}", param=field)
        own_seed = self.seed is not None and self.seed != -1  # -1 means none, as in vLLM
        try:
            if self.choices_per_prompt != 1:
                SamplingParams(n=self.choices_per_prompt)  # is it in range?
            sampling = SamplingParams(
                **values,
                bad_words_token_ids=bad_word_ids(self.bad_words or (), encode),
                seed=self.seed if own_seed else seed,
                stop=self._stops(),
                max_tokens=max_tokens,
                logprobs=logprobs,
                prompt_logprobs=self.asked_prompt_logprobs,
                structured_outputs=self.structured_outputs,
            )
        except ValueError as error:
            raise BadRequest(str(error), param=str(error).partition(" ")[0]) from error
        field, largest = sampling.largest_rule_id()
        check_ids([largest] if field else [], vocab_size, field)
        return sampling

    def check_token_ids(self, vocab_size: int) -> None:
        """Stop token ids must be ids of this model."""
        check_ids(self.stop_token_ids or [], vocab_size, "stop_token_ids")

    def _stops(self) -> list[str]:
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        if len(stops) > MAX_STOP_STRINGS or any(len(stop) > MAX_STOP_LENGTH for stop in stops):
            limits = f"at most {MAX_STOP_STRINGS} strings of at most {MAX_STOP_LENGTH} characters"
            raise BadRequest(f"stop must be {limits}", param="stop")
        return stops


class CompletionRequest(GenerationRequest, kw_only=True):
    """Body of POST /v1/completions."""

    prompt: Annotated[msgspec.Raw, msgspec.Meta(extra_json_schema=_PROMPT_SCHEMA)] = msgspec.field(
        default_factory=msgspec.Raw
    )
    logprobs: int | None = None

    @property
    def asked_prompt_logprobs(self) -> int | None:
        """See `GenerationRequest.asked_prompt_logprobs`; a prompt that is echoed with logprobs has them, too."""
        echoed = self.logprobs if self.echo else None
        return echoed if self.prompt_logprobs is None else max(self.prompt_logprobs, echoed or 0)

    @property
    def asked_max_tokens(self) -> int:
        """See `GenerationRequest.asked_max_tokens`; completions are short unless asked to be long."""
        asked = super().asked_max_tokens
        return COMPLETION_TOKENS if asked is None else asked

    def prompts(self) -> list[str] | list[list[int]]:
        """The prompts, all as text or all as token ids; at least one."""
        if not bytes(self.prompt):
            raise BadRequest("prompt is required", param="prompt")
        for decoder in _PROMPT_DECODERS:
            try:
                value: Any = decoder.decode(self.prompt)
            except UnicodeDecodeError as error:
                raise BadRequest(f"prompt is not valid UTF-8: {error}", param="prompt") from error
            except (msgspec.ValidationError, RecursionError):
                continue
            one = isinstance(value, str) or (value and isinstance(value[0], int))
            prompts: list[Any] = [value] if one else value
            if not prompts or not all(prompts):
                raise BadRequest("prompt must not be empty", param="prompt")
            return prompts
        kinds = "a string, a list of strings, a list of token ids, or a list of lists of token ids"
        raise BadRequest(f"prompt must be {kinds}", param="prompt")


class ChatRequest(GenerationRequest, kw_only=True):
    """Body of POST /v1/chat/completions."""

    messages: list[dict[str, Any]] | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template: Any = None
    chat_template_kwargs: dict[str, Any] | None = None
    documents: list[dict[str, Any]] | None = None
    tools: list[Any] | None = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None
    include_reasoning: bool | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None

    def check(self) -> None:
        """See `GenerationRequest.check`."""
        super().check()
        if self.chat_template is not None:
            raise not_supported("chat_template")
        if self.top_logprobs and not self.logprobs:
            raise BadRequest("top_logprobs needs logprobs=true", param="top_logprobs")
        if not self.messages:
            raise BadRequest("messages must hold at least one message", param="messages")
        check_messages(self.messages)
        demanded = self.tool_use().mode in ("required", "named")
        if demanded and self.use_beam_search:
            raise not_supported("tool_choice", "a call that is demanded, together with use_beam_search,")
        if self.continue_final_message and self.add_generation_prompt:
            field = "continue_final_message"
            raise BadRequest(f"{field} and add_generation_prompt cannot both be true", param=field)

    def tool_use(self) -> ToolUse:
        """What is asked about tools; raises BadRequest."""
        return tool_use(self.tools, self.tool_choice)


_PROMPT_DECODERS: tuple[msgspec.json.Decoder[Any], ...] = (
    msgspec.json.Decoder(str),
    msgspec.json.Decoder(list[str]),
    msgspec.json.Decoder(list[int]),
    msgspec.json.Decoder(list[list[int]]),
)

_FIELDS = msgspec.json.Decoder(dict[str, msgspec.Raw])


class _Checked(Protocol):
    """A body that knows its own rules."""

    def check(self) -> None:
        """Raise BadRequest for what the types alone cannot tell."""
        ...


_Request = TypeVar("_Request", bound=_Checked)


def decode_request(decoder: msgspec.json.Decoder[_Request], body: bytes) -> _Request:
    """The checked request in `body`.

    Raises:
        BadRequest: not JSON, a wrong type, a value out of range, or a feature that is not supported yet.
    """
    try:
        request = decoder.decode(body)
        refuse_unsupported(decoder.type, _FIELDS.decode(body))
    except msgspec.ValidationError as error:
        where = _AT_PATH.fullmatch(str(error))
        param = where[2] if where else None
        message = f"{param}: {where[1]}" if where and param else str(error).removesuffix(" - at `$`")
        raise BadRequest(message, param=param) from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BadRequest(f"the body is not valid JSON: {error}") from error
    request.check()
    return request


def fields_of(body: bytes) -> frozenset[str]:
    """Names of a body's top-level fields; none if it is no JSON object."""
    try:
        return frozenset(_FIELDS.decode(body))
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return frozenset()


def check_ids(token_ids: list[int], vocab_size: int, param: str) -> None:
    """Raise BadRequest for an id outside the model's vocabulary."""
    if token_ids and (min(token_ids) < 0 or max(token_ids) >= vocab_size):
        raise BadRequest(f"{param} must hold token ids from 0 to {vocab_size - 1}", param=param)


def check_request_id(text: str, param: str) -> None:
    """Raise BadRequest for an id that does not fit into a header or a line of a log: nothing else is asked of it."""
    if not (0 < len(text) <= MAX_REQUEST_ID and text.isprintable()):
        raise BadRequest(f"{param} must be from 1 to {MAX_REQUEST_ID} printable characters", param=param)
