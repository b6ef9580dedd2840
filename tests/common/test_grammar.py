"""Forms of outputs as grammars: what they allow, what is refused and how it is said, and what may not take long."""

from __future__ import annotations

import json
import random
import re
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from llguidance import LLTokenizer
from tokenizers import AddedToken, normalizers

from penstock.common.grammar import (
    CACHED_GRAMMARS,
    MAX_GRAMMAR_CHARS,
    MAX_PATTERN_PROPERTIES,
    MAX_PROPERTIES,
    MAX_SCHEMA_CHARS,
    GrammarError,
    Grammars,
    make_vocabulary,
)
from penstock.common.structured_outputs import StructuredOutputsParams
from penstock.common.tokenizer import Tokenizer
from tests.schemas import random_schema, validate, walk
from tests.tiny_tokenizers import byte_level, byte_level_backend, sentencepiece, sentencepiece_backend, wordpiece

END = 2  # <|im_end|>
Form = StructuredOutputsParams


@pytest.fixture(scope="module")
def grammars() -> Grammars:
    return Grammars(byte_level, byte_level().vocab_size, [END])


def outputs(grammars: Grammars, form: Form, count: int = 8) -> list[str]:
    """Texts that a form allows, each drawn at random."""
    matcher = grammars.compile(form).result()
    found = [walk(matcher, random.Random(seed), [END]) for seed in range(count)]
    return [byte_level().decode(tokens, skip_special_tokens=False) for tokens in found if tokens is not None]


def refusal(grammars: Grammars, **form: Any) -> str:
    with pytest.raises(GrammarError) as error:
        grammars.compile(Form(**form)).result()
    return str(error.value)


def test_the_vocabulary_is_prepared_once() -> None:
    loads: list[Tokenizer] = []

    def load() -> Tokenizer:
        loads.append(byte_level())
        return loads[-1]

    early = Grammars(load, byte_level().vocab_size, [END])
    early.prepare().result()
    assert len(loads) == 1 and early.end_token_ids == [END]
    early.compile(Form(regex="a")).result()
    early.prepare().result()
    assert len(loads) == 1
    early.close()


def test_what_cannot_be_prepared_is_told_by_the_first_form() -> None:
    unable = Grammars(wordpiece, wordpiece().vocab_size, [END])
    with pytest.raises(GrammarError, match="whose tokens are bytes"):
        unable.prepare().result()
    assert "whose tokens are bytes" in refusal(unable, regex="a")
    unable.close()


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32))
def test_outputs_follow_their_schema(grammars: Grammars, seed: int) -> None:
    rng = random.Random(seed)
    schema = random_schema(rng)
    matcher = grammars.compile(Form(json=schema, disable_any_whitespace=seed % 2 == 0)).result()
    tokens = walk(matcher, rng, [END])
    if tokens is not None:
        validate(schema, byte_level().decode(tokens, skip_special_tokens=False))


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32))
def test_a_keyword_that_is_not_supported_is_named(grammars: Grammars, seed: int) -> None:
    schema = random_schema(random.Random(seed), unsupported=True)
    keywords = "not|uniqueItems|contains|propertyNames|dependentRequired|if|unevaluatedProperties|minProperties"
    assert re.search(keywords, refusal(grammars, json=schema))


@pytest.mark.parametrize(
    ("form", "pattern"),
    [
        ({"regex": r"\d{2}-[A-F]+"}, r"[0-9]{2}-[A-F]+"),
        ({"regex": r"^a/b\.\w$"}, r"a/b\.[0-9A-Za-z_]"),
        ({"choice": ["yes", "no", 'a "b"', "1+1", "水\n"]}, r'yes|no|a "b"|1\+1|水\n'),
        ({"grammar": 'start: "x" y\ny: /[0-9]/ | "z"'}, r"x([0-9]|z)"),
        ({"grammar": 'root ::= "x" y\ny ::= [0-9] | "z"'}, r"x([0-9]|z)"),
        ({"json": {"enum": [1, "a"]}}, r'1|"a"'),
        ({"json": '{"const": null}'}, "null"),
    ],
    ids=str,
)
def test_kinds(grammars: Grammars, form: dict[str, Any], pattern: str) -> None:
    found = outputs(grammars, Form(**form))
    assert found and all(re.fullmatch(pattern, text) for text in found), found


