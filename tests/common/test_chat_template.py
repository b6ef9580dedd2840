"""Templates render as transformers renders them, and refuse what they refuse as a bad request."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from penstock.common.chat_template import ChatTemplate
from penstock.common.errors import BadRequest, ConfigError
from tests.tiny_tokenizers import SETTINGS, TEMPLATE, byte_level, byte_level_backend

TRIMMING = (
    "{%- for message in messages %}\n"
    "    {%- if loop.index0 > 8 %}{% break %}{% endif %}\n"
    "    {%- if message.role not in ['system', 'user', 'assistant'] %}{{ raise_exception('odd role') }}{% endif %}\n"
    "    {{- '[' + message['role'] + '] ' + message['content'] | trim + eos_token }}\n"
    "{%- endfor %}\n"
    "{%- if add_generation_prompt %}\n{{- '[assistant] ' }}\n{%- endif %}"
)
GENERATION = (
    "{% for m in messages %}\n  {% if m.role == 'assistant' %}\n"
    "{% generation %}{{ m.content }}{% endgeneration %}\n"
    "  {% else %}\n{{ m.role | tojson }} {{ m.content }}\n{% endif %}{% endfor %}"
)
VARIABLES = (
    "{{ bos_token }}{{ flag }}{{ messages | map(attribute='content') | join('|') }}"
    "{{ {'a': '<é>'} | tojson(indent=1) }}"
)
CHATS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "Hello <b>&'\"</b> 😀  "}],
    [
        {"role": "system", "content": " be brief "},
        {"role": "user", "content": "a\n\nb"},
        {"role": "assistant", "content": "the answer \n"},
    ],
]


def oracle(template: str) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=byte_level_backend(), bos_token="<s>", eos_token="<|im_end|>", chat_template=template
    )


@pytest.mark.parametrize("chat", CHATS, ids=["one", "three"])
@pytest.mark.parametrize("options", [{}, {"add_generation_prompt": True}, {"continue_final_message": True}], ids=str)
@pytest.mark.parametrize("template", [TEMPLATE, TRIMMING, GENERATION, VARIABLES], ids=["chatml", "trim", "gen", "vars"])
def test_same_text_as_transformers(template: str, options: dict[str, bool], chat: list[dict[str, Any]]) -> None:
    expected = oracle(template).apply_chat_template(chat, tokenize=False, flag="F", **options)
    ours = ChatTemplate(template, byte_level().special_tokens)
    options = {"add_generation_prompt": False} | options
    assert ours.render(chat, variables={"flag": "F"}, **options) == expected


TOOLS = [{"type": "function", "function": {"name": "f", "description": "é", "parameters": {"type": "object"}}}]
DOCUMENTS = [{"title": "t", "text": "<x>"}]
WITH_TOOLS = (
    "{{ tools | tojson(indent=2) }}{% for d in documents or [] %}{{ d.title }}:{{ d.text }}{% endfor %}"
    "{% for m in messages %}{{ m.role }}"
    "{% if m.content is none or m.content is undefined %}-{% else %}{{ m.content }}{% endif %}"
    "{% for c in m.tool_calls or [] %}{{ c.function.arguments | tojson }}{% endfor %}{% endfor %}"
)


@pytest.mark.parametrize("given", [{}, {"tools": TOOLS}, {"tools": TOOLS, "documents": DOCUMENTS}], ids=str)
def test_tools_and_documents_as_transformers_give_them(given: dict[str, Any]) -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": {"a": "é"}}}
    chat = [*CHATS[0], {"role": "assistant", "content": None, "tool_calls": [call]}, {"role": "tool", "content": "1"}]
    expected = oracle(WITH_TOOLS).apply_chat_template(chat, tokenize=False, **given)
    assert ChatTemplate(WITH_TOOLS).render(chat, **given, add_generation_prompt=False) == expected


def test_a_template_of_its_own_for_tools() -> None:
    template = ChatTemplate("plain", with_tools="{{ tools | length }} tools")
    assert template.render(CHATS[0]) == template.render(CHATS[0], tools=[]) == "plain"
    assert template.render(CHATS[0], tools=TOOLS) == "1 tools"


def test_a_message_of_parts_is_continued() -> None:
    parts = "{% for m in messages %}{% for p in m.content %}[{{ p.text }}]{% endfor %}{% endfor %}"
    chat = [{"role": "assistant", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
    assert ChatTemplate(parts).render(chat, continue_final_message=True) == "[a][b"


def test_same_tokens_as_transformers() -> None:
    text = ChatTemplate(TEMPLATE, SETTINGS).render(CHATS[1])
    expected = oracle(TEMPLATE).apply_chat_template(CHATS[1], add_generation_prompt=True, return_dict=False)
    assert byte_level().encode(text, add_special_tokens=False) == expected


def test_refusals_are_bad_requests() -> None:
    with pytest.raises(BadRequest, match="odd role"):
        ChatTemplate(TRIMMING).render([{"role": "pirate", "content": "arr"}])
    with pytest.raises(BadRequest, match="cannot render"):
        ChatTemplate("{{ messages[0].content + 1 }}").render([{"role": "user", "content": "x"}])
    with pytest.raises(BadRequest, match="continue_final_message"):
        ChatTemplate("fixed").render([{"role": "user", "content": "x"}], continue_final_message=True)
    with pytest.raises(BadRequest, match="messages"):
        ChatTemplate("{{ messages.append(1) }}").render([{"role": "user", "content": "x"}])
    with pytest.raises(BadRequest, match="unsafe"):
        ChatTemplate("{{ ''.__class__.__mro__ }}").render([])


def test_client_variables_cannot_replace_the_messages() -> None:
    template = ChatTemplate("{{ messages[0].content }}")
    assert template.render([{"content": "real"}], variables={"messages": [{"content": "forged"}], "self": 1}) == "real"


def test_loading(tmp_path: Path) -> None:
    assert ChatTemplate.load(byte_level()) is not None
    (tmp_path / "t.jinja").write_text("{{ eos_token }}!")
    loaded = ChatTemplate.load(byte_level(), str(tmp_path / "t.jinja"))
    assert loaded is not None and loaded.render([]) == "<|im_end|>!"
    with pytest.raises(ConfigError, match="chat-template"):
        ChatTemplate.load(byte_level(), str(tmp_path / "absent"))
    with pytest.raises(ConfigError, match="not valid"):
        ChatTemplate("{% if %}")
