"""Options of the commands that ask a running server or read files: file < environment < command line.

As config_loader.py does it for processes, over argparse: `--config FILE` holds options by their names, and
PENSTOCK_CLIENT_URL stands for --url in all of these commands. Both become arguments before the given ones, so that they
are checked alike.
"""

from __future__ import annotations

import json
import math
import re
import shlex
from argparse import Action, ArgumentParser, ArgumentTypeError, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn, TypeVar
from urllib.parse import urlsplit

from penstock.common.bounds import LARGEST_INT, out_of_bounds
from penstock.common.config_file import read_config_file
from penstock.common.config_loader import CLIENT_ENV_PREFIX, nearest
from penstock.common.errors import ConfigError

Number = TypeVar("Number", int, float)

KEY_VARIABLES = ("OPENAI_API_KEY", "PENSTOCK_API_KEY", "VLLM_API_KEY")  # the first that is set


class ClientParser(ArgumentParser):
    """A parser whose mistakes are ConfigErrors and whose options can also stand in a file and in the environment."""

    def __init__(self, prog: str, description: str) -> None:
        super().__init__(
            prog=prog, description=description, allow_abbrev=False, formatter_class=RawDescriptionHelpFormatter
        )
        self.add_argument("--config", metavar="FILE", help="YAML or JSON file with any of these options")

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see {self.prog} --help")

    def parse(self, arguments: Sequence[str], environ: Mapping[str, str]) -> Namespace:
        """The options. Underscores in a flag's name are as good as dashes.

        Raises:
            ConfigError: unknown, wrong or missing; the message names it, and the nearest that is known.
        """
        given = [re.sub(r"^--[^=]+", lambda match: match[0].replace("_", "-"), argument) for argument in arguments]
        before = self._from_file(given) + self._from_environment(environ)
        options, unknown = self.parse_known_args([*before, *given])
        if unknown:
            name = unknown[0].partition("=")[0]
            if not name.startswith("-"):
                raise ConfigError(f"unexpected argument {name!r}; see {self.prog} --help")
            raise ConfigError(f"unknown option {name}{nearest(name, self._flags())}")
        return options

    def _from_file(self, given: Sequence[str]) -> list[str]:
        only_file = ArgumentParser(add_help=False, allow_abbrev=False)
        only_file.add_argument("--config")
        path = only_file.parse_known_args(given)[0].config
        if not path:
            return []
        flags = self._flags()
        arguments: list[str] = []
        for key, value in read_config_file(path).items():
            flag = "--" + key.replace("_", "-")
            if flag not in flags or flag == "--config":
                raise ConfigError(f"{path}: unknown option {key}{nearest(flag, flags)}")
            try:
                arguments += _as_arguments(flags[flag], flag, value)
            except ValueError as error:
                raise ConfigError(f"{path}: {key}: {error}") from None
        return arguments

    def _from_environment(self, environ: Mapping[str, str]) -> list[str]:
        arguments: list[str] = []
        for flag, action in self._flags().items():
            name = CLIENT_ENV_PREFIX + flag[2:].upper().replace("-", "_")
            if flag.startswith("--") and environ.get(name):
                try:
                    arguments += _as_arguments(action, flag, environ[name])
                except ValueError as error:
                    raise ConfigError(f"{name}: {error}") from None
        return arguments

    def _flags(self) -> dict[str, Action]:
        return {flag: action for action in self._actions for flag in action.option_strings if flag != "--help"}


def api_key(environ: Mapping[str, str]) -> str:
    """The key for a server from the environment, "" if there is none."""
    return next((environ[name] for name in KEY_VARIABLES if environ.get(name)), "")


def whole(least: int = 0, most: int = LARGEST_INT) -> Callable[[str], int]:
    """The `type` of an argument that is a whole number within these bounds."""
    return lambda text: _within(int, text, least, most)


def number(least: float = 0.0, most: float = math.inf) -> Callable[[str], float]:
    """The `type` of an argument that is a number within these bounds, and never NaN."""
    return lambda text: _within(float, text, least, most)


def _within(kind: type[Number], text: str, least: Number, most: Number) -> Number:
    try:
        value = kind(text)
    except ValueError:
        raise ArgumentTypeError(f"invalid {kind.__name__} value: {text!r}") from None
    if wrong := out_of_bounds(value, least, most):
        raise ArgumentTypeError(wrong)
    return value


def server_url(text: str) -> str:
    """The `type` of an argument that is a server's address; without a slash at its end."""
    try:
        text.encode()
        parts = urlsplit(text)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is none, brackets that do not close, half a surrogate pair
        usable = False
    if not usable or re.search(r"[\s\x00-\x1f]", text):
        raise ArgumentTypeError(f"give http:// or https:// and a host, got {text!r}")
    return text.rstrip("/")


def readable(text: str) -> str:
    """The `type` of an argument that is sent as text: no bytes that are not UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ArgumentTypeError("is not UTF-8") from None
    return text


def _as_arguments(action: Action, flag: str, value: Any) -> list[str]:
    """What would have been written on the command line; raises ValueError."""
    if action.nargs == 0:
        switches = {
            "1": True,
            "true": True,
            "yes": True,
            "on": True,
            "0": False,
            "false": False,
            "no": False,
            "off": False,
        }
        switch = switches.get(str(value).lower())
        if switch is None:
            raise ValueError(f"expected true or false, got {value!r}")
        return [flag] if switch else []
    if action.nargs in ("+", "*"):
        parts = shlex.split(value) if isinstance(value, str) else value
        if not isinstance(parts, list):
            raise ValueError(f"expected a list, got {value!r}")
        return [flag, *map(str, parts)]
    if isinstance(value, list):
        return [f"{flag}={part}" for part in value]
    return [f"{flag}={json.dumps(value) if isinstance(value, dict) else value}"]