def test_json_objects_and_their_whitespace(grammars: Grammars) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "null"}}, "required": ["a"]}
    closed = Form(json=schema, disable_additional_properties=True, disable_any_whitespace=True)
    assert set(outputs(grammars, closed)) == {'{"a":null}'}
    loose = outputs(grammars, Form(json=schema, disable_additional_properties=True), 40)
    assert len(set(loose)) > 5
    assert all(json.loads(text) == {"a": None} for text in loose)
    assert not any("\n\n" in text or re.search(r"[^\s] {2}", text) for text in loose)  # no room for endless blanks
    dashes = Form(json=schema, disable_additional_properties=True, whitespace_pattern=" {3}")
    assert all(re.fullmatch(r'\{( {3})?"a"( {3})?:( {3})?null( {3})?\}', text) for text in outputs(grammars, dashes))
    assert all(isinstance(json.loads(text), dict) for text in outputs(grammars, Form(json_object=True), 20))


def test_objects_are_closed_where_schemas_stand(grammars: Grammars) -> None:
    schema = {
        "properties": {"properties": {"type": "object", "properties": {"x": {"const": 1}}, "required": ["x"]}},
        "required": ["properties"],
        "type": "object",
        "default": {"properties": 3},
    }
    form = Form(json=schema, disable_additional_properties=True, disable_any_whitespace=True)
    assert set(outputs(grammars, form)) == {'{"properties":{"x":1}}'}


def test_what_demands_nothing_is_left_out(grammars: Grammars) -> None:
    schema = {
        "type": "object",
        "properties": {
            "secret": {"type": "string", "format": "password", "maxLength": 1},
            "few": {"type": "array", "items": {"const": {"format": "x"}}, "uniqueItems": False, "maxItems": 1},
        },
        "required": ["secret", "few"],
    }
    found = outputs(grammars, Form(json=schema, disable_additional_properties=True, disable_any_whitespace=True), 30)
    assert {str(json.loads(text)["few"]) for text in found} == {"[]", "[{'format': 'x'}]"}
    known = {"type": "string", "format": "ipv4"}
    assert all(re.fullmatch(r'"[0-9.]+"', text) for text in outputs(grammars, Form(json=known)))


@pytest.mark.parametrize("required", [False, True])
def test_as_many_properties_as_are_promised(grammars: Grammars, required: bool) -> None:
    names = [f"p{i}" for i in range(MAX_PROPERTIES)]
    schema: dict[str, Any] = {"type": "object", "properties": {name: {"const": 1} for name in names}}
    schema |= {"additionalProperties": False, "required": names if required else []}
    matcher = grammars.compile(Form(json=schema, disable_any_whitespace=True)).result().deep_copy()
    written = names if required else names[::100]
    text = json.dumps(dict.fromkeys(written, 1), separators=(",", ":"))
    assert matcher.consume_tokens(byte_level().encode(text, add_special_tokens=False)) and not matcher.is_error()
    assert matcher.is_accepting()


def test_what_proves_too_large_behind_its_first_token_is_refused(grammars: Grammars) -> None:
    assert "regex" in refusal(grammars, regex="(((a{100}){100}){100})")


TAG = {"begin": "<f=add>", "content": {"type": "json_schema", "json_schema": {"const": 7}}, "end": "</f>"}
OLD = {"triggers": ["<f="], "structures": [{"begin": "<f=add>", "schema": {"const": 7}, "end": "</f>"}]}
TRIGGERED = {"type": "triggered_tags", "triggers": ["<f="], "tags": [TAG]}


@pytest.mark.parametrize(
    ("tag", "right", "wrong"),
    [
        (OLD, ["", "text", "a<f=add>7</f>b<f=add>7</f>", "a < b"], ["<f=sub", "<f=add>8", "<f=add>7</g"]),
        ({"format": TRIGGERED}, ["", "a<f=add>7</f>b"], ["<f=add>8"]),
        ({"format": TRIGGERED | {"at_least_one": True}}, ["<f=add>7</f>", "<f=add>7</f>b<f=add>7</f>"], ["", "a"]),
        ({"format": TRIGGERED | {"stop_after_first": True}}, ["", "ab", "a<f=add>7</f>"], ["a<f=add>7</f>b"]),
        (
            {"format": {"type": "tags_with_separator", "tags": [TAG], "separator": ";", "at_least_one": True}},
            ["<f=add>7</f>", "<f=add>7</f>;<f=add>7</f>"],
            ["", "<f=add>7</f>;;"],
        ),
        (
            {"format": {"type": "sequence", "elements": [
                {"type": "tag", "begin": "<think>", "content": {"type": "any_text"}, "end": "</think>"},
                {"type": "or", "elements": [
                    {"type": "const_string", "value": "yes"}, {"type": "regex", "pattern": "n/o{1,3}"},
                ]},
            ]}},
            ["<think>so\n</think>yes", "<think></think>n/oo"],
            ["yes", "<think></think>maybe"],
        ),
        (
            {"format": {"type": "tag", "begin": "<s>x", "content": {"type": "any_text"}, "end": "<|im_start|>"}},
            ["<s>xabc<|im_start|>"],
            ["x"],
        ),
    ],
    ids=lambda value: str(value)[:60],
)  # fmt: skip
def test_structural_tags(grammars: Grammars, tag: dict[str, Any], right: list[str], wrong: list[str]) -> None:
    matcher = grammars.compile(Form(structural_tag={"type": "structural_tag", **tag})).result()
    for text in right + wrong:
        trial = matcher.deep_copy()
        tokens = byte_level().encode(text, add_special_tokens=False)
        taken = trial.try_consume_tokens(tokens) == len(tokens)
        assert (taken and trial.is_accepting()) is (text in right), text


