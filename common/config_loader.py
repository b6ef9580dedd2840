"""Fills a configuration dataclass: file < environment < command line. The dataclasses of config.py are the only list.

A field with help text is an option: `--field-name`, `PENSTOCK_FIELD_NAME`, and `field_name:` in a YAML or JSON file.
What no process of Penstock knows is an error that names the nearest thing known; what another process knows is passed
over, so that one file or environment can serve a whole fleet.
"""

from __future__ import annotations

import re
from argparse import SUPPRESS, ArgumentParser, BooleanOptionalAction
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import Field, dataclass, fields
from fractions import Fraction
from pathlib import Path
from typing import Any, NoReturn, TypeVar, get_type_hints
from urllib.parse import urlsplit, urlunsplit

from penstock.common.config import FleetConfig, ServeConfig
from penstock.common.config_file import read_config_file
from penstock.common.errors import ConfigError
from penstock.common.logs import SUPERVISED_ENV
from penstock.common.vllm_options import RENAMED, VALUES, foreign_flags, foreign_option

ENV_PREFIX = "PENSTOCK_"
CONFIG_ENV = "PENSTOCK_CONFIG"  # stands for --config
CLIENT_ENV_PREFIX = "PENSTOCK_CLIENT_"  # options of the commands that ask a server: penstock/client_options.py
VLLM_ENV = {"VLLM_API_KEY": "api_key", "VLLM_LOGGING_LEVEL": "log_level"}  # heard where ours do not say it
_COMPOSE_ENV = {  # of the files in compose/; who starts a fleet with them may ask it from the same shell
    ENV_PREFIX + name for name in ("LISTEN", "MODELS_DIR", "GRAFANA_LISTEN", "GRAFANA_PASSWORD", "PROMETHEUS_LISTEN")
}
_RESERVED_ENV = {CONFIG_ENV, SUPERVISED_ENV, *_COMPOSE_ENV}
# A Kubernetes Service called penstock (or penstock-router) puts these into every pod; they are not meant for us.
_KUBERNETES_ENV = re.compile(r"SERVICE_(HOST|PORT\w*)$|PORT_\d+_(TCP|UDP)\w*$")
_KUBERNETES_LINK = re.compile(r"(tcp|udp)://")

_BOOLEANS = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}
_EXPECTED = {
    "switch": "true or false",
    "integer": "a whole number",
    "number": "a number",
    "text": "text",
    "list": "a list of texts",
}
_POWERS = {"k": 1, "m": 2, "g": 3, "t": 4}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(?:([kKmMgGtT])|([kKMGT])(i?)B|B)?")

Config = TypeVar("Config", bound=FleetConfig)


@dataclass(frozen=True)
class Option:
    """One field of a configuration dataclass, seen as something people set."""

    name: str
    kind: str  # "text", "integer", "number", "switch" or "list"
    nullable: bool
    field: Field[Any]

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    def from_text(self, text: str) -> object:
        """The value written in a flag or environment variable; raises ConfigError when it is not one."""
        ours = VALUES.get((self.name, text.lower()), text)
        if ours is None:
            return self.field.default
        text = ours
        try:
            if self.kind == "switch":
                return _BOOLEANS[text.lower()]
            if self.kind == "integer":
                return parse_size(text) if self.field.metadata.get("human") else int(text)
            if self.kind == "number":
                return float(text)
        except (ValueError, KeyError):
            raise self._wrong(text) from None
        return self._parts(text.split(",")) if self.kind == "list" else text

    def from_value(self, value: object) -> object:
        """The value found in a file, whose types must be right; raises ConfigError."""
        if value is None and self.nullable:
            return None
        if self.kind == "switch" and isinstance(value, bool):
            return value
        if (self.name, str(value)) in VALUES:
            return self.from_text(str(value))
        if self.kind == "integer" and isinstance(value, int) and not isinstance(value, bool):
            return value
        if self.kind == "number" and isinstance(value, (int, float)) and not isinstance(value, bool):
            try:
                return float(value)
            except OverflowError:
                raise ConfigError("expected a number, got one beyond all bounds") from None
        if isinstance(value, str) and (self.kind in ("text", "list") or self.field.metadata.get("human")):
            return self.from_text(value)
        if self.kind == "list" and isinstance(value, list) and all(type(part) in (str, int) for part in value):
            return self._parts(map(str, value)) if value else ()
        if self.kind == "list" and type(value) is int:
            return (str(value),)
        raise self._wrong(value)

    def _parts(self, texts: Iterable[str]) -> tuple[str, ...]:
        """Those that are not empty. There must be one: --api-key "$KEY" without a KEY would open a server to all."""
        parts = tuple(part for text in texts if (part := text.strip()))
        if not parts:
            raise ConfigError("it is empty: leave it out if there is none")
        return parts

    def check_choice(self, value: object) -> None:
        """Raise ConfigError unless the option takes `value`."""
        choices = self.field.metadata.get("choices")
        if choices and value not in choices:
            raise ConfigError(f"must be one of {', '.join(choices)}, got {value!r}")

    def _wrong(self, value: object) -> ConfigError:
        expected = _EXPECTED[self.kind]
        if self.field.metadata.get("human"):
            expected += " or a size such as 4GiB, 512MB, 32K (1024s), 32k (1000s)"
        return ConfigError(f"expected {expected}" + ("" if self.field.metadata.get("secret") else f", got {value!r}"))


