"""What is asked of `LLM`: every value that leaves can be sent and means what it says; the rest is said at once."""

from __future__ import annotations

import enum
import math
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from penstock import LLM, BeamSearchParams, SamplingParams, StructuredOutputsParams
from penstock.common.messages import GenerateRequest
from penstock.intake import LAST_PRIORITY
from tests.penstock.offline import GREEDY, TEXT, run


class Word(str):
    pass


class Number(enum.IntEnum):
    THREE = 3


class Stop(str, enum.Enum):
    END = "the end"

    def __str__(self) -> str:
        return "Stop.END"  # as of most enumerations


ODD: list[Any] = [
    *(
        None,
        True,
        0,
        1.5,
        -1.0,
        math.nan,
        math.inf,
        2**70,
        -(2**70),
        10**400,
        1 + 2j,
        "3",
        b"3",
        "\ud800",
        "",
        object(),
    ),
    *(Word("ab"), Number.THREE, np.str_("ab"), np.int64(3), np.uint8(3), np.float32(0.5), np.bool_(True), np.nan),
    *([], (), {}, [1.5], ["3"], ["a", 5], [b"a"], [None], [True], [2**70], ["\ud800"], [object()], {1, 2}, range(3)),
    *([np.int64(3)], [Number.THREE], [Word("ab")], np.array([1, 2]), np.array([0.5]), np.array([[1, 2]]), [[1], [2.5]]),
    *({"3": 1}, {1: "3"}, {1: None}, {1.5: 1}, {1: 2**70}, {1: 10**400}, {1: math.nan}, {2**70: 1}, {"a": object()}),
    *(
        {np.int64(1): np.float32(2)},
        {Number.THREE: 1},
        [[np.int64(1)]],
        [range(1, 3)],
        torch.tensor(3),
        torch.tensor(0.5),
    ),
]


def sent_or_refused(make: Callable[[], list[GenerateRequest]], name: str) -> bool:
    """Whether what is made can be sent, and arrives as it is; otherwise a ValueError must name the field."""
    try:
        made = make()
    except ValueError as error:
        assert name in str(error)
        return False
    for request in made:
        arrived = msgspec.msgpack.decode(msgspec.msgpack.encode(request), type=GenerateRequest)
        assert arrived == request and repr(arrived) == repr(request)  # 1 equals True
    return True


def requests(llm: LLM, prompt: Any, params: SamplingParams = GREEDY, *more: Any) -> list[GenerateRequest]:
    return [choice.source for choice in llm.intake.choices(prompt, params, *more)]


@pytest.mark.parametrize("field", SamplingParams.__struct_fields__)
def test_every_parameter_can_be_sent_or_is_refused(llm: LLM, field: str) -> None:
    name = field.removesuffix("_token_ids")  # banned words are told as words
    taken = [
        sent_or_refused(lambda value=value: requests(llm, TEXT, SamplingParams(**{field: value})), name)
        for value in ODD
    ]
    assert any(taken) or field == "structured_outputs"
    assert not all(taken)


@pytest.mark.parametrize("field", StructuredOutputsParams.__struct_fields__)
def test_every_form_can_be_sent_or_is_refused(field: str) -> None:
    for value in ODD:
        kind = (
            {} if field in ("json", "regex", "choice", "grammar", "json_object", "structural_tag") else {"regex": "a"}
        )
        try:
            form = StructuredOutputsParams(**kind, **{field: value})
        except ValueError as error:
            assert field in str(error)
        else:
            assert msgspec.msgpack.decode(msgspec.msgpack.encode(form), type=StructuredOutputsParams) == form


@pytest.mark.parametrize("field", ["beam_width", "max_tokens", "length_penalty", "ignore_eos"])
def test_every_parameter_of_beams_means_what_it_says_or_is_refused(field: str) -> None:
    for value in ODD:
        try:
            made = getattr(BeamSearchParams(**{"beam_width": 2, "max_tokens": 3, field: value}), field)
        except ValueError as error:
            assert field in str(error)
        else:
            assert type(made) in (int, float, bool) and made == value


