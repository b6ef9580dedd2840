"""The smallest loop that serves a model from a paged pool: what the engine does, without its scheduler."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import torch

from penstock.kernels.paged_batch import PagedBatch
from penstock.models.decoder import CausalLM
from penstock.models.registry import load_model
from penstock.models.spec import read_spec


def load(path: Path, dtype: torch.dtype = torch.float32, device: str = "cpu") -> CausalLM:
    return load_model(path, read_spec(path), dtype=dtype, device=torch.device(device))


class PagedLoop:
    """A model, a pool in the engine's layout, and page tables that are scattered over the pool."""

    def __init__(self, model: CausalLM, page_size: int, num_pages: int = 400, device: str = "cpu") -> None:
        spec = model.spec
        self.model, self.page_size, self.device = model, page_size, device
        shape = (num_pages, spec.num_kv_heads, spec.num_layers, 2, page_size, spec.head_dim)
        # NaN everywhere: whatever was never written must not be seen.
        pool = torch.full(shape, torch.nan, device=device)
        self.kv = [(pool[:, :, layer, 0], pool[:, :, layer, 1]) for layer in range(spec.num_layers)]
        self._free = list(range(num_pages))
        random.Random(0).shuffle(self._free)

    def step(self, new: Sequence[Sequence[int]], done: Sequence[int], tables: list[list[int]]) -> torch.Tensor:
        """Compute `new` tokens of sequences that have `done` tokens cached; logits of each sequence's last one."""
        contexts = [cached + len(tokens) for cached, tokens in zip(done, new, strict=True)]
        for table, context in zip(tables, contexts, strict=True):
            while len(table) * self.page_size < context:
                table.append(self._free.pop())
        batch = PagedBatch.build([len(tokens) for tokens in new], contexts, tables, self.page_size, self.device)
        with torch.inference_mode():
            token_ids = torch.tensor([token for tokens in new for token in tokens], device=self.device)
            hidden = self.model.forward(token_ids, batch, self.kv)
            return self.model.logits(hidden[batch.last_rows]).float().cpu()

    def generate(self, prompts: list[list[int]], num_tokens: int, chunk: int) -> list[list[int]]:
        """Greedy tokens of each prompt, all in one batch: prompts in chunks beside those that already decode."""
        texts = [list(prompt) for prompt in prompts]
        done = [0] * len(prompts)
        tables: list[list[int]] = [[] for _ in prompts]
        ends = [len(prompt) + num_tokens for prompt in prompts]
        while live := [i for i in range(len(prompts)) if len(texts[i]) < ends[i]]:
            new = [texts[i][done[i] : done[i] + chunk] for i in live]
            logits = self.step(new, [done[i] for i in live], [tables[i] for i in live])
            for i, tokens, token in zip(live, new, logits.argmax(-1).tolist(), strict=True):
                done[i] += len(tokens)
                if done[i] == len(texts[i]):
                    texts[i].append(token)
        return [text[len(prompt) :] for text, prompt in zip(texts, prompts, strict=True)]