def parse_size(text: str) -> int:
    """A whole number from 25.6k (1000s), 32K (1024s), 512MB (1000s), 4GiB (1024s) or plain digits.

    Raises:
        ValueError: it is none of these, or not a whole number.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise ValueError(text)
    digits, letter, byte_letter, binary = match.groups()
    base: int = 1024 if binary or (letter and letter.isupper()) else 1000
    power: int = _POWERS.get((letter or byte_letter or "").lower(), 0)
    size = Fraction(digits) * Fraction(base) ** power
    if size.denominator != 1:
        raise ValueError(text)
    return int(size)


def options(config_class: type[FleetConfig]) -> dict[str, Option]:
    """The options of a configuration, by field name."""
    hints = get_type_hints(config_class)
    kinds: dict[object, str] = {str: "text", int: "integer", int | None: "integer", float: "number", bool: "switch"}
    kinds[tuple[str, ...]] = "list"
    return {
        field.name: Option(field.name, kinds[hints[field.name]], hints[field.name] == int | None, field)
        for field in fields(config_class)
        if "help" in field.metadata
    }


def load_config(
    config_class: type[Config],
    argv: Sequence[str],
    environ: Mapping[str, str],
    *,
    prog: str,
    description: str = "",
    hidden: Iterable[str] = (),
    fixed: Mapping[str, object] | None = None,
) -> Config:
    """The configuration of one process. `--help` in `argv` prints the options and raises SystemExit(0).

    Args:
        argv: arguments after the command's name. `--config FILE` reads a file; `-` is JSON on standard input.
        hidden: options that this command does not offer as flags.
        fixed: fields that the command decides.

    Raises:
        ConfigError: anything unknown, of the wrong type or out of range; the message says where it was set.
    """
    known = options(config_class)
    given = _given_flags(_parser(known.values(), prog, description, frozenset(hidden)), argv)
    values: dict[str, Any] = {}
    source = given.pop("config", None) or environ.get(CONFIG_ENV, "")
    if source:
        values |= _from_file(source, known)
    values |= _from_environment(environ, known)
    for name, text in given.items():
        with_commas = ",".join(text) if isinstance(text, list) else text
        values[name] = text if isinstance(text, bool) else _convert(known[name], with_commas, known[name].flag)
    for name, option in known.items():
        excluded = option.field.metadata.get("excludes")
        if excluded and name in values and values.get(excluded) is not None:
            raise ConfigError(f"{option.flag} and {known[excluded].flag} exclude each other: give one of them")
    return config_class(**values | dict(fixed or {}))


def explicit_values(config: FleetConfig) -> dict[str, object]:
    """The fields that differ from their defaults, as JSON for `--config -` of a child process. Holds secrets."""
    return {f.name: value for f in fields(config) if (value := getattr(config, f.name)) != f.default}


def redacted(config: FleetConfig) -> dict[str, object]:
    """Every field, fit for a log: secrets are starred, and so is the password within a URL."""
    shown: dict[str, object] = {}
    for f in fields(config):
        value = getattr(config, f.name)
        shown[f.name] = _star(value) if f.metadata.get("secret") and value else value
    return shown


def redact_url(url: str) -> str:
    """`url` without its password."""
    parts = urlsplit(url)
    if parts.password is None:
        return url
    host = parts.netloc.rpartition("@")[2]
    return urlunsplit(parts._replace(netloc=f"{parts.username or ''}:***@{host}"))


def _star(secret: object) -> object:
    if isinstance(secret, tuple):
        return ("***",) * len(secret)
    return redact_url(secret) if isinstance(secret, str) and "://" in secret else "***"


class _Parser(ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see {self.prog} --help")


def _parser(known: Iterable[Option], prog: str, description: str, hidden: frozenset[str]) -> _Parser:
    parser = _Parser(prog=prog, description=description, allow_abbrev=False, argument_default=SUPPRESS)
    parser.add_argument(
        "--config", metavar="FILE", help="YAML or JSON file with any of these options; -: JSON on stdin"
    )
    for option in known:
        if option.name in hidden:
            continue
        help_text = _help(option).replace("%", "%%")
        metavar = "{" + ",".join(option.field.metadata["choices"]) + "}" if "choices" in option.field.metadata else None
        if option.kind == "switch":
            parser.add_argument(option.flag, action=BooleanOptionalAction, default=SUPPRESS, help=help_text)
        elif option.kind == "list":
            several = "+" if option.field.metadata.get("several") else None
            parser.add_argument(
                option.flag, action="extend" if several else "append", nargs=several, metavar="A,B", help=help_text
            )
        else:
            if option.field.metadata.get("positional"):
                parser.add_argument(option.name, nargs="?", metavar=option.name.upper(), help=help_text)
                help_text = SUPPRESS
            metavar = metavar or {"integer": "N", "number": "X"}.get(option.kind, "TEXT")
            parser.add_argument(option.flag, metavar=metavar, help=help_text)
    return parser


def _help(option: Option) -> str:
    default = option.field.default
    shown = "" if default in (None, "", ()) else str(default).lower() if default in (True, False) else str(default)
    return f"{option.field.metadata['help']} (default: {shown})" if shown else str(option.field.metadata["help"])


def _given_flags(parser: _Parser, argv: Sequence[str]) -> dict[str, Any]:
    """The flags in `argv`, unconverted. Underscores in a flag's name are as good as dashes."""
    dashed = [re.sub(r"^--[^=]+", lambda match: match[0].replace("_", "-"), argument) for argument in argv]
    flags = [flag for action in parser._actions for flag in action.option_strings]
    kept, refusal = foreign_flags(dashed, flags)
    if refusal:
        raise ConfigError(refusal)
    namespace, unknown = parser.parse_known_args(kept)
    if unknown:
        name = unknown[0].partition("=")[0]
        if not name.startswith("-"):
            raise ConfigError(f"unexpected argument {name!r}; see {parser.prog} --help")
        raise ConfigError(f"unknown option {name}{nearest(name, flags)}")
    return vars(namespace)


