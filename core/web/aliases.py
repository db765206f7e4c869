"""Which members of requests and answers have a better name than the one that clients know?

A name that was promised keeps working. The better one stands beside it: a request may use either, an answer carries
both, and the OpenAPI document calls the older one deprecated. Inside, and in the metadata of a PNG, there is the older
name alone. This file does not know which answers there are, nor the short names that requests may use as well
(`core/web/requests.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import Field

from core.web.errors import Problem, shown

BETTER_NAMES = {  # older name -> the one that readers of diffusers and of papers expect
    "adherence": "prompt_alignment",
    "balance": "attribute_balancing",
    "draw_body_bytes": "generation_body_bytes",
    "heard": "encoded_prompt",
    "one_pass": "guidance_range",
    "seconds_per_picture": "seconds_per_image",
}
REQUEST_ALIASES = {better: older for older, better in BETTER_NAMES.items() if older == "balance"}


def both_names(members: Mapping[str, Any]) -> dict[str, Any]:
    """The members of an answer, with the better name beside each older one."""
    return {**members, **{BETTER_NAMES[name]: value for name, value in members.items() if name in BETTER_NAMES}}


def older_name_of(better: str) -> Any:
    """What a type of an answer says of a member that has a better name."""
    return Field(description=f"older name of `{better}`", json_schema_extra={"deprecated": True})


def assert_same(name: str, value: Any, other_name: str, other_value: Any) -> None:
    """Of one field that came under both of its names. Raises a 400 problem that names both when their values differ."""
    if (type(value), value) != (type(other_value), other_value):  # true is not 1
        raise Problem(
            400, f"{other_name} and {name} are two names of one field and must not differ; got {shown(other_value)} "
            f"and {shown(value)}. Send only {name if name in BETTER_NAMES.values() else other_name}."
        )


def add_better_names(schema: dict[str, Any]) -> None:
    """Write the better names into the JSON Schema of a request: members, what goes together, and that both may come
    when they say the same. The fields concerned are booleans."""
    members = schema["properties"]
    renamed = {older: better for better, older in REQUEST_ALIASES.items() if older in members}
    for found in _members_in(schema):
        found.update({renamed[name]: {**of} for name, of in found.items() if name in renamed})
    for older, better in renamed.items():
        members[better]["title"] = better.replace("_", " ").title()
        members[older] |= {"deprecated": True, "description": f"older name of `{better}`"}
        same = [{"properties": {older: {"const": value}, better: {"const": value}}} for value in (False, True)]
        schema.setdefault("allOf", []).append({"if": {"required": [older, better]}, "then": {"anyOf": same}})


def _members_in(part: Any) -> Iterator[dict[str, Any]]:
    """Every `properties` of a JSON Schema, whatever it is nested in."""
    if isinstance(part, dict):
        if isinstance(part.get("properties"), dict):
            yield part["properties"]
        for inner in part.values():
            yield from _members_in(inner)
    elif isinstance(part, list):
        for inner in part:
            yield from _members_in(inner)
