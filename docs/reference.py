"""Write docs/recipes.md and the JSON schemas beside it from the recipes' own types: python docs/reference.py."""

import json
import re
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from student_train.chain import Chain
from student_train.recipe import TrainRecipe
from student_train.sweep import Sweep
from teacher_dump.augment import AugmentRecipe
from teacher_dump.generate import GenerateRecipe
from teacher_dump.recipe import DumpRecipe

HERE = Path(__file__).parent
HEAD = """# Recipes, field by field

Both programs read a recipe as YAML. An unknown key is an error that names the nearest known one; any field can be set on the command
line as `key.path=value`, list items by number: `teacher-dump run dump.yaml rows.sources.0.limit=100`. Editors that know JSON schemas
can check a recipe while you type: put `# yaml-language-server: $schema=docs/dump.schema.json` (or `train`, `chain`, `sweep`,
`augment`, `generate`) on its first line. Paths are relative to the folder a program is started in. This page is made from the code by
`python docs/reference.py`.
"""
TITLES = {
    DumpRecipe: "A dump: `teacher-dump run|plan|rows RECIPE`",
    TrainRecipe: "A training run: `student-train run|needs RECIPE`",
    Chain: "Both in turn: `student-train chain RECIPE`",
    Sweep: "Many training runs: `student-train sweep RECIPE`",
    AugmentRecipe: "Augmented texts: `teacher-dump augment RECIPE`",
    GenerateRecipe: "Texts that a teacher writes: `teacher-dump generate RECIPE`",
}


def page() -> str:
    """The reference as Markdown: one table for each type that a recipe is made of."""
    lines, seen = [HEAD], set()
    for recipe, title in TITLES.items():
        lines.append(f"## {title}\n")
        for model in reached(recipe):
            if model not in seen:
                seen.add(model)
                lines.append(table(model))
    return "\n".join(lines)


def schemas() -> dict[str, str]:
    """File name -> JSON schema."""
    return {
        f"{name}.schema.json": json.dumps(model.model_json_schema(), indent=1) + "\n"
        for name, model in {
            "dump": DumpRecipe,
            "train": TrainRecipe,
            "chain": Chain,
            "sweep": Sweep,
            "augment": AugmentRecipe,
            "generate": GenerateRecipe,
        }.items()
    }


def reached(model: type[BaseModel]) -> Iterator[type[BaseModel]]:
    """``model`` and the models that its fields hold, in order of their appearance."""
    yield model
    for field in model.model_fields.values():
        for inner in models_in(field.annotation):
            yield from reached(inner)


def models_in(annotation: object) -> Iterator[type[BaseModel]]:
    """The models inside a type."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from models_in(argument)


def table(model: type[BaseModel]) -> str:
    """One model: what it is, and a row for each field."""
    about = " ".join((model.__doc__ or "").split("\n\n")[0].split())
    rows = [f"### {model.__name__}\n", f"{about}\n", "| field | value | default | meaning |", "|---|---|---|---|"]
    for name, field in model.model_fields.items():
        meaning = " ".join((field.description or "").split()).replace("``", "`").replace("|", "\\|")
        rows.append(f"| `{name}` | {shown(field.annotation)} | {default(field)} | {meaning} |")
    return "\n".join(rows) + "\n"


def shown(annotation: Any) -> str:  # noqa: ANN401
    """A type in a reader's words."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin in (Union, types.UnionType):
        return " or ".join(shown(argument) for argument in arguments if argument is not type(None))
    if origin is Annotated:
        return shown(arguments[0])
    if origin in (tuple, list):
        return f"list of {shown(arguments[0])}" if (arguments and arguments[-1] is not Ellipsis) or len(arguments) == 2 else "list"
    if origin is dict:
        return "mapping"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return f"[{annotation.__name__}](#{annotation.__name__.lower()})"
    names = {str: "text", int: "whole number", float: "number", bool: "yes or no", Path: "path", object: "anything"}
    return names.get(annotation, re.sub(r"^.*\.", "", str(annotation)))


def default(field: FieldInfo) -> str:
    """What a field is where a recipe leaves it out."""
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    return "" if value is None or value in ((), [], {}) else f"`{json.dumps(value, default=str)}`"


if __name__ == "__main__":
    sys.path.insert(0, str(HERE.parent))
    (HERE / "recipes.md").write_text(page(), encoding="utf-8")
    for name, text in schemas().items():
        (HERE / name).write_text(text, encoding="utf-8")