@pytest.mark.parametrize(
    ("form", "reason"),
    [
        ({"regex": "(a"}, "unclosed group"),
        ({"regex": r"(a)\1"}, "backreferences"),
        ({"regex": "(?=a)b"}, "look-around"),
        ({"grammar": "start: nowhere"}, "nowhere"),
        ({"grammar": 'root ::= "a'}, "grammar"),
        ({"json": "{"}, "JSON"),
        ({"json": "[1]"}, "JSON object"),
        ({"json": {"type": "strnig"}}, "strnig"),
        ({"json": {"type": "string", "format": "iri"}}, "iri"),
        ({"json": {"$ref": "#/$defs/nowhere"}}, "nowhere"),
        ({"json": {"$ref": "#"}}, "json"),
        ({"json": {"allOf": [{"type": "string"}, {"type": "null"}]}}, "Unsatisfiable"),
        ({"json": {"type": "object"}, "whitespace_pattern": "["}, "character class"),
        ({"json": '{"minimum": 1e999}'}, "finite"),
        ({"structural_tag": "{}"}, "structures"),
        ({"structural_tag": {"format": {"type": "tag", "begin": "a"}}}, "content"),
        ({"structural_tag": OLD | {"triggers": ["<g="]}}, "triggers"),
    ],
    ids=str,
)
def test_reasons(grammars: Grammars, form: dict[str, Any], reason: str) -> None:
    said = refusal(grammars, **form)
    assert said.startswith(f"{next(iter(form))}: ") and reason in said, said


DEEP = {"$defs": {f"d{i}": {"properties": {"a": {"$ref": f"#/$defs/d{i + 1}"}}} for i in range(1800)}}
HOSTILE: list[dict[str, Any]] = [
    {"regex": "a" * (MAX_GRAMMAR_CHARS + 1)},
    {"regex": "(" * 9000 + "a" + ")" * 9000},
    {"grammar": "start: " + "(" * 9000 + '"a"' + ")" * 9000},
    {"grammar": "root ::= " + "(" * 9000 + '"a"' + ")" * 9000},
    {"grammar": "start: T0\n" + "\n".join(f"T{i}: T{i + 1} T{i + 1}" for i in range(40)) + '\nT40: "a"'},
    {"json": '{"a":' * 20_000},
    {"json": {"description": "x" * MAX_SCHEMA_CHARS}},
    {"json": {"properties": {f"p{i}": {} for i in range(MAX_PROPERTIES + 1)}}},
    {"json": {"patternProperties": {f"^p{i}$": {} for i in range(MAX_PATTERN_PROPERTIES + 1)}}},
    {"json": {"$defs": {"a": {"allOf": [{"$ref": "#/$defs/a"}, {"type": "string"}]}}, "$ref": "#/$defs/a"}},
    {"choice": ["x" * 150_000, "y" * 150_000]},
]


@pytest.mark.parametrize("form", HOSTILE, ids=lambda form: str(form)[:40])
def test_hostile_forms_are_refused(grammars: Grammars, form: dict[str, Any]) -> None:
    assert refusal(grammars, **form)


def test_deep_forms_do_not_overflow_the_stack(grammars: Grammars) -> None:
    deep = DEEP["$defs"] | {"d1800": {"const": 1}}
    grammars.compile(Form(json={"$defs": deep, "$ref": "#/$defs/d0"})).result()
    chain = "start: r0\n" + "\n".join(f"r{i}: r{i + 1}" for i in range(2000)) + '\nr2000: "a"'
    assert outputs(grammars, Form(grammar=chain), 1) == ["a"]


def test_latest_forms_are_kept(grammars: Grammars) -> None:
    form = Form(regex="kept")
    first = grammars.compile(form)
    assert grammars.compile(Form(regex="kept")) is first
    for i in range(CACHED_GRAMMARS):
        grammars.compile(Form(regex=f"other{i}")).result()
    assert grammars.compile(form) is not first


