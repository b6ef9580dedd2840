"""Model shapes that the GPU benchmarks run, the works they time, and the least time a card needs for each.

A floor counts what no engine can avoid: matrix products take the longer of reading their weights (once a step, without
the input embedding) and their arithmetic; attention reads the KV of its context in decode, and computes its half of
the square in prefill. Nothing is overlapped. Pure: no torch.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

NEW_TOKENS = 129  # of a decode work: (time of 129 - time of 1) / 128
BATCH = 256  # max_num_seqs
BYTES = 2  # of a bfloat16


@dataclass(frozen=True)
class Card:
    """What a card does at best, as measured: bytes read plus written, and bfloat16 products, a second."""

    bytes_s: float
    flops: float


H200 = Card(bytes_s=4.30e12, flops=787e12)


@dataclass(frozen=True)
class Shape:
    """A decoder by its sizes."""

    name: str
    architecture: str
    hidden: int
    mlp: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool
    max_position: int
    rope_base: float

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """(rows, columns) of the weights of a layer's products, as the engine joins them, and of the head."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "qkv": (q + 2 * kv, self.hidden),
            "o": (self.hidden, q),
            "gate_up": (2 * self.mlp, self.hidden),
            "down": (self.hidden, self.mlp),
            "head": (self.vocab, self.hidden),
        }

    @property
    def layer_weights(self) -> int:
        """Parameters of the products of all layers."""
        return self.layers * sum(math.prod(size) for name, size in self.linears.items() if name != "head")

    @property
    def head_weights(self) -> int:
        return self.vocab * self.hidden

    @property
    def weight_bytes(self) -> int:
        """Read once a step."""
        return (self.layer_weights + self.head_weights) * BYTES

    @property
    def kv_bytes(self) -> int:
        """Of one token."""
        return 2 * self.layers * self.kv_heads * self.head_dim * BYTES

    def prefill_flops(self, num_tokens: int) -> float:
        """Of a prompt from its first token to its first output token."""
        attention = 2.0 * num_tokens**2 * self.heads * self.head_dim * self.layers
        return 2.0 * self.layer_weights * num_tokens + 2.0 * self.head_weights + attention

    def config(self) -> dict[str, Any]:
        """config.json for it."""
        return {
            "architectures": [self.architecture],
            "model_type": "llama" if self.architecture == "LlamaForCausalLM" else "qwen2",
            "hidden_size": self.hidden,
            "intermediate_size": self.mlp,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "vocab_size": self.vocab,
            "tie_word_embeddings": self.tied,
            "max_position_embeddings": self.max_position,
            "rope_theta": self.rope_base,
            "rms_norm_eps": 1e-5,
            "hidden_act": "silu",
            "torch_dtype": "bfloat16",
            "bos_token_id": 1,
            "eos_token_id": 2,
        }


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("llama8b", "LlamaForCausalLM", 4096, 14336, 32, 32, 8, 128, 128256, False, 131072, 500000.0),
        Shape("qwen1b5", "Qwen2ForCausalLM", 1536, 8960, 28, 12, 2, 128, 151936, True, 32768, 1000000.0),
        Shape("tiny", "Qwen2ForCausalLM", 64, 96, 2, 4, 2, 16, 400, True, 2048, 10000.0),
    )
}


@dataclass(frozen=True)
class Work:
    """One figure: `key` is its name in the result files, the rest what the name says."""

    key: str
    kind: str  # startup, ttft, cached, decode, sharegptlike or equal
    input_len: int = 0
    output_len: int = 1
    requests: int = 1


_PATTERNS = {
    "startup": re.compile(r"startup(_warm)?_s"),
    "ttft": re.compile(r"ttft_(?P<input_len>\d+)_ms"),
    "cached": re.compile(r"ttft_(?P<input_len>\d+)_cached_ms"),
    "decode": re.compile(r"decode_b(?P<requests>\d+)_c(?P<input_len>\d+)_ms"),
    "sharegptlike": re.compile(r"sharegptlike"),
    "equal": re.compile(r"in(?P<input_len>\d+)_out(?P<output_len>\d+)_x(?P<requests>\d+)"),
}


def parse_work(key: str) -> Work | None:
    """The work that a key names, or None: any sizes will do, not only those of the table."""
    for kind, pattern in _PATTERNS.items():
        match = pattern.fullmatch(key)
        if match:
            sizes = {name: int(value) for name, value in match.groupdict().items()}
            return Work(key, kind, **({"output_len": NEW_TOKENS} if kind == "decode" else {}) | sizes)
    return None


def floor(shape: Shape, work: Work, lengths: Sequence[Sequence[int]], card: Card = H200) -> float | None:
    """Least time of a work, in milliseconds where its key ends in _ms, else in seconds; None for a start.

    lengths: the [input, output] pairs of sharegptlike.
    """
    weights_s = shape.weight_bytes / card.bytes_s
    if work.kind == "startup":
        return None
    if work.kind == "ttft":
        return 1e3 * max(weights_s, shape.prefill_flops(work.input_len) / card.flops)
    if work.kind == "cached":
        return 1e3 * (weights_s + work.input_len * shape.kv_bytes / card.bytes_s)
    if work.kind == "decode":
        flops = 2.0 * (shape.layer_weights + shape.head_weights) * work.requests
        context = work.input_len + (work.output_len - 1) / 2  # mean over the run
        kv_s = work.requests * context * shape.kv_bytes / card.bytes_s
        return 1e3 * (max(weights_s, flops / card.flops) + kv_s)
    if work.kind == "equal":
        lengths = [(work.input_len, work.output_len)] * work.requests
    return _all_at_once(shape, lengths, card)


def _all_at_once(shape: Shape, lengths: Sequence[Sequence[int]], card: Card) -> float:
    """Seconds for many requests: prompts at full rate, then full batches of decodes."""
    prefill_s = sum(shape.prefill_flops(length) for length, _ in lengths) / card.flops
    tokens = sum(output - 1 for _, output in lengths)
    steps = max([math.ceil(tokens / BATCH), *(output - 1 for _, output in lengths)])
    flops = 2.0 * (shape.layer_weights + shape.head_weights) * tokens
    contexts = sum((output - 1) * (length + output / 2) for length, output in lengths)
    kv_s = contexts * shape.kv_bytes / card.bytes_s
    return prefill_s + max(steps * shape.weight_bytes / card.bytes_s, flops / card.flops) + kv_s
