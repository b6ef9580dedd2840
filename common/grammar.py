"""What `StructuredOutputsParams` mean: grammars for llguidance, compiled for one vocabulary.

The router compiles a form to refuse what cannot be had, the engine to follow it (engine/constraints.py). llguidance
says which keyword of a schema it does not support; what it would take too long for, or too deep, is refused here.
Compiling happens in a thread of its own: it recurses as deep as the rules refer to one another.
"""

from __future__ import annotations

import json
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property, lru_cache
from typing import Any

import msgspec
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper, grammar_from, regex_to_lark

from penstock.common.errors import ConfigError
from penstock.common.structural_tag import structural_tag_grammar
from penstock.common.structured_outputs import StructuredOutputsParams
from penstock.common.tokenizer import Tokenizer

MAX_SCHEMA_CHARS = 120_000  # as OpenAI's API
MAX_GRAMMAR_CHARS = 32_768  # of regular expressions and grammars
MAX_CHOICE_CHARS = 200_000  # of all choices together
MAX_PROPERTIES = 2000  # all objects of a schema together: 2.9 s at most, on one slow core
MAX_PATTERN_PROPERTIES = 64  # every two are compared: 64 take 0.4 s, 200 take 5 s
MAX_MASK_S = 2.0  # processor time of one mask; what takes longer is no use, and keeps a thread from the others
COMPILE_STACK_BYTES = 256 << 20  # a thousand schemas, each in the one before, overflow the usual 8 MiB; lazily used
CACHED_GRAMMARS = 64
ENCODED_TEXTS = 4096  # kept: with every token the rest of what a form dictates is asked for, by every request
SPECIAL_MARK = b"\xff"  # no text has this byte: llguidance's mark of special tokens
TEXT_MARK = "\x02"  # merges with nothing, so that a text behind it has tokens of its own
# One space, or a line break with the next line's indentation: a model can write JSON as people do, but not nothing
# but spaces until its tokens are used up.
JSON_WHITESPACE = r" |\r?\n[ \t]{0,64}"

# A property that may be left out takes four items of a row, and all of a schema's may follow one another.
_LIMITS = LLParserLimits(max_lexer_states=50_000, max_items_in_row=5 * MAX_PROPERTIES, verbose_errors=False)
_MAPS_OF_SCHEMAS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
_SCHEMAS = (
    "items", "prefixItems", "additionalItems", "additionalProperties", "allOf", "anyOf", "oneOf", "not", "if", "then",
    "else", "contains", "propertyNames", "unevaluatedItems", "unevaluatedProperties",
)  # fmt: skip
_FORMATS = frozenset(  # that JSON Schema 2020-12 defines; llguidance refuses those that it does not know
    {
        "date", "date-time", "duration", "email", "hostname", "idn-email", "idn-hostname", "ipv4", "ipv6", "iri",
        "iri-reference", "json-pointer", "regex", "relative-json-pointer", "time", "uri", "uri-reference",
        "uri-template", "uuid",
    }
)  # fmt: skip
_Json = dict[str, Any]


class GrammarError(ValueError):
    """The form cannot be had; the message says what of it, beginning with the kind."""


