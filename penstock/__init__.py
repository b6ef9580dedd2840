"""Penstock: a serving system for large language models with prefill and decode in separate workers."""

from __future__ import annotations

__version__ = "0.1.0"
