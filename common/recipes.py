"""Recipes: YAML files of settings, read as plain data, and one line for what is wrong with one."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from common.errors import ConfigError


def given(argv: Sequence[str], option: str) -> list[str]:
    """What a command line gives for ``option``, such as ``--config``: first after ``=``, then as words of their own."""
    after = [value for word, value in pairwise(argv) if word == option]
    return [word.partition("=")[2] for word in argv if word.startswith(f"{option}=")] + after


def recipes_of(settings: type) -> Path:
    """The folder of the recipes for such settings."""
    return Path(inspect.getfile(settings)).parent / "recipes"


def read_recipe(path: str, folder: Path) -> dict[str, Any]:
    """The settings in the file ``path``.

    Args:
        path: of the recipe.
        folder: where recipes are, to find the one that was meant.

    Raises:
        ConfigError: it is not there, not YAML, or something else than settings.
    """
    if not Path(path).is_file():
        raise ConfigError(f"config: {path!r} is not an existing file; {_nearest_file(path, folder)}")
    try:
        content = yaml.safe_load(Path(path).read_text("utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"config: {path!r} is not a recipe in YAML: {_reason(error)}") from None
    except OSError as error:
        raise ConfigError(f"config: {path!r} cannot be read ({error.strerror})") from None
    if not isinstance(content, dict) or (content and all(value is None for value in content.values())):
        found = "nothing" if content is None else repr(content)[:60]
        raise ConfigError(
            f"config: {path!r}: expected settings, such as 'train: {{epochs: 3}}', found {found}"
        )
    return content


def _nearest_file(path: str, folder: Path) -> str:
    recipes = {file.stem: file for file in sorted(folder.glob("*.yaml"))}
    close = difflib.get_close_matches(Path(path).stem, recipes, n=1, cutoff=0.5)
    where = (recipes[close[0]] if close else folder).absolute()
    if where.is_relative_to(Path.cwd()):
        where = where.relative_to(Path.cwd())
    return f"did you mean {str(where)!r}?" if close else f"recipes are in {str(where)!r}"


def _reason(error: Exception) -> str:
    if not isinstance(error, yaml.MarkedYAMLError):
        return " ".join(str(error).split())
    parts = ((error.context, error.context_mark), (error.problem, error.problem_mark))
    return ", ".join(f"{what} (line {mark.line + 1})" if mark else str(what) for what, mark in parts if what)