class Grammars:
    """Compiles forms for a vocabulary and keeps the latest ones. May be called from any thread."""

    def __init__(
        self, load: Callable[[], Tokenizer], vocab_size: int, eos_token_ids: Sequence[int], *, masks: bool = True
    ) -> None:
        """`load` gives the tokenizer, for `prepare` or the first form; vocabulary and ends are the model's.

        Without `masks` the vocabulary is prepared in half the time: to check forms only.
        """
        self._load, self._vocab_size, self._eos, self._masks = load, vocab_size, list(eos_token_ids), masks
        self._vocabulary: LLTokenizer | None = None
        self._special: dict[str, int] = {}
        self._thread: ThreadPoolExecutor | None = None
        self._lock = threading.Lock()
        self._compiled: OrderedDict[bytes, Future[LLMatcher]] = OrderedDict()

    def prepare(self) -> Future[LLTokenizer]:
        """Begin with the vocabulary: whoever waits for this before serving spares everybody a pause.

        llguidance holds the interpreter's lock all the while. The future raises what the first form would.
        """
        with self._lock:
            return self._started().submit(self._prepared_vocabulary)

    @property
    def end_token_ids(self) -> list[int]:
        """The tokens that mean the end in masks; known once a form has been compiled."""
        return [] if self._vocabulary is None else list(self._vocabulary.eos_tokens)

    def compile(self, params: StructuredOutputsParams) -> Future[LLMatcher]:
        """The matcher of a form, at its beginning: to be copied, never advanced.

        The future raises GrammarError: the form is not supported, too large, or nothing satisfies it.
        """
        key = msgspec.msgpack.encode(params)
        with self._lock:
            found = self._compiled.get(key)
            if found is None:
                found = self._compiled[key] = self._started().submit(self._compile, params)
                while len(self._compiled) > CACHED_GRAMMARS:
                    self._compiled.popitem(last=False)
            self._compiled.move_to_end(key)
            return found

    def close(self) -> None:
        """Compile nothing more; what is being compiled is not waited for."""
        with self._lock:
            if self._thread is not None:
                self._thread.shutdown(wait=False, cancel_futures=True)

    def _started(self) -> ThreadPoolExecutor:
        if self._thread is None:
            self._thread = _deep_thread()
        return self._thread

    def _prepared_vocabulary(self) -> LLTokenizer:
        if self._vocabulary is None:
            tokenizer = self._tokenizer()
            self._special = {tokenizer.vocabulary_entry(i): i for i in tokenizer.special_ids}
            self._vocabulary = make_vocabulary(tokenizer, self._vocab_size, self._eos, slices=self._masks)
        return self._vocabulary

    def _compile(self, params: StructuredOutputsParams) -> LLMatcher:
        matcher = LLMatcher(
            self._prepared_vocabulary(), grammar_text(params, self._special), log_level=0, limits=_LIMITS
        )
        tried = matcher.deep_copy()  # what masks add to a matcher is not kept
        if not tried.is_error():
            mask = _timed_mask(tried, params.kind)
            if not tried.is_error() and not any(mask):
                raise GrammarError(f"{params.kind}: nothing satisfies it")
            token = _first_token(mask, self.end_token_ids)
            if not tried.is_error() and token is not None:  # some forms are found to be too large behind a token
                tried.consume_token(token)
                _timed_mask(tried, params.kind)
        if tried.is_error():
            raise GrammarError(f"{params.kind}: {_reason(tried.get_error())}")
        return matcher

    def _tokenizer(self) -> Tokenizer:
        try:
            return self._load()
        except ConfigError as error:
            raise GrammarError(f"structured_outputs needs a tokenizer: {error}") from error


def _timed_mask(matcher: LLMatcher, kind: str) -> bytes:
    began = time.thread_time()
    mask: bytes = matcher.compute_bitmask()
    if time.thread_time() - began > MAX_MASK_S:
        raise GrammarError(f"{kind}: too complex, finding the first tokens takes too long")
    return mask


def _first_token(mask: bytes, end_token_ids: Sequence[int]) -> int | None:
    """The lowest token in a mask that is not an end."""
    for place, byte in enumerate(mask):
        for bit in range(8) if byte else ():
            if byte >> bit & 1 and 8 * place + bit not in end_token_ids:
                return 8 * place + bit
    return None


def make_vocabulary(
    tokenizer: Tokenizer, vocab_size: int, eos_token_ids: list[int], *, slices: bool = True
) -> LLTokenizer:
    """The tokens as llguidance wants them. Takes 1 s for 150,000 tokens, without `slices` 0.4 s.

    Raises:
        GrammarError: the tokenizer's tokens do not stand for fixed bytes.
    """
    if not tokenizer.byte_tokenizer:
        raise GrammarError("structured_outputs needs a tokenizer whose tokens are bytes; this model's are not")
    # A model without an end gets one that no text needs; engine/constraints.py takes it out of the masks.
    known = [token for token in eos_token_ids if token < tokenizer.vocab_size]
    ends = known or [min(tokenizer.special_ids, default=tokenizer.vocab_size - 1)]
    tokens = _Tokens(tokenizer, max(vocab_size, tokenizer.vocab_size), ends)
    return LLTokenizer(TokenizerWrapper(tokens), eos_token=ends, slices=None if slices else [])


