"""A model folder of a shape without weights: its configuration, and a tokenizer that makes a word of every token id.

For benchmarks that serve random weights (--load-format dummy) over HTTP: the router needs a tokenizer, and text must
come of every token, so that each is an event of its stream.
"""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from benchmarks.shapes import Shape


def make_shape_folder(shape: Shape, folder: Path) -> Path:
    """Write config.json and tokenizer.json into `folder`; returns it."""
    (folder / "config.json").write_text(json.dumps(shape.config()))
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*letters, *(f"Ġw{i}" for i in range(len(letters), shape.vocab))][: shape.vocab]
    tokenizer = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder
