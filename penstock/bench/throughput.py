"""`penstock bench throughput`: how long many requests take that all come at once."""

from __future__ import annotations

import random
import time
from typing import Any

from penstock.bench import datasets
from penstock.bench.config import ThroughputConfig
from penstock.bench.datasets import Sample
from penstock.bench.profiling import profile
from penstock.bench.result import build, check_length, sampling, write_json
from penstock.llm import LLM
from penstock.results import RequestOutput


def run_throughput(config: ThroughputConfig) -> dict[str, Any] | None:
    """Measure, print and write; the result has vLLM's keys. None after a profile.

    Raises:
        ConfigError: the dataset cannot be read, or holds requests longer than the engine's context.
    """
    llm = build(config)
    try:
        warmups = samples(config, llm, config.num_warmups, random.Random(config.seed + 1))
        requests = samples(config, llm, config.num_prompts, random.Random(config.seed))
        for sample in warmups + requests:
            check_length(llm, len(sample.prompt_token_ids), sample.output_len)
        if warmups:
            print(f"Warming up with {len(warmups)} requests", flush=True)
            _generate(llm, config, warmups, use_tqdm=False)
        if config.profile:
            print(profile(llm, lambda: _generate(llm, config, requests, use_tqdm=True)))
            return None
        begun = time.perf_counter()
        answers = _generate(llm, config, requests, use_tqdm=True)
        elapsed_s = time.perf_counter() - begun
    finally:
        llm.close()
    prompt_tokens = sum(len(answer.prompt_token_ids) for answer in answers)
    output_tokens = sum(len(output.token_ids) for answer in answers for output in answer.outputs)
    result = {
        "elapsed_time": elapsed_s,
        "num_requests": len(requests),
        "total_num_tokens": prompt_tokens + output_tokens,
        "requests_per_second": len(requests) / elapsed_s,
        "tokens_per_second": (prompt_tokens + output_tokens) / elapsed_s,
    }
    print(
        f"Throughput: {len(requests) / elapsed_s:.2f} requests/s, "
        f"{(prompt_tokens + output_tokens) / elapsed_s:.2f} total tokens/s, "
        f"{output_tokens / elapsed_s:.2f} output tokens/s"
    )
    print(f"{len(requests)} requests in {elapsed_s:.2f} s: {prompt_tokens} prompt, {output_tokens} output tokens")
    write_json(config.output_json, result)
    return result


def _generate(llm: LLM, config: ThroughputConfig, requests: list[Sample], *, use_tqdm: bool) -> list[RequestOutput]:
    prompts = [sample.prompt_token_ids for sample in requests]
    params = [sampling(config, sample.output_len) for sample in requests]
    return llm.generate(prompts, params, use_tqdm=use_tqdm)


def samples(config: ThroughputConfig, llm: LLM, number: int, chooser: random.Random) -> list[Sample]:
    """`number` requests of the configured dataset; fewer if it holds fewer.

    Raises:
        ConfigError: the file cannot be read, or is not what `dataset_name` says.
    """
    if number == 0:
        return []
    if config.kind == "sharegpt":
        found = datasets.read_json(config.path)
        return datasets.sharegpt(found, llm.get_tokenizer(), number, config.output_len, chooser)
    if config.kind == "custom":
        return datasets.custom(datasets.read(config.path), llm.get_tokenizer(), number, config.output_len)
    ids = _plain_ids(llm)
    if config.kind == "trace":
        requests = datasets.read_trace(config.path, config.trace_page_tokens, config.trace_max_len)
        return datasets.traced(requests, ids, number, config.trace_page_tokens, config.output_len)
    if config.kind == "lengths":
        return datasets.with_lengths(datasets.read_json(config.path), ids, number, config.output_len, chooser)
    if config.kind == "prefix_repetition":
        return datasets.prefix_repetition(
            ids,
            number,
            prefix_len=config.prefix_repetition_prefix_len,
            suffix_len=config.prefix_repetition_suffix_len,
            num_prefixes=config.prefix_repetition_num_prefixes,
            output_len=config.output_len or config.prefix_repetition_output_len,
            chooser=chooser,
        )
    return datasets.random_samples(
        ids,
        number,
        input_len=config.input_length,
        output_len=config.output_length,
        prefix_len=config.prefix_length,
        ratios=config.range_ratios,
        chooser=chooser,
    )


def _plain_ids(llm: LLM) -> list[int]:
    """Token ids to draw from: without the special ones, where a tokenizer tells which they are."""
    special = llm.get_tokenizer().special_ids if llm.has_tokenizer else frozenset()
    return [i for i in range(llm.vocab_size) if i not in special]
