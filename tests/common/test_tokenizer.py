"""Loading from Hugging Face files, encoding with and without special tokens, bytes of tokens."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.common.errors import ConfigError
from penstock.common.tokenizer import Tokenizer
from tests.tiny_tokenizers import SETTINGS, TEMPLATE, byte_level, byte_level_backend, sentencepiece, wordpiece


def write_folder(folder: Path, **settings: object) -> Path:
    byte_level_backend().save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(SETTINGS | settings))
    return folder


def test_load_reads_tokens_specials_and_template(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(str(write_folder(tmp_path)))
    assert tokenizer.special_tokens == {"bos_token": "<s>", "eos_token": "<|im_end|>"}
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 2)
    assert tokenizer.special_ids == {0, 1, 2}
    assert tokenizer.chat_templates == {"default": TEMPLATE}
    assert tokenizer.vocab_size == byte_level_backend().get_vocab_size()
    assert tokenizer.decode(tokenizer.encode("water falls")) == "water falls"


def test_template_file_wins_and_named_templates_are_kept(tmp_path: Path) -> None:
    named = [{"name": "default", "template": "a"}, {"name": "tool_use", "template": "b"}]
    folder = write_folder(tmp_path, chat_template=named)
    assert Tokenizer.load(str(folder)).chat_templates == {"default": "a", "tool_use": "b"}
    (folder / "chat_template.jinja").write_text("from the file")
    assert Tokenizer.load(str(folder)).chat_templates == {"default": "from the file", "tool_use": "b"}


@pytest.mark.parametrize(("setting", "expected"), [(True, [0]), (False, []), (None, [])])
def test_add_bos_token(tmp_path: Path, setting: bool | None, expected: list[int]) -> None:
    extra = {} if setting is None else {"add_bos_token": setting}
    tokenizer = Tokenizer.load(str(write_folder(tmp_path, **extra)))
    plain = tokenizer.encode("water", add_special_tokens=False)
    assert tokenizer.encode("water") == expected + plain


def test_explicit_false_overrules_the_post_processor() -> None:
    backend = sentencepiece()._backend
    assert sentencepiece().encode("a") == [1, *sentencepiece().encode("a", add_special_tokens=False)]
    assert Tokenizer(backend, {"bos_token": "<s>", "add_bos_token": False}).encode("a")[:1] != [1]


def test_missing_and_broken_files_are_config_errors(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no tokenizer\.json"):
        Tokenizer.load(str(tmp_path))
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ConfigError, match="cannot be read"):
        Tokenizer.load(str(tmp_path))
    with pytest.raises(ConfigError, match="not a folder"):
        Tokenizer.load(str(tmp_path / "absent"))
    write_folder(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[1]")
    with pytest.raises(ConfigError, match=r"tokenizer_config\.json"):
        Tokenizer.load(str(tmp_path))


@pytest.mark.parametrize("name", ["chat_template.jinja", "additional_chat_templates/tool_use.jinja"])
def test_a_template_that_is_no_text_is_named(tmp_path: Path, name: str) -> None:
    path = write_folder(tmp_path) / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"\xff\xfe{{ messages }}")
    with pytest.raises(ConfigError, match=f"{name} cannot be read"):
        Tokenizer.load(str(tmp_path))


@given(st.lists(st.integers(0, 399), max_size=12))
def test_bytes_of_byte_level_tokens_join_to_the_text(ids: list[int]) -> None:
    tokenizer = byte_level()
    joined = b"".join(map(tokenizer.token_bytes, ids)).decode("utf-8", errors="replace")
    assert joined == tokenizer.decode(ids, skip_special_tokens=False)


def test_token_text_keeps_leading_spaces_and_survives_any_id() -> None:
    tokenizer = sentencepiece()
    assert tokenizer.token_text(tokenizer._backend.token_to_id("▁the")) == " the"
    assert tokenizer.token_bytes(3 + 0xF0) == b"\xf0"
    assert tokenizer.token_text(3 + 0xF0) == "\ufffd"
    assert tokenizer.token_bytes(10**6) == b""
    assert byte_level().token_text(byte_level()._backend.token_to_id("<tool call>")) == "<tool call>"
    assert byte_level().byte_tokenizer and tokenizer.byte_tokenizer and not wordpiece().byte_tokenizer


def test_long_texts_have_the_same_ids() -> None:
    text = "The gate opens, 漢字 and 😀. <s>" * 200
    for tokenizer in (byte_level(), sentencepiece(), wordpiece()):
        for special in (True, False):
            expected = tokenizer._backend.encode(text, add_special_tokens=special).ids
            assert tokenizer.encode(text, special) == expected


@given(st.lists(st.sampled_from(["<|im_start|>", "<tool call>", " penstock", "the", "▁wa", "ter", "ß", "😀", "\n"])))
def test_no_text_has_more_characters_than_its_tokens_can_stand_for(parts: list[str]) -> None:
    text = "".join(parts)
    for tokenizer in (byte_level(), sentencepiece()):
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert len(text) <= len(ids) * tokenizer.longest_token_chars


def test_the_largest_id_is_known() -> None:
    for tokenizer in (byte_level(), sentencepiece(), wordpiece()):
        last = tokenizer.largest_id
        assert tokenizer.vocabulary_entry(last) and not tokenizer.vocabulary_entry(last + 1)


def test_the_longest_token_is_known_in_characters() -> None:
    assert byte_level().longest_token_chars == max(len(byte_level().token_text(i)) for i in range(404))
