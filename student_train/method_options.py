"""The options of a method in words, from the JSON schema that a recipe's options are checked against."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from student_train.methods import options_model
from student_train.methods.base import Method
from student_train.schedule import Schedule

Schema = Mapping[str, Any]

_TYPES = {"integer": "whole number", "number": "number", "string": "text", "boolean": "true or false", "object": "mapping", "null": "unset"}
_BOUNDS = {"exclusiveMinimum": "> {}", "minimum": ">= {}", "exclusiveMaximum": "< {}", "maximum": "<= {}"}


def schema(cls: type[Method]) -> Schema:
    """JSON schema of the options, types by reference among its ``$defs``."""
    return options_model(cls).model_json_schema()


def option_lines(cls: type[Method]) -> list[tuple[str, str, str]]:
    """Name, default and allowed values of each option, in the order of ``__init__``."""
    fields, lines = options_model(cls).model_fields, []
    for name, option in schema(cls)["properties"].items():
        field = fields[name]
        lines.append((name, "required" if field.is_required() else _value(field.default), in_words(option)))
    return lines


def in_words(option: Schema) -> str:
    """The values that an option takes: ``number >= 0, <= 1``."""
    if "$ref" in option:
        return str(option["$ref"]).rpartition("/")[2].lower()
    if members := option.get("anyOf") or option.get("oneOf"):
        return " or ".join(in_words(member) for member in members)
    if "enum" in option or "const" in option:
        return ", ".join(map(str, option.get("enum", [option.get("const")])))
    if option.get("type") == "array":
        parts = option.get("prefixItems")
        return f"[{', '.join(map(in_words, parts))}]" if parts else f"list of {in_words(option.get('items', {}))}"
    bounds = ", ".join(text.format(_value(option[name])) for name, text in _BOUNDS.items() if name in option)
    return f"{_TYPES.get(option.get('type', ''), 'anything')}{f' {bounds}' if bounds else ''}"


def smallest(option: Schema) -> Sequence[object]:
    """Values to try for an option that must be given: all of a list of names, the least whole number; none where there is no telling."""
    if "enum" in option:
        values: list[object] = option["enum"]
        return values
    return [option["minimum"]] if option.get("type") == "integer" and "minimum" in option else []


def _value(value: object) -> str:
    if isinstance(value, str | Schedule):
        return str(value)
    return "unset" if value is None else json.dumps(value)
