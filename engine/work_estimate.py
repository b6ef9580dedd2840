"""What the engine's steps should take of the device, by arithmetic (`--enable-mfu-metrics`, vLLM's): operations, bytes.

Counted are what grows with the model: products with its weights, attention over the context, and the KV cache. Norms,
activations and sampling are left out, so a share of the device's peak made of these is a little low.
"""

from __future__ import annotations

from dataclasses import dataclass

from penstock.engine.plan import StepPlan
from penstock.models.spec import ModelSpec


@dataclass
class WorkEstimate:
    """Totals since the start, for a model on one device."""

    layer_parameters: int  # of all layers' matrices
    head_parameters: int  # of the product that makes logits
    attention_width: int  # query heads times their size, over all layers
    kv_bytes: int  # of a token
    dtype_bytes: int
    flops: int = 0
    read_bytes: int = 0
    write_bytes: int = 0

    @classmethod
    def of(cls, spec: ModelSpec, dtype_bytes: int) -> WorkEstimate:
        """For a model whose weights and KV have numbers of `dtype_bytes`."""
        heads = spec.num_heads * spec.head_dim
        kv_heads = spec.num_kv_heads * spec.head_dim
        attention = spec.hidden_size * (2 * heads + 2 * kv_heads)  # queries and output, keys and values
        mlp = 3 * spec.hidden_size * spec.intermediate_size  # gate, up, down
        return cls(
            layer_parameters=spec.num_layers * (attention + mlp),
            head_parameters=spec.hidden_size * spec.vocab_size,
            attention_width=spec.num_layers * heads,
            kv_bytes=2 * spec.num_layers * kv_heads * dtype_bytes,
            dtype_bytes=dtype_bytes,
        )

    def add(self, plan: StepPlan) -> None:
        """One step is submitted. A product with n parameters is 2 n operations a token; attention two such products."""
        tokens = sampled = context = kept = 0
        for work in plan.work:
            end = work.start + work.num_tokens
            tokens += work.num_tokens
            sampled += work.samples
            context += (work.start + 1 + end) * work.num_tokens // 2  # token at position p sees p + 1
            kept += work.start
        self.flops += 2 * (tokens * self.layer_parameters + sampled * self.head_parameters)
        self.flops += 4 * context * self.attention_width
        weights = self.layer_parameters + (self.head_parameters if sampled else 0)
        self.read_bytes += weights * self.dtype_bytes + (kept + tokens) * self.kv_bytes
        self.write_bytes += tokens * self.kv_bytes
