"""The embedded demo model: a Llama of three million parameters that answers simple questions in readable English.

`checkpoint/` is an ordinary Hugging Face checkpoint (config, bfloat16 safetensors, tokenizer, chat template), trained
by scripts/train_demo_model.py on nothing but what scripts/demo_text.py writes. Used by `penstock.demo` and by tests
that want words for an answer. Needs no network.
"""

from __future__ import annotations

import shutil
from pathlib import Path

CHECKPOINT = Path(__file__).resolve().parent / "checkpoint"


def make_demo_model(directory: Path) -> Path:
    """Write a copy of the demo checkpoint into `directory`, made if missing, and return it; the copy may be edited."""
    shutil.copytree(CHECKPOINT, directory, dirs_exist_ok=True)
    return directory
