"""Reading a recipe: YAML, then `--set key=value`, then the checks."""

import json
from collections.abc import Callable
from typing import Any, TypeVar

import fsspec
import yaml

from ..pipeline.storage import storage_errors
from ..schemas.errors import RecipeError, StorageError
from ..schemas.recipe import Recipe, parse_recipe

Loaded = TypeVar("Loaded")


def load_recipe(path: str, overrides: list[str]) -> Recipe:
    """The checked recipe in the YAML file at `path` (any fsspec URL), with `a.b=value` overrides applied."""
    return load_as(parse_recipe, path, overrides)


def load_as(parse: Callable[[object], Loaded], path: str, overrides: list[str]) -> Loaded:
    """What `parse` makes of the YAML file at `path`, as `load_recipe`."""
    try:
        with storage_errors(path), fsspec.open(path, "rb") as stream:
            text = stream.read()  # pyright: ignore[reportAttributeAccessIssue]
    except (StorageError, ValueError, ImportError) as error:
        place = "" if isinstance(error, StorageError) else f"{path}: "
        raise RecipeError(f"recipe {place}{error}") from None
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"recipe {path}: not YAML: {' '.join(str(error).split())}") from None
    if data is None:
        raise RecipeError(f"recipe {path}: empty; see examples/ for one to begin with")
    for change in overrides:
        override(data, change)
    try:
        return parse(data)
    except RecipeError as error:
        raise RecipeError(f"recipe {path}: {error}") from None


def override(data: Any, change: str) -> None:
    """Set one dotted key in place (`a.b=value`); list items go by number (`sources.0.path`)."""
    key, equals, text = change.partition("=")
    if not equals or not key:
        raise RecipeError(f"--set {change!r}: accepted is key=value with a dotted key, for instance clips.fps=8")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        value = text
    *parents, last = key.split(".")
    place = data
    for part in parents:
        place = _step(place, part, key)
    if isinstance(place, list):
        place[_number(place, last, key)] = value
    elif isinstance(place, dict):
        place[last] = value
    else:
        raise RecipeError(f"--set {key}: {'.'.join(parents)} is {place!r}, not a section of the recipe")


def _step(place: Any, part: str, key: str) -> Any:
    if isinstance(place, list):
        return place[_number(place, part, key)]
    if isinstance(place, dict):
        if place.get(part) is None:
            place[part] = {}
        return place[part]
    raise RecipeError(f"--set {key}: there is no section at {part!r}, found {place!r}")


def _number(place: list, part: str, key: str) -> int:
    if part.isdecimal() and int(part) < len(place):
        return int(part)
    raise RecipeError(f"--set {key}: accepted is a number from 0 to {len(place) - 1}, found {part!r}")


def print_schema() -> None:
    """Print the JSON Schema of the recipe, for editors and checkers."""
    print(json.dumps(Recipe.model_json_schema(), indent=1))
