"""Strict, frozen data: the base of recipes and manifests, and the one loader of YAML files.

An unknown key is an error that offers the nearest known one: a misspelt option must not cost a day of training.
"""

import difflib
import json
import reprlib
import types
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, FailFast, ValidationError

MOST_KEYS = 1 << 19
"""Keys of all objects of a JSON file together: a store of 20 passes with 5,000 weights each has fewer."""

T = TypeVar("T")
Many = Annotated[tuple[T, ...], FailFast()]
"""Items of a list that a store may make as long as it likes: the first wrong one is told, not a million of them."""

MEMBER = "<"
"""Tags of the members of a union begin with it: they tell which one was meant, and stay out of messages."""

_PROBLEMS = 20
"""As many are listed."""

_LONGEST = 120
"""Letters of a name in a message."""

_briefly = reprlib.Repr()
_briefly.maxlist = _briefly.maxtuple = _briefly.maxdict = 40
_briefly.maxstring = _briefly.maxlong = _briefly.maxother = 80


class Strict(BaseModel):
    """Immutable record; unknown keys are refused and field docstrings become the reference."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)


S = TypeVar("S", bound=Strict)


def load_yaml(model: type[S], path: Path, overrides: Sequence[str] = ()) -> S:
    """Read ``path`` as a ``model``, after setting each ``key.path=value`` override (value in YAML; list items by number).

    Raises:
        ValueError: the file is missing, is no YAML mapping, or does not fit the model.
    """
    return parse(model, read_yaml(path, overrides), str(path))


def read_yaml(path: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The plain data that ``load_yaml`` reads as a model."""
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"no such recipe: {path}") from None
    except IsADirectoryError:
        raise ValueError(f"expected a YAML file, found a folder: {path}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a YAML file: {error}") from None
    if not isinstance(tree, dict):
        raise ValueError(f"{path}: expected a mapping of options, found {type(tree).__name__}")
    for override in overrides:
        set_by_path(tree, override)
    return tree


def load_json(data: bytes) -> Any:  # noqa: ANN401
    """Plain data out of the bytes of a JSON text, which anyone may have written.

    Raises:
        ValueError: it is no UTF-8, no JSON, or JSON that readers understand differently (a key twice, NaN), nested deeper or
            with more keys than any store needs.
    """
    left = MOST_KEYS

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        nonlocal left
        left -= len(pairs)
        if left < 0:
            raise ValueError(f"more than {MOST_KEYS:,} keys")
        tree = dict(pairs)
        if len(tree) < len(pairs):
            twice, _ = Counter(key for key, _ in pairs).most_common(1)[0]
            raise ValueError(f"the key {brief(twice)} stands there twice")
        return tree

    def no_constant(name: str) -> None:
        raise ValueError(f"{name} is no JSON")

    try:
        return json.loads(data.decode("utf-8"), object_pairs_hook=unique, parse_constant=no_constant)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def parse(model: type[S], tree: object, where: str) -> S:
    """Validate plain data as a ``model``; a ``ValueError`` lists every problem by its dotted path in ``where``."""
    try:
        return model.model_validate(tree)
    except ValidationError as error:
        raise ValueError(explain(error, model, where)) from None


def explain(error: ValidationError, model: type[BaseModel], where: str) -> str:
    """One line for every problem of ``error``, with the nearest known key for each unknown one."""
    lines = []
    problems = error.errors(include_url=False)
    for problem in problems[:_PROBLEMS]:
        if problem["type"] == "too_short" and any(
            other["loc"][: len(problem["loc"])] == problem["loc"] != other["loc"] for other in problems
        ):
            continue  # its items are there, but wrong
        loc = [part for part in problem["loc"] if not str(part).startswith(MEMBER)]
        path = _cut(".".join(str(part) for part in loc[:_LONGEST]))
        if problem["type"] == "extra_forbidden":
            known = sorted({name for parent in _models_at(model, loc[:-1]) for name in parent.model_fields})
            lines.append(f"{where}: unknown key {path!r}{did_you_mean(str(problem['loc'][-1]), known)}")
        elif problem["type"] == "missing":
            lines.append(f"{where}: {path}: required, not given")
        else:
            message = problem["msg"].removeprefix("Value error, ").replace("a valid tuple", "a list")
            found = "" if ", found " in message or "; given: " in message else f", found {brief(problem['input'])}"
            lines.append(f"{where}: {path}: {message}{found}" if path else f"{where}: {message}")
    if len(problems) > _PROBLEMS:
        lines.append(f"{where}: and {len(problems) - _PROBLEMS:,} problems more")
    return "\n".join(lines)


def did_you_mean(name: str, known: Sequence[str]) -> str:
    """The rest of a sentence about an unknown ``name``: the nearest of ``known``, or all of them."""
    near = difflib.get_close_matches(_cut(name), known, n=1, cutoff=0.6)
    return f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(known)}"


def brief(value: object) -> str:
    """``value`` as a message shows it, however long it is."""
    text = _briefly.repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _cut(name: str) -> str:
    return name if len(name) <= _LONGEST else name[: _LONGEST - 3] + "..."


def set_by_path(tree: dict[str, Any], override: str) -> None:
    """Set ``key.path=value`` in plain data, in place; raises ValueError where it cannot be read or leads nowhere."""
    path, equals, text = override.partition("=")
    if not equals or not path:
        raise ValueError(f"expected key.path=value, found {override!r}")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise ValueError(f"{override!r}: the value is not YAML") from None
    set_value(tree, path, value, override)


def set_value(tree: dict[str, Any], path: str, value: object, where: str) -> None:
    """Set the value at ``key.path`` in plain data, in place; a ValueError, which begins with ``where``, where the path leads nowhere."""
    *parents, last = path.split(".")
    node: Any = tree
    for part in parents:
        node = node[_index(node, part, where)] if isinstance(node, list) else node.setdefault(part, {})
        if not isinstance(node, dict | list):
            raise ValueError(f"{where!r}: {part!r} holds a value, not options")
    node[_index(node, last, where) if isinstance(node, list) else last] = value


def _index(items: list[Any], part: str, where: str) -> int:
    if not part.isdigit() or int(part) >= len(items):
        raise ValueError(f"{where!r}: expected an item from 0 to {len(items) - 1}, found {part!r}")
    return int(part)


def _models_at(annotation: object, path: Sequence[object]) -> Iterator[type[BaseModel]]:
    """The models that ``path`` below ``annotation`` may stand for (several where a field is a union)."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        if not path:
            yield annotation
        elif path[0] in annotation.model_fields:
            yield from _models_at(annotation.model_fields[str(path[0])].annotation, path[1:])
        elif path[0] == annotation.__name__:  # pydantic names the member of a union it tried
            yield from _models_at(annotation, path[1:])
        return
    origin = get_origin(annotation)
    if origin is Annotated:
        yield from _models_at(get_args(annotation)[0], path)
    if origin in (Union, types.UnionType):
        for member in get_args(annotation):
            yield from _models_at(member, path)
    elif origin is Annotated:
        yield from _models_at(get_args(annotation)[0], path)
    elif origin in (list, tuple, dict) and path:
        for member in get_args(annotation):
            yield from _models_at(member, path[1:])
