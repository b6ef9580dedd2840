"""`litellm` and `langchain-openai` on real fleets. Both are large: they are installed by the extra `contract`.

With TEST_CONTRACT set their absence is a failure: .ci/run installs them and sets it.
"""

from __future__ import annotations

import asyncio
import gc
import os
import warnings
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from tests.system.openai_servers import CONTEXT, KEY, TEXT, Server

if not os.environ.get("TEST_CONTRACT"):
    pytest.importorskip("litellm", reason="the extra `contract` is not installed")
    pytest.importorskip("langchain_openai", reason="the extra `contract` is not installed")

# Their own use of other packages' deprecated names is not ours to mend.
pytestmark = [
    pytest.mark.system,
    pytest.mark.filterwarnings("ignore::DeprecationWarning:litellm"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:langchain_core"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # they leave event loops and connections to the collector
]
USER = {"role": "user", "content": "Why does it fill?"}
GREEDY: dict[str, Any] = {"temperature": 0.0, "max_tokens": 8}


@pytest.fixture(scope="module", autouse=True)
def _their_garbage() -> Iterator[None]:
    """What they leave unclosed is collected here, not in somebody else's test."""
    yield
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()


def expected(server: Server) -> str:
    fields: Any = {"model": "tiny", "messages": [USER], **GREEDY}
    return server.client.chat.completions.create(**fields).choices[0].message.content or ""


# ------------------------------------------------------------ litellm


def lite(server: Server, **fields: Any) -> dict[str, Any]:
    values = {"model": "openai/tiny", "api_base": f"{server.fleet.url}/v1", "api_key": KEY, "num_retries": 0}
    return values | {"messages": [USER], "timeout": 60} | GREEDY | fields


def test_litellm_chats(server: Server) -> None:
    import litellm

    text = expected(server)
    whole: Any = litellm.completion(**lite(server, seed=3, n=1, stop=["never in there"]))
    assert whole.choices[0].message.content == text and whole.usage.completion_tokens > 0
    chunks = list(litellm.completion(**lite(server, stream=True, stream_options={"include_usage": True})))
    joined: Any = litellm.stream_chunk_builder(chunks)
    assert joined.choices[0].message.content == text
    assert joined.usage.completion_tokens == whole.usage.completion_tokens
    scored: Any = litellm.completion(**lite(server, logprobs=True, top_logprobs=2))
    assert len(scored.choices[0].logprobs.content) == whole.usage.completion_tokens


def test_litellm_completions_responses_and_messages(server: Server) -> None:
    import litellm

    fields = lite(server, prompt=TEXT)
    del fields["messages"]
    completion: Any = litellm.text_completion(**fields | {"model": "text-completion-openai/tiny"})
    plain = server.client.completions.create(model="tiny", prompt=TEXT, **GREEDY)
    assert completion.choices[0].text == plain.choices[0].text
    fields = lite(server, input=USER["content"], max_output_tokens=8)
    for name in ("messages", "max_tokens", "num_retries"):
        del fields[name]
    response: Any = litellm.responses(**fields)
    assert response.output[0].content[0].text == expected(server)
    anthropic = lite(server, model="anthropic/tiny", api_base=server.fleet.url)
    message: Any = litellm.completion(**anthropic)
    assert message.choices[0].message.content == expected(server)


def test_litellm_async(server: Server) -> None:
    import litellm

    async def ask() -> str:
        # A client of ours: litellm's own outlives the event loop.
        async with openai.AsyncOpenAI(base_url=server.client.base_url, api_key=KEY, max_retries=0) as client:
            answer: Any = await litellm.acompletion(**lite(server, stream=True, client=client))
            return "".join([chunk.choices[0].delta.content or "" async for chunk in answer])

    assert asyncio.run(ask()) == expected(server)


def test_litellm_errors_are_typed(server: Server) -> None:
    import litellm
    from litellm import exceptions

    with pytest.raises(exceptions.NotFoundError):
        litellm.completion(**lite(server, model="openai/gpt-0"))
    with pytest.raises(exceptions.BadRequestError, match="temperature"):
        litellm.completion(**lite(server, temperature=-1))
    with pytest.raises(exceptions.ContextWindowExceededError):
        litellm.completion(**lite(server, messages=[{"role": "user", "content": TEXT * 20}]))


# ------------------------------------------------------------ langchain


def chat(server: Server, **fields: Any) -> Any:
    from langchain_openai import ChatOpenAI

    url: Any = f"{server.fleet.url}/v1"
    key: Any = KEY
    return ChatOpenAI(model="tiny", base_url=url, api_key=key, max_retries=0, timeout=60, **GREEDY, **fields)


@pytest.mark.parametrize("responses", [False, True])
def test_langchain_chats(server: Server, responses: bool) -> None:
    from langchain_core.messages import HumanMessage, SystemMessage

    text = expected(server)
    model = chat(server, use_responses_api=responses, stream_usage=True)
    whole = model.invoke([HumanMessage(USER["content"])])
    assert whole.text == text and whole.usage_metadata["output_tokens"] > 0
    chunks = list(model.stream([HumanMessage(USER["content"])]))
    joined = chunks[0]
    for chunk in chunks[1:]:
        joined += chunk
    assert joined.text == text
    assert joined.usage_metadata["output_tokens"] == whole.usage_metadata["output_tokens"]
    batch = model.batch([[HumanMessage(USER["content"])], [SystemMessage("Grüße."), HumanMessage("水")]])
    assert batch[0].text == text and batch[1].text != text

    async def ask() -> str:
        # A client of ours: langchain's own outlives the event loop.
        async with httpx.AsyncClient(timeout=60) as client:
            model = chat(server, use_responses_api=responses, http_async_client=client)
            found: str = (await model.ainvoke([HumanMessage(USER["content"])])).text
        return found

    assert asyncio.run(ask()) == text


def test_langchain_completions(server: Server) -> None:
    from langchain_openai import OpenAI

    fields: Any = {"model": "tiny", "base_url": f"{server.fleet.url}/v1", "api_key": KEY, "max_retries": 0}
    model = OpenAI(**fields, **GREEDY)
    plain = server.client.completions.create(model="tiny", prompt=TEXT, **GREEDY)
    assert model.invoke(TEXT) == "".join(model.stream(TEXT)) == plain.choices[0].text


def test_langchain_errors_are_typed(server: Server) -> None:
    with pytest.raises(openai.BadRequestError, match=f"{CONTEXT} tokens"):
        chat(server).invoke(TEXT * 20)
    with pytest.raises(openai.BadRequestError, match="top_p"):
        chat(server, top_p=3.0).invoke("a")
