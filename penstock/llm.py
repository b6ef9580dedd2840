"""`LLM`: offline generation in this process, with vLLM's names. One phase: no Redis, no sockets, no workers.

The same engine as the workers', driven step by step; text is made by the same pure code as in the router.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, fields
from typing import Any

import msgspec
from tqdm import tqdm

from penstock.beams import BeamSearchOutput, BeamSearchSequence, PromptSearch, run_searches
from penstock.common.bad_words import bad_word_ids
from penstock.common.beam_search import BeamSearch, BeamSearchParams
from penstock.common.chat_template import ChatTemplate
from penstock.common.config import EngineConfig
from penstock.common.errors import BadRequest
from penstock.common.generation_defaults import GenerationDefaults
from penstock.common.messages import GenerateRequest, TokenLogprobs, request_key
from penstock.common.output_text import OutputText
from penstock.common.sampling import SamplingParams
from penstock.common.tokenizer import Tokenizer
from penstock.engine.build import build_engine
from penstock.engine.core import Engine
from penstock.engine.outputs import Output
from penstock.engine.policy import THROUGHPUT
from penstock.frozen_heap import FrozenHeap
from penstock.interrupt import HeldInterrupt
from penstock.results import CompletionOutput, Logprob, RequestOutput

Prompt = str | Sequence[int] | Mapping[str, Any]


@dataclass(frozen=True)
class _Choice:
    """One output in the making."""

    request: RequestOutput
    output: CompletionOutput
    text: OutputText | None  # None: only token ids are wanted
    source: GenerateRequest

    @property
    def key(self) -> str:
        """Its name in the engine."""
        return request_key(self.source.request_id, self.source.choice, self.source.attempt)


class LLM:
    """A model in this process.

    Args:
        model: Hugging Face directory or hub id.
        tokenizer: where the tokenizer is, if not with the model.
        generation_config: default sampling: "auto" (the model's), "vllm" (neutral), or a directory.
        skip_tokenizer_init: no tokenizer is read; prompts must be token ids, and answers hold no text.
        options: fields of `EngineConfig`, by vLLM's names (dtype, max_model_len, max_num_seqs, block_size, seed, ...).

    Raises:
        ValueError: an option that does not exist.
        ModelError, ConfigError: the model cannot be loaded, or does not fit.
    """

    def __init__(
        self,
        model: str,
        *,
        tokenizer: str | None = None,
        generation_config: str = "auto",
        skip_tokenizer_init: bool = False,
        **options: Any,
    ) -> None:
        known = {f.name for f in fields(EngineConfig)}
        unknown = sorted(set(options) - known)
        if unknown:
            raise ValueError(f"unknown options {', '.join(unknown)}; known are {', '.join(sorted(known))}")
        self.config = EngineConfig(model=model, **options)
        self._tokenizer = None if skip_tokenizer_init else Tokenizer.load(tokenizer or model)
        self._template = None if self._tokenizer is None else ChatTemplate.load(self._tokenizer)
        self._defaults = GenerationDefaults.load(model, generation_config)
        # Silent where nobody looks: not a terminal.
        with tqdm(desc="loading weights", unit="B", unit_scale=True, disable=None, leave=False) as bar:

            def show(stage: str, done: int, total: int) -> None:
                if getattr(bar, "desc", None) != stage:  # a silent bar has none
                    bar.desc, bar.unit, bar.n = stage, "B" if stage == "loading weights" else "step", 0
                bar.total = total
                bar.update(done - bar.n)

            self._built = build_engine(self.config, THROUGHPUT, progress=show, tokenizer=self.get_tokenizer)
        self._ids = itertools.count()

    @property
    def max_model_len(self) -> int:
        """Longest prompt plus output, in tokens."""
        return self._built.max_model_len

    @property
    def vocab_size(self) -> int:
        """Token ids are below it."""
        return self._built.spec.vocab_size

    @property
    def has_tokenizer(self) -> bool:
        """False with `skip_tokenizer_init`."""
        return self._tokenizer is not None

    @property
    def engine(self) -> Engine:
        """What computes: for benchmarks and tests."""
        return self._built.engine

    @property
    def on_gpu(self) -> bool:
        """Whether the model is on a CUDA device."""
        return self._built.pool.device.type == "cuda"

    def describe(self) -> str:
        """Device, dtype and KV pages in one line."""
        layout, pool = self._built.pool.layout, self._built.pool
        size_gib = pool.num_pages * layout.page_bytes / 2**30
        return (
            f"{pool.device}, {layout.dtype}, {pool.num_pages} pages of {layout.page_size} tokens ({size_gib:.2f} GiB), "
            f"context {self.max_model_len}"
        )

    def get_tokenizer(self) -> Tokenizer:
        """The tokenizer.

        Raises:
            ValueError: there is none, with `skip_tokenizer_init`.
        """
        if self._tokenizer is None:
            raise ValueError("skip_tokenizer_init=True: there is no tokenizer; give token ids, and no stop strings")
        return self._tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """What `generate` uses when no sampling parameters are given."""
        return SamplingParams(**self._defaults.sampling())

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        priority: Sequence[int] | None = None,
    ) -> list[RequestOutput]:
        """Complete each prompt: text, token ids, or {"prompt": ...} / {"prompt_token_ids": ...} (with "cache_salt").

        Of the prompts, those with the lowest `priority` come first.

        Raises:
            ValueError: a prompt is empty or too long, a token id is not the model's, or the numbers of prompts,
                parameters and priorities differ. Nothing has been computed then.
        """
        several = _prompt_list(prompts)
        if sampling_params is None or isinstance(sampling_params, SamplingParams):
            params = [sampling_params or self.get_default_sampling_params()] * len(several)
        else:
            params = list(sampling_params)
        if len(params) != len(several):
            raise ValueError(f"{len(several)} prompts, but {len(params)} sampling parameters")
        priorities = [0] * len(several) if priority is None else list(priority)
        if len(priorities) != len(several):
            raise ValueError(f"{len(several)} prompts, but {len(priorities)} priorities")
        with FrozenHeap():
            each = zip(several, params, priorities, strict=True)
            choices = [choice for prompt, p, first in each for choice in self._choices(prompt, p, first)]
            requests = list({choice.source.request_id: choice.request for choice in choices}.values())
            self._run(choices, len(requests), use_tqdm)
        return requests

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]] | Sequence[Sequence[Mapping[str, Any]]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        add_generation_prompt: bool = True,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Continue one conversation, or several, through the model's chat template.

        Raises:
            ValueError: there is no template, it refuses the messages, or as `generate`.
        """
        if self._template is None:
            self.get_tokenizer()
            raise ValueError("the tokenizer has no chat template")
        conversations: list[Any] = [messages] if messages and isinstance(messages[0], Mapping) else list(messages)
        try:
            texts = [
                self._template.render(
                    conversation,
                    add_generation_prompt=add_generation_prompt,
                    variables=chat_template_kwargs,
                )
                for conversation in conversations
            ]
        except BadRequest as error:
            raise ValueError(error.message) from error
        prompts = [
            {"prompt": t, "prompt_token_ids": self.get_tokenizer().encode(t, add_special_tokens=False)} for t in texts
        ]
        return self.generate(prompts, sampling_params, use_tqdm=use_tqdm)

    def beam_search(
        self, prompts: Prompt | Sequence[Prompt], params: BeamSearchParams, *, use_tqdm: bool = False
    ) -> list[BeamSearchOutput]:
        """The `beam_width` best continuations of each prompt, as Hugging Face's `generate(num_beams=...)` finds them.

        Raises:
            ValueError: as `generate`.
        """
        searches = [self._search(prompt, params) for prompt in _prompt_list(prompts)]
        with tqdm(total=len(searches), desc="Searching", disable=not use_tqdm, unit="prompt") as bar, FrozenHeap():
            run_searches(self._built.engine, searches, bar.update)
        return [self._best(search) for search in searches]

    def _search(self, prompt: Prompt, params: BeamSearchParams) -> PromptSearch:
        _, ids, salt = self._tokens_of(prompt)
        self._check_prompt(ids)
        max_tokens = min(params.max_tokens, self.max_model_len - len(ids))
        search = BeamSearch(params, self._built.spec.eos_token_ids, max_tokens)
        return PromptSearch(next(self._ids), ids, salt, search)

    def _best(self, prompt: PromptSearch) -> BeamSearchOutput:
        output = BeamSearchOutput()
        for found in prompt.search.finished:
            ids = [*prompt.prompt_token_ids, *found.beam.token_ids]
            text = None if self._tokenizer is None else self._tokenizer.decode(ids)
            reason, scores = "stop" if found.ended else "length", list(found.beam.scores)
            output.sequences.append(
                BeamSearchSequence(ids, scores, found.beam.cum_logprob, found.score, text, reason, None)
            )
        return output

    def close(self) -> None:
        """Free the KV pool; the object cannot be used afterwards."""
        self._built.engine.close()

    def _choices(self, prompt: Prompt, params: SamplingParams, priority: int = 0) -> list[_Choice]:
        """The choices of a prompt, checked; they share one `RequestOutput`."""
        text, ids, salt = self._tokens_of(prompt)
        ids = self._truncated(ids, params)
        self._check_prompt(ids)
        room = self.max_model_len - len(ids)
        self._check_ids(params.stop_token_ids, "stop_token_ids")
        words = self._bad_word_ids(params)
        self._check_form(params)
        number = next(self._ids)
        seed = params.seed if params.seed is not None else self._fresh_seed(number)
        wanted = room if params.max_tokens is None else min(room, params.max_tokens)
        sampling = _one_choice(params, seed, wanted, words)
        field, largest = sampling.largest_rule_id()
        self._check_ids([largest] if field else [], field)
        request = RequestOutput(str(number), text, ids, [CompletionOutput(index=i) for i in range(params.n)])
        return [
            _Choice(
                request,
                output,
                self._output_text(sampling, ids),
                GenerateRequest(
                    request_id=request.request_id,
                    choice=output.index,
                    prompt_token_ids=ids,
                    sampling=sampling,
                    eos_token_ids=list(self._built.spec.eos_token_ids),
                    cache_salt=salt,
                    queue_timeout_s=float("inf"),
                    priority=priority,
                ),
            )
            for output in request.outputs
        ]

    def _truncated(self, ids: list[int], params: SamplingParams) -> list[int]:
        kept = params.truncate_prompt_tokens
        if kept is None:
            return ids
        if kept > self.max_model_len:
            raise ValueError(f"truncate_prompt_tokens must be at most {self.max_model_len}, the context, got {kept}")
        return ids[-kept:] if kept > 0 else ids[-max(1, self.max_model_len - max(1, params.max_tokens or 1)) :]

    def _bad_word_ids(self, params: SamplingParams) -> list[list[int]]:
        """The banned words as tokens, those that were given as tokens included."""
        if not params.bad_words:
            return params.bad_words_token_ids
        tokenizer = self.get_tokenizer()
        words = bad_word_ids(params.bad_words, lambda text: tokenizer.encode(text, add_special_tokens=False))
        return [*params.bad_words_token_ids, *words]

    def _check_form(self, params: SamplingParams) -> None:
        """Raise ValueError for a form that no output can be given."""
        constraints = self._built.engine.constraints
        if params.structured_outputs is not None and constraints is not None:
            constraints.grammars.compile(params.structured_outputs).result()

    def _output_text(self, sampling: SamplingParams, prompt_ids: Sequence[int]) -> OutputText | None:
        """What makes the text of a choice; None where no text is wanted (stop strings want it, see SamplingParams)."""
        if not sampling.detokenize or (self._tokenizer is None and not sampling.stop):
            return None
        return OutputText(self.get_tokenizer(), sampling, prompt_ids)

    def _check_prompt(self, ids: Sequence[int]) -> None:
        if not 0 < len(ids) < self.max_model_len:
            raise ValueError(
                f"a prompt must have from 1 to {self.max_model_len - 1} tokens here, this one has {len(ids)}"
            )
        self._check_ids(ids, "a prompt")

    def _check_ids(self, token_ids: Sequence[int], what: str) -> None:
        vocab_size = self._built.spec.vocab_size
        if token_ids and not 0 <= min(token_ids) <= max(token_ids) < vocab_size:
            raise ValueError(f"{what} must hold token ids from 0 to {vocab_size - 1}")

    def _fresh_seed(self, number: int) -> int:
        if self.config.seed:
            return (self.config.seed * 0x9E3779B97F4A7C15 + number) % 2**63
        return int.from_bytes(os.urandom(8), "little") >> 1

    def _tokens_of(self, prompt: Prompt) -> tuple[str | None, list[int], str]:
        if isinstance(prompt, str):
            return prompt, self.get_tokenizer().encode(prompt), ""
        if isinstance(prompt, Mapping):
            text, ids = prompt.get("prompt"), prompt.get("prompt_token_ids")
            if ids is None and text is None:
                raise ValueError("a prompt needs prompt or prompt_token_ids")
            ids = self.get_tokenizer().encode(str(text)) if ids is None else list(ids)
            return text, ids, prompt.get("cache_salt", "")
        return None, list(prompt), ""

    def _run(self, choices: Iterable[_Choice], num_requests: int, use_tqdm: bool) -> None:
        """Step until all choices have ended; whatever ends it early, the engine is empty afterwards."""
        engine = self._built.engine
        running = {choice.key: choice for choice in choices}
        with (
            tqdm(total=num_requests, desc="Generating", disable=not use_tqdm, unit="prompt") as bar,
            HeldInterrupt() as ctrl_c,
        ):
            try:
                # What may take longest starts first, so that the batch does not end in a few long ones; else in order.
                for choice in sorted(running.values(), key=_place):
                    engine.add(choice.source)
                while running:
                    for output in engine.step().outputs:
                        choice = running[output.key]
                        if output.prompt_logprobs is not None:
                            self._add_prompt_logprobs(choice.request, output.prompt_logprobs)
                        if choice.text is None and output.finish is None and output.logprobs is None:
                            choice.output.token_ids += output.token_ids  # nearly all tokens of a benchmark
                        elif self._take(choice, output):
                            del running[output.key]
                            if all(o.finish_reason for o in choice.request.outputs):
                                choice.request.finished = True
                                bar.update()
                    ctrl_c.deliver()
            finally:
                for key in running:
                    engine.scheduler.abort(key)
                engine.settle()
                engine.pages.drain_events()  # nobody else wants to know which prefixes are here

    def _take(self, choice: _Choice, new: Output) -> bool:
        """Add a step's tokens to an output; True when it has ended."""
        output, text = choice.output, choice.text
        if text is None:
            kept = len(new.token_ids)
            if new.finish is not None:
                output.finish_reason, output.stop_reason = new.finish.reason, new.finish.stop_reason
        else:
            output.text += text.push(new.token_ids, new.finish)
            kept = text.kept
            output.finish_reason, output.stop_reason = text.finish_reason, text.stop_reason
        output.token_ids += new.token_ids[:kept]
        if new.logprobs is not None:
            self._add_logprobs(output, new.token_ids, new.logprobs[:kept])
        if output.finish_reason is None:
            return False
        cached_tokens = 0 if new.spans is None else new.spans.cached_tokens
        if new.finish is None:  # a stop string: the engine does not know of it
            ended = self._built.engine.scheduler.abort(choice.key)
            cached_tokens = 0 if ended is None else ended.cached_tokens
        choice.request.num_cached_tokens = max(choice.request.num_cached_tokens, cached_tokens)
        return True

    def _add_logprobs(
        self, output: CompletionOutput, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs]
    ) -> None:
        output.logprobs = output.logprobs or []
        output.cumulative_logprob = output.cumulative_logprob or 0.0
        for token, at in zip(token_ids, logprobs, strict=False):
            output.logprobs.append(self._candidates(token, at))
            output.cumulative_logprob += at.logprob

    def _add_prompt_logprobs(self, request: RequestOutput, logprobs: Sequence[TokenLogprobs]) -> None:
        scored = zip(request.prompt_token_ids[1:], logprobs, strict=True)
        request.prompt_logprobs = [None, *(self._candidates(token, at) for token, at in scored)]

    def _candidates(self, token: int, at: TokenLogprobs) -> dict[int, Logprob]:
        found = {token: Logprob(at.logprob, at.rank, self._name(token))}
        for rank, (top, value) in enumerate(zip(at.top_ids, at.top_logprobs, strict=True), start=1):
            found.setdefault(top, Logprob(value, rank, self._name(top)))
        return found

    def _name(self, token_id: int) -> str | None:
        return None if self._tokenizer is None else self._tokenizer.token_text(token_id)


def _place(choice: _Choice) -> tuple[int, int]:
    return choice.source.priority, -(choice.source.sampling.max_tokens or 0)


def _one_choice(params: SamplingParams, seed: int, max_tokens: int, bad_words: list[list[int]]) -> SamplingParams:
    """The parameters of one choice. They are within the bounds that `params` was checked for: not checked again."""
    sampling = copy(params)
    msgspec.structs.force_setattr(sampling, "seed", seed)
    msgspec.structs.force_setattr(sampling, "n", 1)
    msgspec.structs.force_setattr(sampling, "bad_words_token_ids", bad_words)
    msgspec.structs.force_setattr(sampling, "max_tokens", max_tokens)
    msgspec.structs.force_setattr(sampling, "min_tokens", min(params.min_tokens, max_tokens))
    return sampling


def _prompt_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str | Mapping):
        return [prompts]
    several: Iterable[Any] = prompts
    items = list(several)
    return [items] if items and isinstance(items[0], int) else items
