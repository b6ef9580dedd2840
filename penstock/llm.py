"""`LLM`: offline generation in this process, with vLLM's names. One phase: no Redis, no sockets, no workers.

The same engine as the workers', driven step by step; text is made by the same pure code as in the router.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from os import PathLike, fspath
from pathlib import Path
from threading import RLock
from typing import TYPE_CHECKING, Any, NoReturn

from tqdm import tqdm

from penstock.answers import Answers, Choice
from penstock.beams import BeamSearchOutput, BeamSearchSequence, PromptSearch, run_searches
from penstock.common.beam_search import BeamSearchParams
from penstock.common.config import EngineConfig
from penstock.common.generation_defaults import GenerationDefaults
from penstock.common.grammar import Grammars
from penstock.common.sampling import SamplingParams
from penstock.common.tokenizer import Tokenizer
from penstock.engine.build import build_engine
from penstock.engine.core import Engine
from penstock.engine.policy import THROUGHPUT
from penstock.engine_args import FLEET_ONLY, EngineArgs, supported
from penstock.engine_run import EngineRun, Run
from penstock.frozen_heap import FrozenHeap
from penstock.intake import Intake, ModelLimits
from penstock.prompts import Messages, Prompt, Prompts, prompt_list, refuse
from penstock.results import RequestOutput

Tqdm = bool | Callable[..., Any]  # whether to show progress, or what shows it instead of tqdm's own bar
_NOT_THERE = {  # methods of vLLM's
    **dict.fromkeys(("embed", "encode", "classify", "reward", "score"), "models here generate text"),
    **dict.fromkeys(("sleep", "wake_up"), "close the object, and make another"),
    **dict.fromkeys(("start_profile", "stop_profile"), "see `penstock bench decode-step --profile`"),
    **dict.fromkeys(("collective_rpc", "apply_model"), "use `engine`"),
    "reset_prefix_cache": "give a cache_salt",
    "get_metrics": "see /metrics of `penstock serve`",
}

UNITS = {"loading weights": "B", "compiling kernels": "kernel", "capturing steps": "step"}


class LLM:
    """A model in this process; with `prefill_workers` or `decode_workers`, in a fleet of worker processes behind it.

    Any thread may call it. In this process calls are computed one after the other, by a fleet together.

    Args:
        model: Hugging Face directory or hub id.
        tokenizer: where the tokenizer is, if not with the model.
        generation_config: default sampling: "auto" (the model's), "vllm" (neutral), or a directory.
        chat_template: a file, or the template itself; default: the tokenizer's.
        skip_tokenizer_init: no tokenizer is read; prompts must be token ids, and answers hold no text.
        options: those of `penstock serve`, by vLLM's names (dtype, max_model_len, max_num_seqs, block_size, seed, ...).

    Raises:
        ValueError: an option that does not exist, or cannot be had.
        ModelError, ConfigError: the model cannot be loaded, or does not fit.
    """

    _one_call: AbstractContextManager[object]

    def __new__(cls, *arguments: Any, **options: Any) -> LLM:
        """The class for the options: that of a fleet has the same methods."""
        if cls is LLM and any(options.get(name) is not None for name in ("prefill_workers", "decode_workers")):
            from penstock.fleet_llm import FleetLLM

            return super().__new__(FleetLLM)
        return super().__new__(cls)

    def __init__(
        self,
        model: str | PathLike[str],
        *,
        tokenizer: str | PathLike[str] | None = None,
        generation_config: str = "auto",
        skip_tokenizer_init: bool = False,
        chat_template: str | Path | None = None,
        **options: Any,
    ) -> None:
        given, model = supported(options), fspath(model)
        self.config = EngineConfig(model=model, **{name: v for name, v in given.items() if name not in FLEET_ONLY})
        self._tokenizer_path = fspath(tokenizer or "")
        self._tokenizer = None if skip_tokenizer_init else Tokenizer.load(self._tokenizer_path or model)
        self._prompts = Prompts(self._tokenizer, chat_template)
        self._defaults = GenerationDefaults.load(model, generation_config)
        self.answers = Answers(self._tokenizer)
        self._start({name: value for name, value in given.items() if name in FLEET_ONLY})
        limits = ModelLimits(self.max_model_len, self.vocab_size, self.eos_token_ids)
        self.intake = Intake(self._prompts, limits, self._grammars, self.config.seed)

    @classmethod
    def from_engine_args(cls, engine_args: EngineArgs) -> LLM:
        """As the constructor, with arguments that were put together before."""
        return cls(engine_args.model, **engine_args.options)

    def _start(self, fleet_options: Mapping[str, Any]) -> None:
        """Load the model, to compute in this process; options of a fleet are for `FleetLLM`."""
        if fleet_options:
            raise ValueError(f"{', '.join(sorted(fleet_options))}: for fleets; give prefill_workers or decode_workers")
        self._one_call = RLock()  # on the engine; the handler of a signal may close it within its own thread's call
        self._closed = False
        # Silent where nobody looks: not a terminal.
        with tqdm(desc="loading weights", unit="B", unit_scale=True, disable=None, leave=False) as bar:

            def show(stage: str, done: int, total: int) -> None:
                if getattr(bar, "desc", None) != stage:  # a silent bar has none
                    bar.desc, bar.unit, bar.n = stage, UNITS[stage], 0
                bar.total = total
                bar.update(done - bar.n)

            self._built = build_engine(self.config, THROUGHPUT, progress=show, tokenizer=self.get_tokenizer)

    @property
    def max_model_len(self) -> int:
        """Longest prompt plus output, in tokens."""
        return self._built.max_model_len

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Tokens that end an output."""
        return tuple(self._built.spec.eos_token_ids)

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
        """What computes: for `AsyncLLM`, benchmarks and tests."""
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
        return self._prompts.tokenizer

    if not TYPE_CHECKING:  # for type checkers there is nothing

        def __getattr__(self, name: str) -> NoReturn:
            why = f": {_NOT_THERE[name]}" if name in _NOT_THERE else ""
            raise AttributeError(f"LLM has no {name}{why}")

    def get_default_sampling_params(self) -> SamplingParams:
        """What `generate` uses when no sampling parameters are given."""
        return SamplingParams(**self._defaults.sampling())

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: Tqdm = True,
        lora_request: None = None,
        priority: Sequence[int] | None = None,
        tokenization_kwargs: Mapping[str, Any] | None = None,
        mm_processor_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Complete each prompt: text, token ids, or {"prompt": ...} / {"prompt_token_ids": ...} (with "cache_salt").

        Of the prompts, those with the lowest `priority` come first. `tokenization_kwargs` may hold
        `add_special_tokens`.

        Raises:
            ValueError: a prompt is empty or too long, a token id is not the model's, the numbers of prompts,
                parameters and priorities differ, or an argument asks for what is not here. Nothing has been computed.
        """
        refuse(lora_request=lora_request, mm_processor_kwargs=mm_processor_kwargs)
        self.check_open()
        params = self.get_default_sampling_params() if sampling_params is None else sampling_params
        with FrozenHeap():
            choices = self.intake.all_choices(prompts, params, priority, tokenization_kwargs)
            return self._run_requests(choices, use_tqdm)

    def chat(
        self,
        messages: Messages | Sequence[Messages],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: Tqdm = True,
        lora_request: None = None,
        chat_template: str | None = None,
        chat_template_content_format: str = "auto",
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        tokenization_kwargs: Mapping[str, Any] | None = None,
        mm_processor_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Continue one conversation, or several, through a chat template: `chat_template` (a file, or its text), else
        the model's. It is shown `tools`, and `chat_template_kwargs`. What the model says is not parsed.

        Raises:
            ValueError: there is no template, it refuses the messages, or as `generate`.
        """
        refuse(lora_request=lora_request, mm_processor_kwargs=mm_processor_kwargs)
        if continue_final_message and add_generation_prompt:
            raise ValueError("continue_final_message and add_generation_prompt cannot both be true")
        conversations: list[Any] = [messages] if messages and isinstance(messages[0], Mapping) else list(messages)
        prompts = [
            self._prompts.chat(
                conversation,
                chat_template,
                chat_template_content_format,
                tokenization_kwargs,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                tools=tools or None,
                variables=chat_template_kwargs,
            )
            for conversation in conversations
        ]
        return self.generate(prompts, sampling_params, use_tqdm=use_tqdm)

    def beam_search(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: BeamSearchParams,
        lora_request: None = None,
        use_tqdm: Tqdm = False,
        concurrency_limit: int | None = None,
    ) -> list[BeamSearchOutput]:
        """The `beam_width` best continuations of each prompt, as Hugging Face's `generate(num_beams=...)` finds them.
        `concurrency_limit`: of how many prompts at a time.

        Raises:
            ValueError: as `generate`.
        """
        refuse(lora_request=lora_request)
        self.check_open()
        if concurrency_limit is not None and concurrency_limit < 1:
            raise ValueError(f"concurrency_limit must be at least 1, got {concurrency_limit}")
        searches = [self.intake.search(prompt, params) for prompt in prompt_list(prompts)]
        with self._one_call, _bar(use_tqdm, len(searches), "Searching") as bar, FrozenHeap():
            run_searches(self._begin(), searches, bar.update, concurrency_limit)
        return [self._best(search, params) for search in searches]

    def _best(self, prompt: PromptSearch, params: BeamSearchParams) -> BeamSearchOutput:
        output, tokenizer = BeamSearchOutput(), self._tokenizer
        for found in prompt.search.finished:
            ids = [*prompt.prompt_token_ids, *found.beam.token_ids]
            text = None if tokenizer is None else tokenizer.decode(ids)
            if text is not None and tokenizer is not None and found.ended and params.include_stop_str_in_output:
                text = tokenizer.decode(ids[:-1]) + tokenizer.token_text(ids[-1])
            scores = [self.answers.candidates(*at) for at in zip(found.beam.token_ids, found.beam.scores, strict=True)]
            reason, total = "stop" if found.ended else "length", found.beam.cum_logprob
            output.sequences.append(BeamSearchSequence(ids, scores, total, found.score, text, reason, None))
        return output

    def close(self) -> None:
        """Free the KV pool, once no other thread generates; the object cannot be used afterwards. Again: nothing."""
        with self._one_call:
            if not self._closed:
                self._closed = True
                self._built.engine.close()

    @property
    def _grammars(self) -> Grammars | None:
        """What compiles forms; None: no output can be given one."""
        constraints = self._built.engine.constraints
        return None if constraints is None else constraints.grammars

    def check_open(self) -> None:
        """Raises ValueError after `close`: forms are not compiled then, nor is anything else done."""
        if self._closed:
            raise ValueError("it is closed")

    def _begin(self) -> Run:
        self.check_open()
        return EngineRun(self._built.engine)

    def _run_requests(self, choices: Sequence[Choice], use_tqdm: Tqdm) -> list[RequestOutput]:
        requests = list({choice.source.request_id: choice.request for choice in choices}.values())
        self._run(choices, len(requests), use_tqdm)
        return requests

    def _run(self, choices: Sequence[Choice], num_requests: int, use_tqdm: Tqdm) -> None:
        """Until all choices have ended; whatever ends it early, nothing of them is left where they were computed."""
        running = {choice.key: choice for choice in choices}
        with (
            self._one_call,
            _bar(use_tqdm, num_requests, "Generating") as bar,
            self._begin() as run,
        ):
            for choice in sorted(choices, key=start_order):
                run.add(choice.source)
            while running:
                for key, new in run.outputs():
                    choice = running[key]
                    plain = choice.text is None and new.finish is None and new.spans is None
                    if plain and new.logprobs is None and new.prompt_logprobs is None:
                        choice.output.token_ids += new.token_ids  # nearly all tokens of a benchmark
                    elif self.answers.take(choice, new):
                        del running[key]
                        if new.finish is None:
                            run.abort(key)
                        bar.update(choice.request.finished)


def start_order(choice: Choice) -> tuple[int, int]:
    """What may take longest first, so that a batch does not end in a few long ones; else in order."""
    return choice.source.priority, -(choice.source.sampling.max_tokens or 0)


def _bar(use_tqdm: Tqdm, total: int, desc: str) -> Any:
    bar = use_tqdm if callable(use_tqdm) else tqdm
    return bar(total=total, desc=desc, disable=not use_tqdm, unit="prompt")
