"""What a form costs a token: the matcher reads it, and computes which tokens may follow.

    python benchmarks/structured.py [--tokens 2000] [--rows 1 16 64]

Of the embedded model's vocabulary and of a synthetic one of 151,936 tokens (words, digits, punctuation and spaces in
the proportions of a large byte-level BPE): preparing the vocabulary, compiling a form, reading a token and its mask in
one thread; and from the end of a step until the masks of so many requests are there, by the engine's own threads.
Outputs are walks at random over what the masks allow. Records benchmarks/results/structured-COMMIT.json.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from llguidance import LLMatcher
from tokenizers import AddedToken, decoders, models, pre_tokenizers

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from anywhere, installed or not

import penstock
from benchmarks import record
from penstock.common.grammar import Grammars
from penstock.common.messages import GenerateRequest
from penstock.common.sampling import SamplingParams
from penstock.common.structured_outputs import StructuredOutputsParams
from penstock.common.tokenizer import Tokenizer
from penstock.engine.constraints import Constraints

LARGE = 151_936
_PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 40},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "b", "long tag"]}, "maxItems": 5},
        "note": {"type": "string"},
    },
    "required": ["name", "age", "tags", "note"],
    "additionalProperties": False,
}
FORMS = {
    "schema": StructuredOutputsParams(json=_PERSON),
    "json_object": StructuredOutputsParams(json_object=True),
    "regex": StructuredOutputsParams(regex=r"[a-z]{1,2000}@[a-z]+\.(com|org)"),
    "choice": StructuredOutputsParams(choice=[f"choice number {i}" for i in range(200)]),
    "grammar": StructuredOutputsParams(
        grammar='start: sum\nsum: product | sum /[-+]/ product\nproduct: atom | product /[*\\/]/ atom\n'
        'atom: /[0-9]+/ | "(" sum ")"'
    ),
}  # fmt: skip


def large_vocabulary(size: int, seed: int = 0) -> Tokenizer:
    """A byte-level tokenizer of so many tokens, the last of which is the end."""
    rng = random.Random(seed)
    letters = "etaoinshrdlucmfwypvbgkjqxz"
    vocab = {char: i for i, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    while len(vocab) < size - 1:
        length, kind = min(14, max(2, round(rng.gauss(6, 3)))), rng.random()
        if kind < 0.03:
            word = "".join(rng.choices("0123456789", k=min(length, 3)))
        elif kind < 0.1:
            word = "".join(rng.choices('{}[]":,.;()<>/=+-*ĠĠĠĊĊ', k=min(length, 5)))
        else:
            word = "".join(letters[min(25, int(rng.expovariate(0.15)))] for _ in range(length))
            word = ("Ġ" if rng.random() < 0.5 else "") + (word.capitalize() if rng.random() < 0.2 else word)
        vocab.setdefault(word, len(vocab))
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("<|end|>", special=True)])
    return Tokenizer(backend, {"eos_token": "<|end|>"})


def allowed(mask: bytes) -> np.ndarray:
    """Ids of the tokens in a mask."""
    return np.flatnonzero(np.unpackbits(np.frombuffer(mask, np.uint8), bitorder="little"))


def walk(matcher: LLMatcher, end: int, tokens: int, rng: random.Random) -> tuple[list[float], list[float]]:
    """Seconds of reading each token and of each mask, over outputs that begin again when they have ended."""
    reads: list[float] = []
    masks: list[float] = []
    current = matcher.deep_copy()
    while len(masks) < tokens:
        began = time.perf_counter()
        mask = current.compute_bitmask()
        masks.append(time.perf_counter() - began)
        token = int(rng.choice(allowed(mask)))
        if token != end:
            began = time.perf_counter()
            assert current.consume_token(token), current.get_error()
            reads.append(time.perf_counter() - began)
        if token == end or current.is_stopped():
            current = matcher.deep_copy()
    return reads, masks


def step_s(load: Callable[[], Tokenizer], form: StructuredOutputsParams, end: int, size: int, rows: int) -> list[float]:
    """From a step's tokens until the masks of `rows` requests are there, for steps of the engine's own threads."""
    owner = Constraints(Grammars(load, size, [end]))
    sampling = SamplingParams(structured_outputs=form)
    source = GenerateRequest(request_id="r", prompt_token_ids=[0], sampling=sampling, eos_token_ids=[end])
    rng, times = random.Random(1), []
    made = [owner.begin(source) for _ in range(rows)]
    current = [constraint for constraint in made if constraint is not None]
    try:
        for _ in range(40):
            for constraint in current:
                constraint.job.result()
            current = [c if c.finish is None else owner.begin(source) or c for c in current]
            for constraint in current:
                constraint.job.result()
            tokens = [int(rng.choice([t for t in allowed(c.mask)[:4000] if t != end] or [end])) for c in current]
            began = time.perf_counter()
            owner.accept([(constraint, [token]) for constraint, token in zip(current, tokens, strict=True)])
            for constraint in current:
                constraint.job.result()
            times.append(time.perf_counter() - began)
    finally:
        owner.close()
    return times


def measure(load: Callable[[], Tokenizer], tokens: int, rows: list[int]) -> dict[str, Any]:
    """The figures of one vocabulary, in milliseconds."""
    tokenizer = load()
    end, size = tokenizer.eos_token_id, tokenizer.vocab_size
    assert end is not None
    grammars = Grammars(load, size, [end])
    began = time.perf_counter()
    grammars.compile(StructuredOutputsParams(regex="a")).result()
    found: dict[str, Any] = {"vocabulary": size, "prepare_ms": _ms(time.perf_counter() - began)}
    for name, form in FORMS.items():
        began = time.perf_counter()
        matcher = grammars.compile(form).result()
        compiled = time.perf_counter() - began
        reads, masks = walk(matcher, end, tokens, random.Random(0))
        found[name] = {
            "compile_ms": _ms(compiled),
            "read_p50_ms": _ms(statistics.median(reads)),
            "mask_p50_ms": _ms(statistics.median(masks)),
            "mask_mean_ms": _ms(statistics.mean(masks)),
            "mask_p99_ms": _ms(statistics.quantiles(masks, n=100)[98]),
        }
        print(size, name, found[name], flush=True)
    for count in rows:
        times = step_s(load, FORMS["schema"], end, size, count)
        found[f"step_of_{count}_p50_ms"] = _ms(statistics.median(times))
        print(size, count, found[f"step_of_{count}_p50_ms"], flush=True)
    grammars.close()
    return found


def _ms(seconds: float) -> float:
    return round(seconds * 1e3, 3)


def main() -> None:
    """Measure both vocabularies and record the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2000, help="of each form")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--vocabulary", type=int, default=LARGE, help="tokens of the synthetic one")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    embedded = Tokenizer.load(str(Path(penstock.__file__).parent / "demo_model" / "checkpoint"))
    large = large_vocabulary(options.vocabulary)
    figures = {
        "embedded": measure(lambda: embedded, options.tokens, options.rows),
        "synthetic": measure(lambda: large, options.tokens, options.rows),
    }
    at_commit = record.commit()
    path = options.out or record.RESULTS / record.file_name("structured", at_commit)
    record.merge(path, record.machine(), at_commit, figures)
    print(path)


if __name__ == "__main__":
    main()
