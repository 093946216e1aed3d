"""One typed configuration from a YAML recipe and the command line.

A configuration is a dataclass of dataclasses, each beside the code that it configures. A field's docstring is
its help text; ``__post_init__`` refuses bad values with a ``ValueError`` that begins with the field's name.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import re
import sys
import typing
from argparse import RawDescriptionHelpFormatter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import yaml
from jsonargparse import (
    ActionConfigFile,
    ArgumentError,
    ArgumentParser,
    DefaultHelpFormatter,
    Namespace,
    set_parsing_settings,
)

from common.errors import ConfigError
from common.recipes import given, read_recipe, recipes_of

set_parsing_settings(docstring_parse_attribute_docstrings=True)

T = TypeVar("T")


class _Help(DefaultHelpFormatter, RawDescriptionHelpFormatter):
    """Types and defaults behind each option, and the script's own words with their line breaks."""


class Commands(argparse.ArgumentParser):
    """A script's command line without a configuration, such as `COMMAND SRC OUT`; a mistake is one line."""

    def error(self, message: str) -> NoReturn:
        """Raise :class:`ConfigError`."""
        raise ConfigError(f"{message} (see {self.prog} --help)")


@dataclass
class Positional:
    """A positional argument of a script, beside its configuration."""

    name: str
    help: str
    many: bool = False


def parse(
    cls: type[T],
    argv: Sequence[str] | None = None,
    *,
    default_recipe: Path | None = None,
    positional: Positional | None = None,
    description: str | None = None,
) -> tuple[T, Any]:
    """Build ``cls`` from its defaults, then the recipes (``--config``), then dotted overrides.

    Args:
        cls: the dataclass to build.
        argv: the command line; ``sys.argv[1:]`` by default.
        default_recipe: used when no ``--config`` is given. Naming another model on the command line
            then drops the recipe's ``model.args``, which belong to the recipe's own model.
        positional: one positional argument to accept.

    Returns:
        The configuration and the positional argument's value (None without one).

    Raises:
        ConfigError: one line that names the key, the value, and what would be right.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    first = f"{positional.name.upper()}{'...' if positional.many else ''} " if positional else ""
    usage = f"%(prog)s {first}[--config RECIPE.yaml] [--KEY VALUE ...]"
    parser = ArgumentParser(
        exit_on_error=False,
        allow_abbrev=False,
        usage=usage,
        description=description or cls.__doc__,
        formatter_class=_Help,
    )
    parser.add_argument("--config", action=ActionConfigFile, help="YAML recipe; later options override it.")
    if positional:
        parser.add_argument(positional.name, nargs="+" if positional.many else None, help=positional.help)
    parser.add_class_arguments(cls, None)
    if default_recipe and not any(arg.split("=")[0] == "--config" for arg in argv):
        stale = ["--model.args={}"] if any(arg.split("=")[0] == "--model.name" for arg in argv) else []
        argv = [f"--config={default_recipe}", *stale, *argv]
    switches = {f"--{key}" for key, kind in _kinds(cls).items() if kind is bool}
    for i, word in enumerate(argv):  # a switch alone is on
        if word in switches and (i + 1 == len(argv) or argv[i + 1].startswith("--")):
            argv[i] = f"{word}=true"
    recipes = {path: read_recipe(path, recipes_of(cls)) for path in given(argv, "--config")}
    try:
        namespace = parser.parse_args(argv)
        return build(cls, namespace.as_dict()), getattr(namespace, positional.name) if positional else None
    except ConfigError as error:
        raise ConfigError(_located(str(error), argv, recipes)) from None
    except (ArgumentError, TypeError) as error:
        raise ConfigError(_located(_explain(str(error), cls, positional), argv, recipes)) from None


def build(cls: type[T], values: dict[str, Any], prefix: str = "") -> T:
    """Build the dataclass ``cls`` (and those inside it) from nested dictionaries."""
    hints = typing.get_type_hints(cls)
    arguments = {}
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        if field.name in values:
            value, kind = values[field.name], hints[field.name]
            nested = dataclasses.is_dataclass(kind) and not isinstance(value, typing.cast(type, kind))
            if nested and not isinstance(value, (dict, Namespace)):
                some = f"{prefix}{field.name}.{dataclasses.fields(kind)[0].name}"
                raise ConfigError(
                    f"{prefix}{field.name}: {value!r} is not valid; expected settings, such as {some}"
                )
            arguments[field.name] = build(kind, dict(value), f"{prefix}{field.name}.") if nested else value
    try:
        return cls(**arguments)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"{prefix}{error}") from None


def to_dict(config: Any) -> dict[str, Any]:
    """The configuration as plain nested dictionaries, fit for YAML and JSON."""
    return yaml.safe_load(yaml.safe_dump(_plain(dataclasses.asdict(config)), sort_keys=False))


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """``{"optim": {"lr": 1}}`` → ``{"optim.lr": 1}``."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def nearest(name: str, valid: Sequence[str]) -> str:
    """Words that point from a wrong name to the closest valid one."""
    close = difflib.get_close_matches(name, valid, n=1, cutoff=0.5)
    if close:
        return f"did you mean {close[0]!r}?"
    return f"expected one of {', '.join(valid[:20])}{', …' if len(valid) > 20 else ''}"


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


