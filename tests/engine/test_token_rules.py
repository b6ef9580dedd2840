"""Bias, allowed tokens and banned words: against Hugging Face's processors, and the device's sampler against the CPU's.

The device's side runs as it does in a step: `BatchState` writes the slot, `sample` keeps it up to date.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation.logits_process import NoBadWordsLogitsProcessor, SequenceBiasLogitsProcessor

from penstock.common.sampling import SamplingParams
from penstock.engine.batch_state import BatchState
from penstock.engine.plan import SequenceStart
from penstock.engine.sampler import SamplingRow, noise_seed, sample
from penstock.engine.token_rules import TokenRules
from penstock.kernels.sample import SampleWorkspace, sample_reference, sample_triton

VOCAB = 40
tokens = st.integers(0, VOCAB - 1)
GPU = pytest.param(
    "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
)


@st.composite
def rules(draw: st.DrawFn) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    if draw(st.booleans()):
        fields["logit_bias"] = draw(st.dictionaries(tokens, st.sampled_from([-200.0, -1.5, 0.25, 3.0]), max_size=4))
    if draw(st.booleans()):
        fields["allowed_token_ids"] = sorted(draw(st.sets(tokens, min_size=1, max_size=8)))
    few = st.integers(0, 5)  # words that come up
    fields["bad_words_token_ids"] = draw(st.lists(st.lists(few, min_size=1, max_size=4), max_size=30))
    return fields


def test_equals_hugging_face() -> None:
    """Its processors look at the prompt, too: here there is none."""
    words = [[3], [1, 2], [2, 2, 5], [2, 5], [9, 9, 9, 9]]
    bias = {4: 1.5, 7: -100.0, 1: 0.25}
    params = SamplingParams(logit_bias=bias, bad_words_token_ids=words)
    found = TokenRules.of(params)
    assert found is not None
    banning = NoBadWordsLogitsProcessor([list(word) for word in words])
    biasing = SequenceBiasLogitsProcessor([[[token], value] for token, value in bias.items()])
    for output in ([1], [4, 2, 2], [2, 2, 2], [9, 9, 9], [1, 1], [2, 1]):
        logits = torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(len(output)))
        ids = torch.tensor([output])
        theirs = banning(ids, biasing(ids, logits.clone()))[0]
        ours = logits[0] + found.bias_row(VOCAB)
        ours[list(found.completing(output, 0))] = float("-inf")
        torch.testing.assert_close(ours, theirs)


def test_a_banned_word_begins_in_the_output() -> None:
    found = TokenRules.of(SamplingParams(bad_words_token_ids=[[1, 2]]))
    assert found is not None
    assert found.completing([5, 1], 2) == set()
    assert found.completing([5, 1], 1) == {2}


def _host(row: SamplingRow, logits: torch.Tensor) -> int:
    [token], _ = sample(logits[None], [row])
    return token


@pytest.mark.parametrize("device", ["cpu", GPU])
@pytest.mark.parametrize("draw", [sample_reference, sample_triton], ids=["plain", "triton"])
@settings(max_examples=4, deadline=None, derandomize=True)
@given(data=st.data())
def test_the_device_draws_what_the_cpu_draws(
    device: str, draw: Callable[..., torch.Tensor], data: st.DataObject
) -> None:
    """Three sequences, one without rules; some outputs are known when they start, as after preemption."""
    state = BatchState(4, 8, VOCAB, torch.device(device))
    workspace = SampleWorkspace.allocate(4, VOCAB, device, capacity=64)
    texts: list[list[int]] = []
    rows: list[SamplingRow] = []
    for slot in range(3):
        fields = data.draw(rules()) if slot != 1 else {}
        temperature, penalty = data.draw(st.sampled_from([0.0, 1.0])), data.draw(st.sampled_from([0.0, 0.5]))
        params = SamplingParams(
            temperature=temperature,
            presence_penalty=penalty,
            top_k=data.draw(st.sampled_from([0, 3])),
            seed=slot,
            **fields,
        )
        text = data.draw(st.lists(st.integers(0, 5), min_size=1, max_size=40))
        prompt_len = data.draw(st.integers(1, len(text)))
        texts.append(text)
        rows.append(SamplingRow(params, noise_seed(slot, 0), text, prompt_len, ()))
        state.start(slot, SequenceStart(f"{slot}", tuple(text), prompt_len, params, 0, ()))
    addresses, values = state.take_changes()
    state.apply(torch.tensor([*addresses, *values], dtype=torch.int32, device=device), len(addresses))
    slots = torch.tensor([0, 1, 2, -1], dtype=torch.int32, device=device)
    for step in range(4):
        logits = torch.randn(4, VOCAB, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 99)) + step))
        logits[:, :6] += 2.0
        expected = [_host(row, logits[i]) for i, row in enumerate(rows)]
        positions = torch.tensor([*map(len, texts), 0], dtype=torch.int32, device=device)
        extra = (workspace,) if draw is sample_triton else ()
        found = draw(logits.to(device), slots, positions, state.columns, *extra).tolist()
        assert found[:3] == expected
        for text, token in zip(texts, expected, strict=True):
            text.append(token)


def test_a_slot_forgets_the_sequence_before() -> None:
    state = BatchState(1, 8, VOCAB, torch.device("cpu"))
    slots, positions = torch.zeros(1, dtype=torch.int32), torch.tensor([2], dtype=torch.int32)
    logits = torch.zeros(1, VOCAB)
    logits[0, 7] = 5.0
    drawn = []
    for name, params in (
        ("a", SamplingParams(temperature=0.0, bad_words_token_ids=[[1, 7]])),
        ("b", SamplingParams(temperature=0.0, logit_bias={9: 9.0})),
        ("c", SamplingParams(temperature=0.0, bad_words_token_ids=[[2, 7], [3]])),
        ("d", SamplingParams(temperature=0.0)),
    ):
        state.start(0, SequenceStart(name, (5, 1), 1, params, 0, ()))
        addresses, values = state.take_changes()
        state.apply(torch.tensor([*addresses, *values], dtype=torch.int32), len(addresses))
        drawn += sample_reference(logits, slots, positions, state.columns).tolist()
    assert drawn == [0, 9, 7, 7]
