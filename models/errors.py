"""The one error of this folder; it repeats `common`'s because models may import kernels only."""

from __future__ import annotations


class ModelError(Exception):
    """The checkpoint is unsupported or broken; the message names what is missing."""