def _kinds(cls: Any, prefix: str = "") -> dict[str, Any]:
    """All dotted keys and their types."""
    kinds: dict[str, Any] = {}
    for name, kind in typing.get_type_hints(cls).items():
        nested = dataclasses.is_dataclass(kind)
        kinds |= _kinds(kind, f"{prefix}{name}.") if nested else {f"{prefix}{name}": kind}
    return kinds


def _located(problem: str, argv: Sequence[str], recipes: dict[str, dict[str, Any]]) -> str:
    """``problem`` behind the name of the recipe that has its key, unless the command line has it."""
    found = re.match(r"[\w.]+", problem)
    if found is None or any(re.match(rf"--{re.escape(found[0])}\b", word) for word in argv):
        return problem
    for path, settings in reversed(recipes.items()):
        if any(f"{key}.".startswith(f"{found[0]}.") for key in flatten(settings)):
            return f"{path}: {problem}"
    return problem


def _nearest_key(key: str, keys: Sequence[str]) -> str:
    """:func:`nearest` of the settings, where the last part of ``key`` counts more than what it is of."""
    same = [repr(valid) for valid in keys if valid.split(".")[-1] == key.split(".")[-1].replace("-", "_")]
    return f"did you mean {' or '.join(same[:3])}?" if same else nearest(key, keys)


def _explain(message: str, cls: type, positional: Positional | None) -> str:
    """The parser's message as one line with the key, the value and the nearest valid one."""
    message = " ".join(message.split())
    keys = list(_kinds(cls))
    if positional and message.startswith("the following arguments are required:"):
        return f"no {positional.name}: expected {positional.help[0].lower()}{positional.help[1:]}"
    if found := re.match(r"unrecognized arguments: (.+)", message):
        words = found[1].split()
        unknown = next((word for word in words if word.startswith("-")), None)
        if unknown is None:
            return f"unexpected argument {words[0]!r}; options begin with --"
        key = unknown.lstrip("-").split("=")[0]
        return f"{key}: unknown key; {_nearest_key(key, keys)}"
    if found := re.search(r"Group '([\w.]+)' does not accept option '([\w.]+)'", message):
        key = f"{found[1]}.{found[2]}"
        return f"{key}: unknown key; {_nearest_key(key, keys)}"
    if found := re.search(r"Option '([\w.]+)' is not accepted", message):
        return f"{found[1]}: unknown key; {_nearest_key(found[1], keys)}"
    if found := re.match(r'Parser key "([\w.]+)": (.*)', message):
        return f"{found[1]}: {_expected(found[2])}"
    return message


def _expected(problem: str) -> str:
    if choice := re.search(r"typing\.Literal\[(.+?)\]\. Got value: (.*)", problem):
        valid = [word.strip(" '\"") for word in choice[1].split(",")]
        hint = nearest(choice[2], valid)
        more = f"; {hint}" if hint.startswith("did you mean") else ""
        return f"{choice[2]!r} is not valid; expected one of {', '.join(valid)}{more}"
    if kind := re.search(r"Expected an? (?:<class '([\w.]+)'>|(.+?))\. Got value: (.*)", problem):
        return f"{kind[3]!r} is not valid; expected {kind[1] or kind[2]}"
    if union := re.search(r"Subtypes: \[(.+?)\] Errors.*Given value: (.*)", problem):
        kinds = re.sub(r"<class '([\w.]+)'>", r"\1", union[1]).replace("NoneType", "null")
        return f"{union[2]!r} is not valid; expected one of {kinds}"
    return problem
