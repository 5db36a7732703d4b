"""Dataclasses from YAML and `--set key=value`, strictly: keys and types are checked, values are not."""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import re
import types
import typing
from pathlib import Path
from typing import Any

import yaml

from autoprune.models.errors import InputError

MLFLOW_KEYS = "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"  # of the environment


class _Loader(yaml.SafeLoader):
    """Takes 2:4 for a text. YAML 1.1 takes it for a number to the base 60."""

    yaml_implicit_resolvers = {
        first: [("tag:yaml.org,2002:str", re.compile(r"\d+:\d+$")), *found] if first.isdigit() else found
        for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


def plain(value: Any) -> Any:
    """What `dataclasses.asdict` gives, with lists for tuples: what YAML and JSON can hold."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, (tuple, list)) else value


def setting(key: str, text: str) -> str:
    """`key=text` for `--set`, where it is read as YAML: in quotes if it would be a number, a date or two things."""
    try:
        same = yaml.load(text, _Loader) == text
    except yaml.YAMLError:
        same = False
    return f"{key}={text if same else json.dumps(text, ensure_ascii=False)}"


def read_config(cls: type, path: Path, overrides: typing.Sequence[str] = ()) -> Any:
    """A dataclass from a YAML file, with `key.subkey=value` overrides.

    Raises InputError, one line, for anything that cannot be read.
    """
    return build(cls, read_mapping(cls, path, overrides))


# Keys that only the configuration of this command has.
OWN_KEYS = {
    "search": ("target", "generator", "evaluators", "search", "budgets"),
    "compare": ("models", "methods", "sparsities"),
}


def read_mapping(cls: type, path: Path, overrides: typing.Sequence[str] = ()) -> dict:
    """What `build` makes the dataclass of. Raises InputError, one line, for what is no mapping, and for a file that is
    for another command."""
    try:
        data = yaml.load(path.read_text(), _Loader) or {}
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read configuration {path}: {getattr(error, 'strerror', 'it is not text')}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}" if mark else ""
        raise InputError(f"{path}{where} is not YAML: {getattr(error, 'problem', error)}") from None
    if not isinstance(data, dict):
        names = [key.name for key in dataclasses.fields(cls)]
        raise InputError(f"{path} holds {type(data).__name__}: expected keys such as {', '.join(names)}")
    fields = {key.name for key in dataclasses.fields(cls)}
    ours = {key for keys in OWN_KEYS.values() for key in keys if key in fields}
    for command, keys in OWN_KEYS.items():
        theirs = [key for key in keys if key in data and key not in fields]
        if theirs and not ours & set(data):
            raise InputError(f"{path} is a configuration of `autoprune {command}`: it has {theirs[0]}")
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or not key:
            raise InputError(f"--set {override}: expected key=value, such as --set target.sparsity=0.5")
        try:
            _set(data, key.split("."), yaml.load(value, _Loader))
        except yaml.YAMLError:
            raise InputError(f"--set {override}: {value!r} is not a YAML value; check brackets and quotes") from None
    return data


def _set(data: dict, keys: list[str], value: Any) -> None:
    for key in keys[:-1]:
        data = data.setdefault(key, {})
        if not isinstance(data, dict):
            raise InputError(f"--set {'.'.join(keys)}: {key} has no keys below it")
    data[keys[-1]] = value


def build(cls: type, data: Any, where: str = "") -> Any:
    """A dataclass from a mapping; unknown keys and wrong types are refused with the key's whole path."""
    if not isinstance(data, dict):
        raise InputError(f"{where.rstrip('.') or 'configuration'} is {data!r}: expected keys and values")
    hints = typing.get_type_hints(cls)
    for key in data:
        if key not in hints:
            near = difflib.get_close_matches(str(key), hints, n=1)
            advice = f"did you mean {where}{near[0]}?" if near else f"expected one of {', '.join(hints)}"
            raise InputError(f"unknown configuration key {where}{key}: {advice}")
    return cls(**{key: _convert(hints[key], value, f"{where}{key}") for key, value in data.items()})


def _convert(hint: Any, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return build(hint, value, where + ".")
    origin = typing.get_origin(hint)
    if value is None:
        raise InputError(f"{where} is empty: expected a value")
    if origin is types.UnionType:  # of a text and a number
        hint = str if isinstance(value, str) else float
    if origin is tuple:
        if not isinstance(value, list):
            raise InputError(f"{where} is {value!r}: expected a list")
        return tuple(_convert(typing.get_args(hint)[0], item, where) for item in value)
    if origin is dict:
        if not isinstance(value, dict):
            raise InputError(f"{where} is {value!r}: expected keys and values")
        inner = typing.get_args(hint)[1]
        return {
            str(key): item if inner is Any else _convert(inner, item, f"{where}.{key}") for key, item in value.items()
        }
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        names = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}
        raise InputError(f"{where} is {value!r}: expected {names[hint]}")
    if hint is float and not math.isfinite(value):
        raise InputError(f"{where} is {value}: expected a number that is finite")
    return value


def check_name(name: str) -> None:
    """InputError for a name of a run that cannot be that of a folder."""
    if not name or "/" in name or name.startswith("."):
        raise InputError(f"name is {name!r}: expected a folder name without slashes")


def one_of(key: str, value: str, choices: typing.Sequence[str]) -> None:
    """InputError for a value that is none of these, with the nearest of them."""
    if value not in choices:
        near = difflib.get_close_matches(value, choices, n=1)
        raise InputError(f"{key} is {value!r}: expected {' or '.join(choices)}" + (f"; {near[0]}?" if near else ""))


def check_address(key: str, address: str, variables: str) -> None:
    """InputError for one that holds a password. variables: of the environment, where it belongs."""
    user = address.partition("://")[2].rpartition("@")[0]
    if ":" in user and not re.fullmatch(r"[\w.-]+:\d+/[^:]*", user):  # that is a port, and a path that has an @
        raise InputError(
            f"{key} holds a password, which would stand in the run's folder and in MLflow: leave it out, and set "
            f"{variables} instead"
        )