def test_every_prompt_can_be_sent_or_is_refused(llm: LLM) -> None:
    for value in ODD:
        sent_or_refused(lambda value=value: requests(llm, value), "prompt")
        sent_or_refused(lambda value=value: requests(llm, {"prompt": value}), "prompt")
        sent_or_refused(lambda value=value: requests(llm, {"prompt_token_ids": value}), "prompt")
        sent_or_refused(lambda value=value: requests(llm, {"prompt": TEXT, "cache_salt": value}), "cache_salt")
        sent_or_refused(lambda value=value: requests(llm, TEXT, GREEDY, value), "priority")
        sent_or_refused(lambda value=value: requests(llm, TEXT, GREEDY, 0, value), "request_id")


def test_numbers_of_numpy_are_numbers(llm: LLM) -> None:
    ids = llm.get_tokenizer().encode(TEXT)
    params = SamplingParams(
        temperature=np.float32(0.5),  # type: ignore[arg-type]
        seed=np.int64(3),  # type: ignore[arg-type]
        max_tokens=np.int32(5),  # type: ignore[arg-type]
        top_k=2**70,
        logit_bias={np.int64(7): np.float16(2.0)},  # type: ignore[dict-item]
        stop_token_ids=np.array([9]),  # type: ignore[arg-type]
    )
    plain = SamplingParams(temperature=0.5, seed=3, max_tokens=5, logit_bias={7: 2.0}, stop_token_ids=[9])
    [expected] = run(llm, [ids], plain)
    array = np.array(ids)
    for prompts in (array, [array], list(array), {"prompt_token_ids": array}, [torch.tensor(ids)]):
        [found] = run(llm, prompts, params)
        assert (found.prompt_token_ids, found.outputs[0].token_ids) == (ids, expected.outputs[0].token_ids)


def test_members_of_an_enumeration_are_their_texts(llm: LLM) -> None:
    params = SamplingParams(stop=[Stop.END, Word("a")], structured_outputs=StructuredOutputsParams(choice=[Stop.END]))
    [request] = requests(llm, Stop.END, params, 0, Stop.END)
    assert [*map(type, request.sampling.stop)] == [str, str] and request.sampling.stop == ["the end", "a"]
    assert request.sampling.structured_outputs is not None
    assert request.sampling.structured_outputs.choice == ["the end"]
    assert type(request.request_id) is str and request.request_id.startswith("the end")
    assert request.prompt_token_ids == llm.get_tokenizer().encode("the end")


def test_what_is_larger_than_any_need_is_cut(llm: LLM) -> None:
    [request] = requests(llm, TEXT, SamplingParams(top_k=2**70, max_tokens=2**70, logprobs=2**70), 2**70)
    assert request.sampling.top_k == request.sampling.logprobs == request.priority == LAST_PRIORITY == 2**31 - 1
    assert request.sampling.max_tokens == llm.max_model_len - len(request.prompt_token_ids)
    assert requests(llm, TEXT, GREEDY, -(2**70))[0].priority == -LAST_PRIORITY


def test_an_id_that_is_given_again_is_another_request_to_who_computes_it(llm: LLM) -> None:
    first, second = (llm.intake.choices(TEXT, GREEDY, 0, "again") for _ in range(2))
    assert [choice.request.request_id for choice in (*first, *second)] == ["again", "again"]
    assert len({choice.key for choice in (*first, *second)}) == 2


def test_a_prompt_is_not_changed_by_who_gave_it(llm: LLM) -> None:
    ids = [7, 8, 9]
    [request] = requests(llm, ids)
    ids.append(10)
    assert request.prompt_token_ids == [7, 8, 9]


@pytest.mark.parametrize(
    ("prompts", "params", "words"),
    [
        (None, GREEDY, "prompts must be one prompt or several, got None"),
        (b"ab", GREEDY, "a prompt must be integers: got bytes"),
        ([1.0, 2.0], GREEDY, "a prompt must be integers: 'float'"),
        ([[1, "a"]], GREEDY, "a prompt must be integers: 'str'"),
        ("a\ud800", GREEDY, "prompt must be text: 'utf-8' codec can't encode"),
        (["a"], {"max_tokens": 3}, "sampling_params must be SamplingParams, got 'max_tokens'"),
        (["a", "b"], [GREEDY, None], "sampling_params must be SamplingParams, got None"),
    ],
)
def test_what_is_wrong_is_named(llm: LLM, prompts: Any, params: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        run(llm, prompts, params)