class _Tokens:
    """A tokenizer as llguidance's TokenizerWrapper takes it.

    Of a tokenizer.json llguidance takes every added token in angle brackets for a special one, which no text can hold:
    a model whose `</think>` is a plain token, as most are, could never end its reasoning.
    """

    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, size: int, ends: Sequence[int]) -> None:
        special = tokenizer.special_ids
        self.tokens = [SPECIAL_MARK * (i in special) + tokenizer.token_bytes(i) for i in range(size)]
        self.special_token_ids = sorted(special)
        self.eos_token_id = ends[0]
        self._tokenizer = tokenizer
        self._encode = lru_cache(ENCODED_TEXTS)(self._usual)

    def __call__(self, text: bytes) -> list[int]:
        """Where a form leaves no choice, llguidance asks for the tokens that the text usually has."""
        return self._encode(text)

    def _usual(self, text: bytes) -> list[int]:
        """Of exactly these bytes, whatever a tokenizer adds (SentencePiece: a space before a text, but for the mark),
        normalises, or takes for a special token: nothing else would satisfy the form."""
        for mark in ("", TEXT_MARK):
            before = self._tokenizer.encode(mark, add_special_tokens=False)
            ids = self._tokenizer.encode(mark + text.decode(), add_special_tokens=False)[len(before) :]
            if b"".join(self.tokens[i] for i in ids) == text:
                return ids
        return self._longest(text)

    def _longest(self, text: bytes) -> list[int]:
        """The longest token that fits, again and again; up to where none does."""
        ids, place = [], 0
        while place < len(text):
            lengths = range(min(self._most_bytes, len(text) - place), 0, -1)
            fits = (self._by_bytes[piece] for n in lengths if (piece := text[place : place + n]) in self._by_bytes)
            token = next(fits, None)
            if token is None:
                break
            ids.append(token)
            place += len(self.tokens[token])
        return ids

    @cached_property
    def _by_bytes(self) -> dict[bytes, int]:
        return {data: token for token, data in enumerate(self.tokens) if data and data[:1] != SPECIAL_MARK}

    @cached_property
    def _most_bytes(self) -> int:
        return max(map(len, self._by_bytes), default=0)


def grammar_text(params: StructuredOutputsParams, special_tokens: Mapping[str, int]) -> str:
    """llguidance's grammar of a form.

    Raises:
        GrammarError: it is malformed, too large, or known not to be followed exactly.
    """
    try:
        return _grammar_text(params, special_tokens)
    except RecursionError as error:
        raise GrammarError(f"{params.kind}: too deeply nested") from error
    except GrammarError:
        raise
    except ValueError as error:
        raise GrammarError(f"{params.kind}: {error}") from error


def _grammar_text(params: StructuredOutputsParams, special_tokens: Mapping[str, int]) -> str:
    kind = params.kind
    if kind == "json_object":
        return _json_grammar({"type": "object"}, params)
    if kind == "json":
        assert isinstance(params.json, str)
        return _json_grammar(_parsed(params.json, kind), params)
    if kind == "choice":
        assert params.choice is not None
        _check_size(kind, sum(map(len, params.choice)), MAX_CHOICE_CHARS)
        return _regex_grammar("|".join(map(_escaped, params.choice)))
    if kind == "regex":
        assert params.regex is not None
        _check_size(kind, len(params.regex), MAX_GRAMMAR_CHARS)
        return _regex_grammar(params.regex)
    if kind == "grammar":
        assert params.grammar is not None
        _check_size(kind, len(params.grammar), MAX_GRAMMAR_CHARS)
        return str(grammar_from("grammar", params.grammar))
    assert isinstance(params.structural_tag, str)

    def json_rule(schema: _Json) -> str:
        return f"%json {_prepared(schema, params)}"

    tag = _parsed(params.structural_tag, kind)
    return structural_tag_grammar(tag, special_tokens, json_rule, _regex_rule)


def _json_grammar(schema: _Json, params: StructuredOutputsParams) -> str:
    return str(LLMatcher.grammar_from_json_schema(_prepared(schema, params)))


