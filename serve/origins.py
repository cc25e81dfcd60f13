"""Where settings come from: default, YAML file, environment, command line; later ones win. On a cluster: default,
environment, the `args` of the Serve configuration.

The environment spells a field as TANDEM_ROOM__FIELD; all others use the same names. An unknown name is refused wherever
it comes from.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, get_args

import yaml
from pydantic import BaseModel, SecretStr, ValidationError
from pydantic_core import ErrorDetails
from pydantic_settings import EnvSettingsSource, SettingsError

from serve.errors import OperatorError
from serve.settings.tree import ENV_DELIMITER, ENV_PREFIX, Settings
from serve.urls import shown_url, without_user

TABLES = ("encoders", "text_models", "models", "gpu_classes", "placements", "prompts.templates")
"""Fields of the tree that hold a table or a list, by their dotted names."""
NO_SETTINGS = (f"{ENV_PREFIX}CONFIG", f"{ENV_PREFIX}KEY")
"""The settings file, and a client's API key (serve/cli/client.py)."""

Name = tuple[str, ...]
"""The way to a field through the tree, written with dots. A name in a table may itself have a dot."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """Settings, and for every dotted field name the origin of its value."""

    settings: Settings
    origins: Mapping[str, str]


class EnvironmentSecret(SecretStr):
    """A secret out of the environment. It is pickled as the name of its variable: no copy of the settings that is sent
    to other processes, and kept by Ray, holds it. Who opens the copy has it from an environment of their own, where it
    may be another: what must hold of it is looked at there again."""

    def __init__(self, value: str, variable: str) -> None:
        super().__init__(value)
        self._variable = variable

    @property
    def variable(self) -> str:
        """Its name."""
        return self._variable

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return _from_here, (self._variable,)


def _from_here(variable: str) -> EnvironmentSecret:
    if variable not in os.environ:
        raise OperatorError(
            f"environment {variable}: it is set where the server was deployed, and missing in this process", variable
        )
    return EnvironmentSecret(os.environ[variable], variable)


def load(
    file: Path | None = None, environ: Mapping[str, str] | None = None, overrides: Mapping[str, Any] | None = None
) -> Loaded:
    """Read the tree from all origins. `overrides` maps dotted names to values (the command line).

    Raises OperatorError, one line that names the setting and its origin.
    """
    environ = os.environ if environ is None else environ
    values: dict[Name, tuple[Any, str]] = {}
    file = file or (Path(environ[f"{ENV_PREFIX}CONFIG"]) if f"{ENV_PREFIX}CONFIG" in environ else None)
    if file is not None:
        values |= {name: (value, f"file {file}") for name, value in _flatten(_read_yaml(file))}
    values |= _from_environ(environ)
    values |= {
        tuple(name.split(".")): (_spelled(name, value), "command line")
        for name, value in (overrides or {}).items()
        if value is not None
    }
    return _merged(values)


def load_args(args: Mapping[str, Any], environ: Mapping[str, str] | None = None) -> Loaded:
    """Read the tree from the `args` of a Serve configuration, and from the environment what they leave open. A settings
    file that the environment names is for the operator's commands, and is not read.

    Raises OperatorError, one line that names the setting and its origin.
    """
    values = _from_environ(os.environ if environ is None else environ)
    told = {name: (value, "args of the Serve application") for name, value in _flatten(args)}
    # What says nothing (`redis_url: null`, a group without entries) leaves open what the environment has.
    empty = [name for name, (value, _) in told.items() if value is None and any(_below(each, name) for each in values)]
    return _merged(values | {name: value for name, value in told.items() if name not in empty})


def _below(name: Name, other: Name) -> bool:
    """Also where both are the same."""
    return name[: len(other)] == other


def _merged(values: Mapping[Name, tuple[Any, str]]) -> Loaded:
    tree: dict[str, Any] = {}
    for (*rooms, leaf), (value, _) in values.items():
        node = tree
        for room in rooms:
            node = node.setdefault(room, {})
            if not isinstance(node, dict):
                raise OperatorError(f"{room} must be a group of settings, not a value", room)
        node[leaf] = {**_mapping(node.get(leaf)), **value} if isinstance(value, dict) else value
    origins = {".".join(name): origin for name, (_, origin) in values.items()}
    try:
        settings = Settings(**tree)
    except ValidationError as error:
        raise _operator_error(error, origins) from None
    return Loaded(settings, {name: _origin(name, origins) for name, _ in flatten(settings)})


def flatten(settings: BaseModel, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every leaf of the tree as (dotted name, value), in the order of the source."""
    for name in type(settings).model_fields:
        value = getattr(settings, name)
        if isinstance(value, BaseModel):
            yield from flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _origin(name: str, origins: Mapping[str, str]) -> str:
    """Where a field's value came from; a field that is a table may have entries from several places."""
    told = [origin for known, origin in origins.items() if known == name or known.startswith(f"{name}.")]
    return ", ".join(dict.fromkeys(told)) or "default"


