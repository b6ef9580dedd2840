"""From a model's name to a loaded model: find the checkpoint, pick the class, load the weights.

Workers call `resolve_checkpoint`, `models.spec.read_spec`, then `load_model`. Another package adds an architecture
with `register`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import torch

from penstock.models.decoder import CausalLM
from penstock.models.errors import ModelError
from penstock.models.spec import TRAITS, ModelSpec, Traits
from penstock.models.weights import dummy_weights, load_weights

logger = logging.getLogger(__name__)

# Weights, configuration, tokenizer and chat template; no .bin, .pth or GGUF copies of the same weights.
_NEEDED_FILES = ("*.json", "*.safetensors", "*.jinja", "tokenizer.model")

_CLASSES: dict[str, type[CausalLM]] = dict.fromkeys(TRAITS, CausalLM)


def register(architecture: str, model_class: type[CausalLM], traits: Traits) -> None:
    """Add an architecture, by its name in config.json. Replaces one of the same name."""
    TRAITS[architecture] = traits
    _CLASSES[architecture] = model_class


def resolve_checkpoint(model: str) -> Path:
    """The directory of a checkpoint: `model` itself, or the download of a hub id (what is cached is not fetched again).

    Raises:
        ModelError: no such directory, and no such model on the hub or no way to reach it.
    """
    path = Path(model)
    if not path.is_dir():
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

        # The hub's own bars are for terminals: a worker that serve started would be silent for as long as it takes.
        logger.info("%s is not here: what is not cached of it is downloaded from the Hugging Face hub", model)
        try:
            path = Path(snapshot_download(model, allow_patterns=list(_NEEDED_FILES)))
        except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ModelError(f"{model} is no directory, and could not be had from the hub: {reason}") from error
    if not (path / "config.json").exists():
        raise ModelError(f"{path} holds no config.json")
    return path


def load_model(
    path: Path,
    spec: ModelSpec,
    *,
    dtype: torch.dtype,
    device: torch.device,
    load_format: str = "auto",
    attention_backend: str = "AUTO",
    progress: Callable[[int, int], None] | None = None,
) -> CausalLM:
    """The model with its weights on `device`; `progress` gets (bytes done, bytes in all) after every tensor.

    load_format: auto reads the checkpoint in `path`; dummy makes random weights and reads nothing.
    attention_backend: what computes prompts on CUDA (kernels/prefill_attention.py).

    Raises:
        ModelError: the checkpoint is incomplete or broken.
    """
    model_class = _CLASSES[spec.architecture]
    parameters = model_class.parameters(spec)
    if load_format == "dummy":
        weights = dummy_weights(parameters, dtype, device, progress)
    elif load_format == "auto":
        weights = load_weights(path, parameters, dtype, device, progress)
    else:
        raise ValueError(f"load_format must be auto or dummy, got {load_format!r}")
    return model_class(spec, weights, attention_backend=attention_backend)