def _prepared(schema: _Json, params: StructuredOutputsParams) -> str:
    """A schema's text, checked, with the rules of whitespace in it."""
    _check_schema(schema)
    for part in _schemas(schema):
        _leave_out_annotations(part)
        if params.disable_additional_properties:
            _close_object(part)
    options: _Json = {"whitespace_pattern": params.whitespace_pattern or JSON_WHITESPACE}
    if params.disable_any_whitespace:
        options = {"whitespace_flexible": False}
    given = schema.get("x-guidance")
    if isinstance(given, dict):
        options |= given
    try:
        return json.dumps(schema | {"x-guidance": options}, ensure_ascii=False, allow_nan=False)
    except ValueError as error:
        raise ValueError("numbers must be finite") from error


def _check_schema(schema: _Json) -> None:
    """Refuse what would take too long, and what the grammar would not hold an output to."""
    properties = patterns = 0
    for part in _objects(schema):
        for field, most in (("properties", MAX_PROPERTIES), ("patternProperties", MAX_PATTERN_PROPERTIES)):
            found = part.get(field)
            if isinstance(found, dict):
                properties += len(found) if field == "properties" else 0
                patterns += len(found) if field == "patternProperties" else 0
                if (properties if field == "properties" else patterns) > most:
                    raise ValueError(f"{field}: at most {most} in a schema")
        # Keys that the schema does not list may be written twice, and then count as one.
        least, required = part.get("minProperties"), part.get("required")
        listed = len(set(map(str, required))) if isinstance(required, list) else 0
        if isinstance(least, int) and least > listed + 1:
            raise ValueError("minProperties: supported up to one more than there are required properties")


def _objects(value: Any) -> Iterator[_Json]:
    """All JSON objects in a value, itself included."""
    if isinstance(value, dict):
        yield value
        for part in value.values():
            yield from _objects(part)
    elif isinstance(value, list):
        for part in value:
            yield from _objects(part)


def _schemas(schema: Any) -> Iterator[_Json]:
    """A schema, and all that stand in it where schemas do; not what only looks like one, in a `const` say."""
    if isinstance(schema, list):
        for part in schema:
            yield from _schemas(part)
    if not isinstance(schema, dict):
        return
    for field in _MAPS_OF_SCHEMAS:
        found = schema.get(field)
        for part in found.values() if isinstance(found, dict) else ():
            yield from _schemas(part)
    for field in _SCHEMAS:
        yield from _schemas(schema.get(field))
    yield schema


def _leave_out_annotations(schema: _Json) -> None:
    """What demands nothing: a format that JSON Schema does not define ("password", as Pydantic writes it), and items
    that need not be unique."""
    kind = schema.get("format")
    if isinstance(kind, str) and kind not in _FORMATS:
        del schema["format"]
    if schema.get("uniqueItems") is False:
        del schema["uniqueItems"]


def _close_object(schema: _Json) -> None:
    """An object that lists properties gets no others, unless it says something about others."""
    if "properties" in schema or "patternProperties" in schema:
        schema.setdefault("additionalProperties", False)


def _regex_grammar(regex: str) -> str:
    return f"start: {_regex_rule(regex)}"


def _regex_rule(regex: str) -> str:
    r"""A regular expression in a grammar; \d, \w and \s are ASCII, as where people come from."""
    return f"/{regex_to_lark(regex, 'dws')}/"


def _escaped(text: str) -> str:
    """A regular expression that matches the text only."""
    return "".join(c if c.isalnum() or c in " _" or ord(c) > 127 else f"\\x{ord(c):02x}" for c in text)


def _parsed(text: str, kind: str) -> _Json:
    _check_size(kind, len(text), MAX_SCHEMA_CHARS)
    try:
        value = json.loads(text)
    except ValueError as error:
        raise ValueError(f"not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError("must be a JSON object")
    return value


def _check_size(kind: str, size: int, most: int) -> None:
    if size > most:
        raise GrammarError(f"{kind}: at most {most} characters, got {size}")


def _reason(error: str) -> str:
    """llguidance's reason, on one line, keywords first."""
    reason = " ".join(error.removesuffix("<non-verbose/>").split())
    return reason.replace("Unimplemented keys:", "unsupported keywords:")


def _deep_thread() -> ThreadPoolExecutor:
    """One thread whose stack is as deep as grammars may be; others that start just now get one, too."""
    thread = ThreadPoolExecutor(1, thread_name_prefix="grammars")
    before = threading.stack_size(COMPILE_STACK_BYTES)
    try:
        thread.submit(int).result()
    finally:
        threading.stack_size(before)
    return thread