def shown(value: Any) -> str:
    """A value fit for the terminal: secrets hidden, but the host of a secret URL kept; no URL names a user."""
    if isinstance(value, SecretStr):
        return shown_url(value.get_secret_value())
    return "" if value is None else without_user(str(value))


def _read_yaml(file: Path) -> dict[str, Any]:
    try:
        tree = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
    except OSError as error:
        raise OperatorError(f"settings file {file}: {error.strerror}", "config") from None
    except UnicodeDecodeError:
        raise OperatorError(f"settings file {file} is not text in UTF-8", "config") from None
    except yaml.YAMLError as error:
        raise OperatorError(f"settings file {file} is not YAML: {' '.join(str(error).split())}", "config") from None
    if not isinstance(tree, dict):
        raise OperatorError(f"settings file {file} must hold names and values", "config")
    return tree


def _from_environ(environ: Mapping[str, str]) -> dict[Name, tuple[Any, str]]:
    secrets = set(_secrets(Settings))
    values: dict[Name, tuple[Any, str]] = {}
    for name, value in _flatten(_read_environ(environ)):
        variable = variable_of(".".join(name))
        secret = name in secrets and environ.get(variable) == value
        values[name] = EnvironmentSecret(value, variable) if secret else value, f"environment {variable}"
    return values


def _read_environ(environ: Mapping[str, str]) -> dict[str, Any]:
    known = {variable_of(name) for name, _ in flatten(Settings())} | {*NO_SETTINGS, *_service_links(environ)}
    for name in sorted(environ):
        if name.startswith(ENV_PREFIX) and name not in known:
            raise OperatorError(f"environment {name}: no such setting", name)
    source = EnvSettingsSource(Settings, env_prefix=ENV_PREFIX, env_nested_delimiter=ENV_DELIMITER)
    # A name in small letters is none of ours, as everywhere else.
    source.env_vars = {name.lower(): value for name, value in environ.items() if name.startswith(ENV_PREFIX)}
    try:
        return source()
    except SettingsError as error:
        table = next((name for name in TABLES if f'"{name.split(".")[0]}"' in str(error)), "")
        raise OperatorError(f"environment {variable_of(table)}: its value is not JSON", table) from None


def _service_links(environ: Mapping[str, str]) -> Iterator[str]:
    """Kubernetes tells every pod of the services beside it, and one may be called `tandem-...`."""
    for host in environ:
        service = host.removesuffix("_SERVICE_HOST")
        if host.startswith(ENV_PREFIX) and service != host:
            told = re.compile(rf"{re.escape(service)}_(SERVICE_(HOST|PORT(_\w+)?)|PORT(_[0-9]+_[A-Z]+(_[A-Z]+)?)?)")
            yield from filter(told.fullmatch, environ)


def plain_secrets(settings: Settings) -> list[str]:
    """Dotted names of the secrets that travel with the settings: those that are not from the environment."""
    told = dict(flatten(settings))
    names = map(".".join, _secrets(Settings))
    return [name for name in names if told[name] is not None and not isinstance(told[name], EnvironmentSecret)]


def _secrets(model: type[BaseModel], prefix: Name = ()) -> Iterator[Name]:
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from _secrets(kind, (*prefix, name))
        elif kind is SecretStr or SecretStr in get_args(kind):
            yield (*prefix, name)


def _flatten(tree: Mapping[str, Any], prefix: Name = ()) -> Iterator[tuple[Name, Any]]:
    for name, value in tree.items():
        if isinstance(value, Mapping) and value:  # an empty one is a value: `placements: {small: {}}`
            yield from _flatten(value, (*prefix, str(name)))
        else:
            yield (*prefix, str(name)), value


def _spelled(name: str, value: Any) -> Any:
    """What a table or a list is on the command line: YAML, which JSON is a part of."""
    if _table_of(name) and isinstance(value, str):
        with contextlib.suppress(yaml.YAMLError):
            return yaml.safe_load(value)
    return value


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def variable_of(name: str) -> str:
    """By the dotted name. A table has one, whose value is JSON: not every name in it can be spelled as a variable."""
    return ENV_PREFIX + (_table_of(name) or name).replace(".", ENV_DELIMITER).upper()


def _table_of(name: str) -> str | None:
    """The table or list that a dotted name leads to or into."""
    return next((table for table in TABLES if f"{name}.".startswith(f"{table}.")), None)


def _operator_error(error: ValidationError, origins: Mapping[str, str]) -> OperatorError:
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    path = [str(part) for part in first["loc"]]
    name = ".".join(path)
    # What lies in a list has no origin of its own: the list has one.
    places = (".".join(path[:length]) for length in range(len(path), 0, -1))
    origin = next((f" (from {origins[place]})" for place in places if place in origins), "")
    return OperatorError(f"{name}: {reason_of(first)}{origin}", name)


def reason_of(fault: ErrorDetails) -> str:
    """What is wrong, without pydantic's own words around it."""
    return "no such setting" if fault["type"] == "extra_forbidden" else fault["msg"].removeprefix("Value error, ")
