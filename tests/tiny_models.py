"""Tiny random-weight checkpoints in the Hugging Face format, and what Hugging Face itself makes of them.

The weights are drawn so that greedy decoding is a fair oracle: scores spread widely (the top two stay further apart
than float32 errors, which `reference_tokens` asserts) and the text keeps changing. Norm weights have random signs: with
a tied head a token would otherwise predict itself for ever.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any
from zlib import crc32

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, PreTrainedConfig, Qwen2Config, Qwen3Config

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
MIN_MARGIN = 1e-4

_SHAPE = {
    "num_hidden_layers": 3,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
}
_LLAMA3_SCALING = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_FAMILIES: dict[str, tuple[type[PreTrainedConfig], dict[str, Any]]] = {
    "llama": (LlamaConfig, {"rope_parameters": _LLAMA3_SCALING}),
    "mistral": (MistralConfig, {"sliding_window": 24, "head_dim": 24}),
    "qwen2": (Qwen2Config, {"tie_word_embeddings": True}),
    "qwen3": (Qwen3Config, {"head_dim": 32}),
}
_SPECIAL_TOKENS = ("<|begin|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>")
_VOCAB_SIZE = 400
_CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
_TEXT = """
A penstock is a closed pipe that carries water from a reservoir down to the turbines of a power station. A gate at its
upper end opens and closes the flow; a long fall gives the water its pressure. When the gate is shut too quickly, the
column of water that is already moving cannot stop at once, and a wave of pressure runs back up the pipe: the water
hammer. Surge tanks near the lower end give that wave somewhere to go. The reservoir fills in the wet months and is
drawn down in the dry ones, so that the river below keeps running, the mills keep turning, and the lights stay on.
Engineers measure the head in metres, the flow in cubic metres a second, and the power in kilowatts: each is a number,
and 1 number follows from the other 2. Grüße, señor; naïve café, 水力発電.
"""


def make_checkpoint(family: str, directory: Path, *, seed: int = 0, **overrides: Any) -> Path:
    """Write a float32 checkpoint of `family` with a tokenizer into `directory`; `overrides` change its config."""
    tokenizer = _train_tokenizer()
    config_class, own = _FAMILIES[family]
    ids = {"bos_token_id": tokenizer.token_to_id("<|begin|>"), "eos_token_id": tokenizer.token_to_id("<|end|>")}
    values = {**_SHAPE, "vocab_size": tokenizer.get_vocab_size(), **ids, "pad_token_id": None, **own, **overrides}
    model = AutoModelForCausalLM.from_config(config_class(**values), dtype=torch.float32)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            generator = torch.Generator().manual_seed(crc32(name.encode()) + seed)
            weight.normal_(0.0, _std(name, weight), generator=generator)
            if name.endswith("norm.weight"):
                weight.add_(torch.where(weight < 0, -1.0, 1.0))
    model.save_pretrained(directory)
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|begin|>",
        "eos_token": "<|end|>",
        "model_max_length": config_class(**values).max_position_embeddings,
        "chat_template": _CHAT_TEMPLATE,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))
    return directory


def reference_tokens(
    path: Path, prompts: list[list[int]], max_new_tokens: int, *, ignore_eos: bool = True, until_tie: bool = False
) -> list[list[int]]:
    """Hugging Face's greedy continuation of each prompt, computed alone.

    Asserts that the oracle can be trusted: no near-tie at any step, and few texts that repeat one token. With
    `until_tie`, for prompts that change from run to run, texts end before their first near-tie instead.
    """
    texts = []
    for prompt in prompts:
        text, margins = _continue(path, tuple(prompt), max_new_tokens, ignore_eos)
        trusted = next((n for n, margin in enumerate(margins) if margin < MIN_MARGIN), len(text))
        assert until_tie or trusted == len(text), f"near-tie at token {trusted} of a prompt of {len(prompt)} tokens"
        texts.append(list(text[:trusted]))
    varied = sum(len(set(text)) >= min(len(text), 16) // 4 for text in texts)
    assert until_tie or varied >= 0.8 * len(texts), f"the reference repeats itself: {texts}"
    return texts


def random_prompts(lengths: list[int], vocab_size: int = _VOCAB_SIZE, seed: int = 0) -> list[list[int]]:
    """Prompts of the given lengths, without special tokens."""
    generator = torch.Generator().manual_seed(seed)
    first = len(_SPECIAL_TOKENS)
    return [torch.randint(first, vocab_size, (length,), generator=generator).tolist() for length in lengths]


def _std(name: str, weight: torch.Tensor) -> float:
    if name.endswith("norm.weight"):
        return 0.2
    if "embed_tokens" in name or "lm_head" in name:
        return 2.0
    if name.endswith("bias"):
        return 0.5
    return 1.5 / weight.shape[1] ** 0.5


@cache
def _train_tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_VOCAB_SIZE,
        special_tokens=list(_SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([_TEXT], trainer)
    return tokenizer


@cache
def _load(path: Path) -> Any:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    model.generation_config.pad_token_id = 0
    return model.eval()


@cache
def _continue(
    path: Path, prompt: tuple[int, ...], max_new_tokens: int, ignore_eos: bool
) -> tuple[tuple[int, ...], tuple[float, ...]]:
    model = _load(path)
    model.generation_config.eos_token_id = None if ignore_eos else model.config.eos_token_id
    ids = torch.tensor([prompt])
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    best, second = torch.cat(out.logits).topk(2).values.unbind(-1)
    return tuple(out.sequences[0, len(prompt) :].tolist()), tuple((best - second).tolist())