def _from_environment(environ: Mapping[str, str], known: Mapping[str, Option]) -> dict[str, object]:
    values: dict[str, object] = {
        name: _convert(known[name], environ[variable].lower() if name == "log_level" else environ[variable], variable)
        for variable, name in VLLM_ENV.items()
        if name in known and environ.get(variable)
    }
    every_name = options(ServeConfig).keys()
    for variable, text in sorted(environ.items()):
        dashed = variable.removeprefix(ENV_PREFIX).lower().replace("_", "-")
        name = RENAMED.get(dashed, dashed).replace("-", "_")
        if not variable.startswith(ENV_PREFIX) or not text:
            continue  # an empty variable is an unset one: compose files write VAR=${VAR:-}
        if variable in _RESERVED_ENV or variable.startswith(CLIENT_ENV_PREFIX):
            continue
        if _KUBERNETES_ENV.search(variable) or (variable.endswith("_PORT") and _KUBERNETES_LINK.match(text)):
            continue
        if name in known:
            values[name] = _convert(known[name], text, variable)
        elif name not in every_name:
            if foreign := foreign_option(name.replace("_", "-")):
                if refusal := foreign.refusal(text):
                    raise ConfigError(f"{variable} is {refusal}")
                continue
            hint = nearest(variable, [ENV_PREFIX + other.upper() for other in every_name])
            raise ConfigError(f"unknown environment variable {variable}{hint}")
    return values


def _from_file(path: str, known: Mapping[str, Option]) -> dict[str, object]:
    """The options of this process in the file; what only other processes know is passed over."""
    every_name = {field.name for field in fields(ServeConfig)}
    values: dict[str, object] = {}
    for key, value in read_config_file(path).items():
        dashed = key.replace("_", "-")
        name = RENAMED.get(dashed, dashed).replace("-", "_")
        if name not in every_name:
            if foreign := foreign_option(name.replace("_", "-")):
                if refusal := foreign.refusal(str(value)):
                    raise ConfigError(f"{Path(path).name}: {key} is {refusal}")
                continue
            raise ConfigError(f"{Path(path).name}: unknown option {key}{nearest(name, every_name)}")
        if name in known:
            try:
                values[name] = known[name].from_value(value)
                known[name].check_choice(values[name])
            except ConfigError as error:
                raise ConfigError(f"{Path(path).name}: {key}: {error}") from None
    return values


def _convert(option: Option, text: str, source: str) -> object:
    try:
        value = option.from_text(text)
        option.check_choice(value)
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from None
    return value


def nearest(name: str, known: Iterable[str]) -> str:
    """ "; did you mean X?" where something known is near, else ""."""
    from difflib import get_close_matches

    bare = {_bare(other): other for other in known}
    close = get_close_matches(_bare(name), bare, n=1)
    return f"; did you mean {bare[close[0]]}?" if close else ""


def _bare(name: str) -> str:
    """Without what all names have in common, so that it makes none of them alike."""
    return name.lstrip("-").removeprefix(ENV_PREFIX)
