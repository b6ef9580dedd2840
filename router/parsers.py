"""Which parsers there are, and which this router uses: `--tool-call-parser`, `--reasoning-parser` and their plugins.

A plugin is a Python file with subclasses of `ToolParser` or `ReasoningParser`; their `names` become known with it.
"""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TypeVar

from penstock.common.config import RouterConfig
from penstock.common.errors import ConfigError
from penstock.common.tokenizer import Tokenizer
from penstock.router.reasoning import formats as reasoning_formats
from penstock.router.reasoning.parser import ReasoningParser
from penstock.router.tools import formats as tool_formats
from penstock.router.tools import pythonic, qwen3_coder
from penstock.router.tools.parser import ToolParser

_Parser = TypeVar("_Parser", ToolParser, ReasoningParser)


@dataclass(frozen=True)
class Parsers:
    """What this router reads answers with. `tool` is set only where the model may choose tools itself."""

    tool: type[ToolParser] | None = None
    reasoning: type[ReasoningParser] | None = None

    @classmethod
    def load(cls, config: RouterConfig) -> Parsers:
        """The parsers that the options name.

        Raises:
            ConfigError: an unknown name, a plugin that cannot be loaded, or one option without another.
        """
        plugins = {"--tool-parser-plugin": config.tool_parser_plugin}
        tool = _named(_tool_parsers, "--tool-call-parser", config.tool_call_parser, plugins)
        plugins = {"--reasoning-parser-plugin": config.reasoning_parser_plugin}
        reasoning = _named(_reasoning_parsers, "--reasoning-parser", config.reasoning_parser, plugins)
        return cls(tool if config.enable_auto_tool_choice else None, reasoning)


def marker_ids(tokenizer: Tokenizer, parsers: Iterable[type[ToolParser] | type[ReasoningParser]]) -> frozenset[int]:
    """The special tokens that these parsers have to see."""
    ids = (tokenizer.token_id(marker) for parser in parsers for marker in parser.markers)
    return tokenizer.special_ids.intersection(i for i in ids if i is not None)


def _named(
    kind: Callable[[ModuleType], list[type[_Parser]]], flag: str, name: str, plugins: dict[str, str]
) -> type[_Parser] | None:
    modules = [tool_formats, qwen3_coder, pythonic, reasoning_formats]
    modules += [_module(path, plugin_flag) for plugin_flag, path in plugins.items() if path]
    known = {known: parser for module in modules for parser in kind(module) for known in parser.names}
    if not name:
        return None
    if name not in known:
        raise ConfigError(f"{flag}: {name!r} is not known; there are {', '.join(sorted(known))}")
    return known[name]


def _tool_parsers(module: ModuleType) -> list[type[ToolParser]]:
    return [value for value in _classes(module) if issubclass(value, ToolParser)]


def _reasoning_parsers(module: ModuleType) -> list[type[ReasoningParser]]:
    return [value for value in _classes(module) if issubclass(value, ReasoningParser)]


def _classes(module: ModuleType) -> list[type]:
    """The classes of a module that have names to be asked for by; those that it only imports do not count."""
    own = [value for value in vars(module).values() if isinstance(value, type) and value.__module__ == module.__name__]
    return [value for value in own if hasattr(value, "names") and not inspect.isabstract(value)]


def _module(path: str, flag: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"penstock_plugin_{Path(path).stem}", path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"{flag}: {path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever the file does
        raise ConfigError(f"{flag}: {path} cannot be loaded: {type(error).__name__}: {error}") from error
    return module
