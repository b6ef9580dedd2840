"""The official client of a real fleet, its answers in one shape, and what Hugging Face says they must be."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import httpx
import openai
import torch
from transformers import AutoModelForCausalLM

from penstock.fleet import Fleet

KEY = "sk-first"
MODES = ("one-phase", "pair")
CONTEXT = 160
PAGE = 4
END_IDS = (1, *range(40, 60))  # in generation_config.json only, but for the first
GREEDY: dict[str, Any] = {"temperature": 0.0, "max_tokens": 12}
WILD: dict[str, Any] = {"temperature": 4.0, "max_tokens": 12}
TEXT = "The reservoir fills in the wet months and is drawn down in the dry ones."
MESSAGES: Any = [{"role": "system", "content": "Grüße."}, {"role": "user", "content": "水力? Why does it fill?"}]
MESSAGES_AS_TEXT = "<|begin|><|system|>Grüße.<|end|><|user|>水力? Why does it fill?<|end|><|assistant|>"


@dataclass
class Text:
    """One choice, whole or joined from a stream."""

    text: str = ""
    ids: list[int] = field(default_factory=list)
    logprobs: list[Any] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: Any = None


@dataclass
class Server:
    """A fleet and a client of it."""

    fleet: Fleet
    client: openai.OpenAI
    http: httpx.Client

    def ask(self, *, stream: bool = False, chat: bool = False, **fields: Any) -> list[Text]:
        """The choices of an answer. Fields that the client does not know go into `extra_body`; eos is ignored."""
        ours = ("top_k", "min_p", "repetition_penalty", "min_tokens", "stop_token_ids", "ignore_eos", "cache_salt")
        ours += ("include_stop_str_in_output", "skip_special_tokens", "allowed_token_ids", "bad_words")
        extra = {"return_token_ids": True, "ignore_eos": True}
        extra |= {name: fields.pop(name) for name in ours if name in fields}
        values = {"model": "tiny", "extra_body": extra, "stream": stream, **fields}
        if chat:
            answer: Any = self.client.chat.completions.create(**{"messages": MESSAGES, **values})
        else:
            answer = self.client.completions.create(**{"prompt": TEXT, **values})
        return _joined(answer) if stream else [_whole(choice) for choice in answer.choices]


def _whole(choice: Any) -> Text:
    text = choice.message.content if hasattr(choice, "message") else choice.text
    logprobs = _scores(choice.logprobs)
    return Text(text, choice.token_ids, logprobs, choice.finish_reason, choice.stop_reason)


def _joined(chunks: Any) -> list[Text]:
    texts: dict[int, Text] = {}
    for chunk in chunks:
        for choice in chunk.choices:
            text = texts.setdefault(choice.index, Text())
            assert text.finish_reason is None, "something came after the end"
            text.text += (choice.delta.content or "") if hasattr(choice, "delta") else choice.text
            text.ids += getattr(choice, "token_ids", None) or []
            text.logprobs += _scores(choice.logprobs)
            text.finish_reason = choice.finish_reason
            text.stop_reason = getattr(choice, "stop_reason", None)
    return [texts[index] for index in sorted(texts)]


def _scores(logprobs: Any) -> list[Any]:
    """One entry a token: (its logprob, the top ones)."""
    if logprobs is None:
        return []
    if hasattr(logprobs, "content"):
        return [(at.logprob, [(bytes(top.bytes), top.logprob) for top in at.top_logprobs]) for at in logprobs.content]
    return list(zip(logprobs.token_logprobs, logprobs.top_logprobs, strict=True))


Change = Callable[[torch.Tensor, list[int], list[int]], torch.Tensor]  # logits, prompt, output -> logits


class Reference:
    """What Hugging Face says; nothing of ours takes part."""

    def __init__(self, path: Path) -> None:
        self._model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        # In float32 its own scores are off by 1e-4: too much to judge others by.
        self._exact = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64).eval()
        self.greedy = cache(self._greedy)

    def _greedy(self, prompt: tuple[int, ...], count: int, change: Change | None = None) -> list[int]:
        """The most likely tokens one by one, over logits that `change` has worked on; no near-ties."""
        output: list[int] = []
        while len(output) < count:
            logits = self.logits([*prompt, *output])[-1]
            if change is not None:
                logits = change(logits.clone(), list(prompt), output)
            (best, second), ids = logits.topk(2)
            assert best - second > 1e-4, "a near-tie in the reference"
            output.append(int(ids[0]))
        return output

    def generate(self, prompt: Sequence[int], count: int) -> list[int]:
        """Its own `generate`, which stops at the ids of generation_config.json."""
        ids = torch.tensor([prompt])
        mask = torch.ones_like(ids)
        out = self._model.generate(ids, attention_mask=mask, max_new_tokens=count, do_sample=False, pad_token_id=0)
        return list(out[0, len(prompt) :].tolist())

    def logits(self, ids: Sequence[int]) -> torch.Tensor:
        with torch.inference_mode():
            logits: torch.Tensor = self._model(torch.tensor([ids])).logits[0]
        return logits

    def scores(self, prompt: Sequence[int], output: Sequence[int]) -> torch.Tensor:
        """log_softmax of the logits that each token of `output` was chosen from."""
        with torch.inference_mode():
            logits: torch.Tensor = self._exact(torch.tensor([[*prompt, *output]])).logits[0]
        return logits[len(prompt) - 1 : -1].log_softmax(-1)
