"""Reads a configuration file into a dict: JSON, YAML, or JSON on standard input (how the launcher tells its children).

YAML is imported only when a YAML file is read. Values are checked by config_loader.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from penstock.common.errors import ConfigError


def read_config_file(path: str) -> dict[str, Any]:
    """The mapping in a .json, .yaml or .yml file; `-` reads JSON from standard input.

    Raises:
        ConfigError: no such file, another suffix, not parsable, or not a mapping with text keys.
    """
    try:
        if path == "-":
            text = sys.stdin.read() if sys.stdin is not None else ""  # closed: `<&-`
        else:
            text = Path(path).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:  # ValueError: no UTF-8, or a path that cannot be
        raise ConfigError(f"cannot read the configuration file {path}: {error}") from None
    suffix = ".json" if path == "-" else Path(path).suffix.lower()
    if suffix == ".json":
        try:
            content = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{path} is not valid JSON: {error}") from None
    elif suffix in (".yaml", ".yml"):
        content = _parse_yaml(path, text)
    else:
        raise ConfigError(f"{path}: a configuration file ends in .yaml, .yml or .json")
    if content is None:
        return {}
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise ConfigError(f"{path} must hold options as `name: value`")
    return content


def _parse_yaml(path: str, text: str) -> Any:
    try:
        import yaml
    except ImportError:
        raise ConfigError(f"{path}: reading YAML needs the PyYAML package; install it or use a .json file") from None
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    except (ValueError, LookupError, TypeError, AttributeError) as error:  # what looks like a date, say, and is none
        raise ConfigError(f"{path} is not valid YAML: a value is not what it looks like: {error}") from None