@pytest.mark.parametrize(
    ("tokenizer", "definition"),
    [(byte_level(), byte_level_backend().to_str()), (sentencepiece(), sentencepiece_backend().to_str())],
    ids=["byte level", "sentencepiece"],
)
def test_tokens_mean_the_bytes_that_llguidance_reads_itself(tokenizer: Tokenizer, definition: str) -> None:
    size = tokenizer.vocab_size + 40
    vocabulary = make_vocabulary(tokenizer, size, [])  # padded, and without an end
    theirs = LLTokenizer(definition, n_vocab=size, eos_token=vocabulary.eos_tokens)
    assert vocabulary.vocab_size == size
    assert set(vocabulary.eos_tokens) <= tokenizer.special_ids
    for token in range(tokenizer.vocab_size):
        assert vocabulary.decode_bytes([token]) == theirs.decode_bytes([token]), token


def spaced_sentencepiece() -> Tokenizer:
    """As Llama 2 and Mistral have it: a space goes before every text."""
    backend = tokenizers.Tokenizer.from_str(sentencepiece_backend().to_str())
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return Tokenizer(backend)


def composing_byte_level() -> Tokenizer:
    """As Qwen has it: accents become one character with their letter."""
    backend = tokenizers.Tokenizer.from_str(byte_level_backend().to_str())
    backend.normalizer = normalizers.NFC()
    return Tokenizer(backend)


@pytest.mark.parametrize("tokenizer", [spaced_sentencepiece(), composing_byte_level()], ids=["spaced", "composing"])
@pytest.mark.parametrize("text", ["the water", " the water", "e\u0301 and é", "a<s>b</s>", "\x02 水, 🙂"])
def test_a_dictated_text_has_its_own_bytes(tokenizer: Tokenizer, text: str) -> None:
    grammars = Grammars(lambda: tokenizer, tokenizer.vocab_size, [END])
    matcher, said = grammars.compile(Form(choice=[text])).result().deep_copy(), b""
    while said != text.encode():
        mask = matcher.compute_bitmask()
        allowed = [i for i in range(tokenizer.vocab_size) if mask[i // 8] >> i % 8 & 1 and i != END]
        assert allowed and matcher.consume_token(allowed[0]), said
        said += tokenizer.token_bytes(allowed[0])
        assert text.encode().startswith(said)
    assert matcher.is_accepting()


def test_text_has_every_plain_token_and_no_special_one() -> None:
    """Models that reason have <think> and </think> as plain tokens. Special ones stand where a form names them only."""
    backend = tokenizers.Tokenizer.from_str(byte_level_backend().to_str())
    backend.add_tokens([AddedToken(text, special=False) for text in ("<think>", "</think>")])
    backend.add_special_tokens([AddedToken("</secret>", special=True)])
    tokenizer = Tokenizer(backend)
    grammars = Grammars(lambda: tokenizer, tokenizer.vocab_size + 8, [END])

    def allowed(form: Form, *before: str) -> set[str]:
        matcher = grammars.compile(form).result().deep_copy()
        assert matcher.consume_tokens([tokenizer.token_id(text) for text in before])
        mask = matcher.compute_bitmask()
        return {tokenizer.vocabulary_entry(i) for i in range(tokenizer.vocab_size + 8) if mask[i // 8] >> i % 8 & 1}

    plain = {"<think>", "</think>", "<tool call>"}
    special = {"<s>", "<|im_start|>", "</secret>"}
    text = allowed(Form(regex="(.|\\n)*"))
    assert plain <= text and not special & text and "" not in text, "of padding nothing may come"
    assert allowed(Form(structural_tag=reasons("</think>"))) >= plain
    after = allowed(Form(structural_tag=reasons("</think>")), "<think>", "</think>")
    assert {text[0] for text in after} == {"{"}
    assert special & allowed(Form(structural_tag=reasons("</secret>"))) == {"</secret>"}
    assert allowed(Form(structural_tag=reasons("</secret>")), "a", "</secret>") == after


def reasons(end: str) -> dict[str, Any]:
    """Free text up to a token, then an object."""
    tag = {"type": "tag", "begin": "", "content": {"type": "any_text"}, "end": end}
    answer = {"type": "json_schema", "json_schema": {"type": "object"}}
    return {"format": {"type": "sequence", "elements": [tag, answer]}}


def test_other_tokenizers_are_refused() -> None:
    grammars = Grammars(wordpiece, wordpiece().vocab_size, [1])
    assert "tokenizer" in refusal(grammars, regex="a")


@pytest.mark.parametrize(
    "fields",
    [{}, {"json_object": False}, {"regex": "a", "json_object": True}, {"choice": []}, {"choice": [""]}],
    ids=str,
)
def test_exactly_one_kind(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"structured_outputs|choice"):
        Form(**fields)
