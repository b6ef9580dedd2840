"""The estimate of a step against what PyTorch counts in Hugging Face's model, and against sizes added up by hand."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from penstock.engine.plan import SequenceWork, StepPlan
from penstock.engine.work_estimate import WorkEstimate
from penstock.models.spec import read_spec


def plan(*work: tuple[int, int, bool]) -> StepPlan:
    items = tuple(SequenceWork(str(i), start, tokens, (), samples) for i, (start, tokens, samples) in enumerate(work))
    return StepPlan(1, (), (), items)


def test_operations_are_those_of_the_model(checkpoints: dict[str, Path]) -> None:
    """There every position makes logits, and attention counts what is masked: the difference is put right."""
    path, tokens = checkpoints["llama"], 24
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        model(torch.arange(5, 5 + tokens)[None])
    spec = read_spec(path)
    estimate = WorkEstimate.of(spec, 4)
    estimate.add(plan((0, tokens, True)))
    head = 2 * spec.hidden_size * spec.vocab_size
    half = 4 * spec.num_layers * spec.num_heads * spec.head_dim * (tokens * tokens - tokens * (tokens + 1) // 2)
    assert estimate.flops + (tokens - 1) * head + half == counter.get_total_flops()


def test_bytes_of_prompts_and_decodes() -> None:
    estimate = WorkEstimate(layer_parameters=100, head_parameters=30, attention_width=8, kv_bytes=16, dtype_bytes=2)
    estimate.add(plan((0, 10, False)))
    assert (estimate.read_bytes, estimate.write_bytes) == (100 * 2 + 10 * 16, 10 * 16)
    assert estimate.flops == 2 * 10 * 100 + 4 * 8 * 55  # 1 + 2 + ... + 10
    before = estimate.flops
    estimate.add(plan((10, 1, True), (40, 1, True)))
    assert estimate.read_bytes == 360 + 130 * 2 + (11 + 41) * 16
    assert estimate.flops - before == 2 * (2 * 100 + 2 * 30) + 4 * 8 * (11 + 41)
