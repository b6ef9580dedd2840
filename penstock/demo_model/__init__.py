"""The embedded demo model: a two-megabyte Llama that has read one short book about mills, in the Hugging Face format.

`checkpoint/` is an ordinary checkpoint (config, bfloat16 safetensors, tokenizer, chat template); text.txt and
dialogues.txt are all that it was trained on, by scripts/train_demo_model.py. Used by `penstock.demo` and by tests that
want words for an answer. Needs no network.
"""

from __future__ import annotations

import shutil
from pathlib import Path

CHECKPOINT = Path(__file__).resolve().parent / "checkpoint"


def make_demo_model(directory: Path) -> Path:
    """Write a copy of the demo checkpoint into `directory`, made if missing, and return it; the copy may be edited."""
    shutil.copytree(CHECKPOINT, directory, dirs_exist_ok=True)
    return directory
