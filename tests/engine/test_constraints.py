"""Outputs with a form in the engine: exact in every way a step may run, and no burden to others.

The GPU's executor is compared with the CPU's in test_device_runner_model.py.
"""

from __future__ import annotations

import json
import random
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from llguidance import LLTokenizer

from penstock.common import grammar
from penstock.common.config import EngineConfig
from penstock.common.messages import GenerateRequest
from penstock.common.sampling import SamplingParams
from penstock.common.structured_outputs import StructuredOutputsParams
from penstock.common.tokenizer import Tokenizer
from penstock.engine import build, constraints
from penstock.engine.build import BuiltEngine, build_engine
from penstock.engine.constraints import Constraint
from penstock.engine.core import Engine
from penstock.engine.outputs import NOTHING_ALLOWED
from penstock.engine.policy import THROUGHPUT
from tests.engine.engines import make_engine, request, run
from tests.schemas import random_schema, validate

END = 1
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 6}, "n": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name", "n"],
    "additionalProperties": False,
}
Form = StructuredOutputsParams


def sampling(form: Form, **fields: Any) -> SamplingParams:
    return SamplingParams(**{"temperature": 1.0, "max_tokens": 60, "structured_outputs": form, **fields})


@pytest.fixture(scope="module")
def path(checkpoints: dict[str, Path]) -> Path:
    return checkpoints["llama"]


@pytest.fixture(scope="module")
def tokenizer(path: Path) -> Tokenizer:
    return Tokenizer.load(str(path))


def requests(count: int, form: Form | None = None, **fields: Any) -> list[tuple[int, GenerateRequest]]:
    """Requests with forms of all kinds, or with this one, and among them some without."""
    found = []
    for i in range(count):
        rng = random.Random(i)
        forms = [
            Form(json=SCHEMA, disable_any_whitespace=True),
            Form(json=random_schema(rng, depth=1), disable_any_whitespace=True),
            Form(regex=r"[a-c]{3,5}\d"),
            Form(choice=["yes", "no", "maybe"]),
        ]
        own = form or (None if i % 5 == 4 else forms[i % 4])
        values = {"seed": i, **fields}
        params = sampling(own, **values) if own else SamplingParams(temperature=1.0, max_tokens=20, **values)
        prompt = [rng.randrange(5, 300) for _ in range(rng.randrange(1, 30))]
        found.append((rng.randrange(6), request(f"r{i}", prompt, params, eos_token_ids=[END])))
    return found


def check(tokenizer: Tokenizer, form: Form, ids: list[int]) -> None:
    text = tokenizer.decode([token for token in ids if token != END], skip_special_tokens=False)
    if form.regex is not None:
        assert re.fullmatch(form.regex, text), text
    elif form.choice is not None:
        assert text in form.choice
    else:
        assert isinstance(form.json, str)
        validate(json.loads(form.json), text)


@pytest.fixture(scope="module")
def expected(path: Path, tokenizer: Tokenizer) -> Iterator[dict[str, list[int]]]:
    built = make_engine(path)
    try:
        arrivals = requests(20)
        tokens, finishes = run(built, arrivals)
        finished = 0
        for _, source in arrivals:
            form = source.sampling.structured_outputs
            if form is not None and finishes[source.request_id].reason == "stop":
                check(tokenizer, form, tokens[source.request_id])
                finished += 1
        assert finished >= 12 and {finish.reason for finish in finishes.values()} <= {"stop", "length"}
        yield tokens
    finally:
        built.engine.close()


def test_the_vocabulary_is_prepared_before_there_are_steps_that_would_pause(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside the weights, but the engine is there only once it is done."""
    done: list[str] = []
    prepare, make, made = grammar.make_vocabulary, build.Engine, threading.Event()

    def prepare_late(*arguments: Any, **options: Any) -> LLTokenizer:
        assert made.wait(60)
        vocabulary = prepare(*arguments, **options)
        done.append("prepared")
        return vocabulary

    def told_make(*arguments: Any, **options: Any) -> Engine:
        made.set()
        return make(*arguments, **options)

    monkeypatch.setattr(grammar, "make_vocabulary", prepare_late)
    monkeypatch.setattr(build, "Engine", told_make)
    config = EngineConfig(model=str(path), device="cpu", max_model_len=64, kv_cache_memory_bytes=1 << 20)
    built = build_engine(config, THROUGHPUT)
    done.append("built")
    built.engine.close()
    assert done == ["prepared", "built"]


@pytest.mark.parametrize("kind", ["a step behind", "preempted"])
def test_the_same_whatever_runs_the_steps(path: Path, expected: dict[str, list[int]], kind: str) -> None:
    built = make_engine(path, run_ahead=int(kind == "a step behind"), pages=25 if kind == "preempted" else 512,
                        **({"max_model_len": 96} if kind == "preempted" else {}))  # fmt: skip
    try:
        assert run(built, requests(20))[0] == expected
        assert (built.engine.scheduler.counters.preemptions > 0) == (kind == "preempted")
    finally:
        built.engine.close()


@pytest.fixture(scope="module")
def engine(path: Path) -> Iterator[BuiltEngine]:
    built = make_engine(path)
    yield built
    built.engine.close()


def test_it_goes_on_from_any_token(engine: BuiltEngine, expected: dict[str, list[int]]) -> None:
    """As after a worker's death, or a hand-off: the output so far comes with the request."""
    for cut in (1, 4, 9):
        arrivals = [
            (0, request(source.request_id, source.prompt_token_ids, source.sampling, eos_token_ids=[END],
                        output_token_ids=expected[source.request_id][:cut]))
            for _, source in requests(20) if len(expected[source.request_id]) > cut
        ]  # fmt: skip
        for _, source in arrivals:
            engine.engine.add(source)
        rest: dict[str, list[int]] = {source.request_id: [] for _, source in arrivals}
        while engine.engine.has_work():
            for output in engine.engine.step().outputs:
                rest[output.request.request_id] += output.token_ids
        assert rest == {name: expected[name][cut:] for name in rest}


def test_an_output_that_is_complete_ends_at_once(engine: BuiltEngine, tokenizer: Tokenizer) -> None:
    whole = tokenizer.encode("yes", add_special_tokens=False)
    source = request("done", [7], sampling(Form(choice=["yes"])), eos_token_ids=[END], output_token_ids=whole)
    engine.engine.add(source)
    outputs = []
    while engine.engine.has_work():
        outputs += engine.engine.step().outputs
    assert [(output.token_ids, output.finish and output.finish.reason) for output in outputs] == [((), "stop")]


@pytest.mark.parametrize(
    ("fields", "eos"),
    [({"ignore_eos": True}, [END]), ({}, []), ({"min_tokens": 30}, [END]), ({"logit_bias": {END: 100.0}}, [END])],
    ids=str,
)
def test_nobody_need_draw_the_end(
    engine: BuiltEngine, tokenizer: Tokenizer, fields: dict[str, Any], eos: list[int]
) -> None:
    source = request("r", [7], sampling(Form(choice=["no", "yes"]), **fields), eos_token_ids=eos)
    tokens, finishes = run(engine, [(0, source)])
    assert tokenizer.decode(tokens["r"]) in ("no", "yes") and finishes["r"].reason == "stop"


def test_an_end_that_is_allowed_may_be_forbidden(engine: BuiltEngine, tokenizer: Tokenizer) -> None:
    params = sampling(Form(regex="a+"), logit_bias={END: 100.0}, min_tokens=4, max_tokens=9)
    tokens, finishes = run(engine, [(0, request("r", [7], params, eos_token_ids=[END]))])
    assert len(tokens["r"]) == 5 and tokens["r"][-1] == END and finishes["r"].reason == "stop"
    params = sampling(Form(regex="a+"), logit_bias={END: 100.0}, ignore_eos=True, max_tokens=9)
    tokens, finishes = run(engine, [(0, request("r", [7], params, eos_token_ids=[END]))])
    assert set(tokenizer.decode(tokens["r"])) == {"a"} and finishes["r"].reason == "length"


def test_other_rules_hold_as_well(engine: BuiltEngine, tokenizer: Tokenizer) -> None:
    [yes], [no] = (tokenizer.encode(text, add_special_tokens=False)[:1] for text in ("yes", "no"))
    params = sampling(Form(choice=["no", "yes"]), logit_bias={yes: -100.0}, logprobs=2, repetition_penalty=1.3)
    tokens, _ = run(engine, [(0, request("r", [7], params, eos_token_ids=[END]))])
    assert tokens["r"][0] == no
    params = sampling(Form(choice=["no", "yes"]), allowed_token_ids=[5, 6])
    tokens, finishes = run(engine, [(0, request("r", [7], params, eos_token_ids=[END]))])
    assert tokens["r"] == [] and finishes["r"].reason == "error" and finishes["r"].code == "invalid_request"


def test_a_form_that_cannot_be_had_ends_with_the_reason(engine: BuiltEngine) -> None:
    source = request("r", [7], sampling(Form(json={"not": {}})), eos_token_ids=[END])
    tokens, finishes = run(engine, [(0, source)])
    assert tokens["r"] == [] and finishes["r"].reason == "error" and '"not"' in finishes["r"].message


def test_a_slow_form_holds_up_nobody_else(engine: BuiltEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its masks come when a test lets them: meanwhile others begin and end."""
    go_on = threading.Event()
    advance = Constraint.advance

    def slow(self: Constraint, tokens: Any) -> None:
        if self._params.regex == "slow":
            assert go_on.wait(60)
        advance(self, tokens)

    monkeypatch.setattr(Constraint, "advance", slow)
    loop = engine.engine
    loop.add(request("slow", [7], sampling(Form(regex="slow")), eos_token_ids=[END]))
    quick = requests(3, Form(choice=["no", "yes"]))
    ended: list[str] = []
    for name in ("slow", *(source.request_id for _, source in quick)):
        if name != "slow":
            loop.add(dict((s.request_id, s) for _, s in quick)[name])
    while len(ended) < 3:
        ended += [output.request.request_id for output in loop.step().outputs if output.finish is not None]
    assert "slow" not in ended
    go_on.set()
    while loop.has_work():
        ended += [output.request.request_id for output in loop.step().outputs if output.finish is not None]
    assert ended[-1] == "slow" and loop.pages.num_held == 0


def test_a_mask_that_takes_too_long_ends_the_output(engine: BuiltEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constraints, "MAX_MASK_S", -1.0)
    _, finishes = run(engine, [(0, request("r", [7], sampling(Form(regex="ab")), eos_token_ids=[END]))])
    assert finishes["r"].reason == "error" and "too complex" in finishes["r"].message


def test_aborted_while_its_form_is_compiled(engine: BuiltEngine) -> None:
    loop = engine.engine
    loop.add(request("gone", [7, 8], sampling(Form(json=SCHEMA)), eos_token_ids=[END]))
    assert loop.abort("gone", 0, 0)
    while loop.has_work():
        assert loop.step().outputs == ()
    loop.pages.check()
    assert loop.pages.num_held == 0


def test_an_output_that_ends_before_its_prompt_was_computed_has_no_scores(path: Path) -> None:
    built = make_engine(path)
    empty = sampling(Form(regex=""), prompt_logprobs=2)
    built.engine.add(request("empty", [3, 4, 5], empty, eos_token_ids=[END]))
    found = []
    while built.engine.has_work():
        found += built.engine.step().outputs
    (output,) = found
    assert output.prompt_logprobs is None and output.finish == constraints.STOP
    built.engine.close()


@pytest.mark.parametrize("run_ahead", [0, 2])
@pytest.mark.parametrize(
    ("rules", "tokens"),
    [
        ({"allowed_token_ids": [END], "min_tokens": 6}, []),
        ({"allowed_token_ids": [7], "bad_words_token_ids": [[7]]}, []),
        ({"allowed_token_ids": [7], "bad_words_token_ids": [[7, 7]]}, [7]),
    ],
)
def test_where_rules_leave_no_token_the_output_ends_with_an_error(
    path: Path, rules: dict[str, Any], tokens: list[int], run_ahead: int
) -> None:
    built = make_engine(path, run_ahead=run_ahead)
    both = [
        (0, request("none left", [3, 4], SamplingParams(max_tokens=9, **rules), eos_token_ids=[END])),
        (0, request("beside", [3, 4], SamplingParams(max_tokens=9, allowed_token_ids=[7, END], min_tokens=6))),
    ]
    found, finishes = run(built, both)
    assert found["none left"] == tokens and finishes["none left"] == NOTHING_ALLOWED
    assert len(found["beside"]) == 9 and set(found["beside"]) <= {7, END}
    built.engine.close()
