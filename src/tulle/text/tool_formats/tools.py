"""Tools as a request names them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tulle.errors import UserError

Choice = str | Mapping[str, Any]
"""``tool_choice`` where a call must come: ``required``, or a mapping that names one function."""


@dataclass(frozen=True)
class Tool:
    """A function that the model may call."""

    name: str
    description: str = ""
    parameters: Mapping[str, Any] = field(default_factory=lambda: {"type": "object", "properties": {}})
    """JSON Schema of its arguments, which are an object."""

    @property
    def properties(self) -> dict[str, Any]:
        """Schemas of the arguments by their names, also of those that are only said to be required."""
        found = self.parameters.get("properties")
        properties = dict(found) if isinstance(found, Mapping) else {}
        return properties | {name: {} for name in self.required if name not in properties}

    @property
    def required(self) -> list[str]:
        found = self.parameters.get("required")
        return [str(name) for name in found] if isinstance(found, Sequence) and not isinstance(found, str) else []

    def resolved(self, schema: Any) -> dict[str, Any]:
        """The schema that a chain of local references leads to; {} for one that allows anything."""
        for _ in range(16):
            reference = schema.get("$ref") if isinstance(schema, Mapping) else None
            if not isinstance(reference, str):
                break
            found: Any = self.parameters
            for part in reference.removeprefix("#").split("/")[1:]:
                part = part.replace("~1", "/").replace("~0", "~")
                found = found.get(part) if isinstance(found, Mapping) else None
            schema = found
        return dict(schema) if isinstance(schema, Mapping) else {}

    def whole(self, schema: Any) -> Any:
        """The schema of a part, with the definitions that it may refer to."""
        if not isinstance(schema, Mapping):
            return schema
        return {**{key: self.parameters[key] for key in ("$defs", "definitions") if key in self.parameters}, **schema}


def allowed_values(schema: Mapping[str, Any]) -> list[Any]:
    """The values that ``enum`` or ``const`` allow; none where every value may come."""
    values = schema.get("enum", [schema["const"]] if "const" in schema else [])
    return list(values) if isinstance(values, Sequence) and not isinstance(values, str) else []


def read_tools(tools: Sequence[Mapping[str, Any] | Tool] | None) -> list[Tool]:
    """Tools from OpenAI's form, ``{"type": "function", "function": {...}}``, or from the function alone.

    Raises ``UserError`` where one has no name or no schema, or where two have one name.
    """
    found = []
    for tool in tools or ():
        if isinstance(tool, Tool):
            found.append(tool)
            continue
        function = tool.get("function", tool)
        name = function.get("name") if isinstance(function, Mapping) else None
        if not isinstance(name, str) or not name:
            raise UserError("expected tools of type function with a name, found one without; give function.name")
        parameters = function.get("parameters")
        if parameters is None:
            parameters = {"type": "object", "properties": {}}
        if not isinstance(parameters, Mapping):
            raise UserError(f"expected a JSON Schema as parameters of the tool {name!r}, found {parameters!r}")
        found.append(Tool(name, str(function.get("description") or ""), parameters))
    names = [tool.name for tool in found]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"expected tools with different names, found {name!r} twice")
    return found


def chosen_tools(tools: Sequence[Tool], choice: Choice) -> list[Tool]:
    """The tools that ``choice`` allows. Raises ``UserError`` for one that is not there."""
    if isinstance(choice, Mapping):
        function = choice.get("function", choice)
        name = function.get("name") if isinstance(function, Mapping) else None
        chosen = [tool for tool in tools if tool.name == name]
        if not chosen:
            known = ", ".join(tool.name for tool in tools) or "none"
            raise UserError(f"expected tool_choice to name one of the tools ({known}), found {name!r}")
        return chosen
    if choice != "required":
        raise UserError(f"expected tool_choice required or a function's name, found {choice!r}")
    if not tools:
        raise UserError("expected at least one tool with tool_choice required, found none")
    return list(tools)
