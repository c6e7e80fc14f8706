"""Example requests from a service's schemas, for people to copy."""

import json
import shlex
from typing import Any

from snowdrop.domain.service import EndpointSpec

DEPTH_MAX = 6
"""Schemas may refer to themselves; below this depth an example is null."""

_BY_TYPE: dict[str, Any] = {"string": "text", "integer": 1, "number": 0.5, "boolean": True, "null": None}


def example_body(endpoint: EndpointSpec) -> dict[str, Any]:
    """A JSON object that fits the endpoint's input schema, with its required parameters alone."""
    schema = endpoint.input_schema
    properties = schema.get("properties", {})
    required = schema.get("required", ())
    return {name: _example(properties[name], endpoint.components, DEPTH_MAX) for name in required}


def curl_command(endpoint: EndpointSpec, base_url: str) -> str:
    """A shell command that calls the endpoint; `-N` shows a stream as it comes."""
    flags = "" if endpoint.stream == "no" else " -N"
    body = shlex.quote(json.dumps(example_body(endpoint)))
    return f"curl{flags} {shlex.quote(base_url + endpoint.path)} -H 'content-type: application/json' -d {body}"


def _example(schema: dict[str, Any], components: dict[str, Any], depth: int) -> Any:
    if depth == 0:
        return None
    if "$ref" in schema:
        return _example(components.get(schema["$ref"].rpartition("/")[2], {}), components, depth - 1)
    for key in ("default", "const"):
        if key in schema:
            return schema[key]
    if schema.get("enum"):
        return schema["enum"][0]
    for key in ("anyOf", "oneOf", "allOf"):
        if schema.get(key):
            return _example(schema[key][0], components, depth - 1)
    kind = schema.get("type")
    kind = kind[0] if isinstance(kind, list) else kind
    if kind == "array":
        fixed = schema.get("prefixItems")
        items = fixed or [schema.get("items") or {"type": "string"}]
        return [_example(each, components, depth - 1) for each in items]
    if kind == "object":
        properties = schema.get("properties", {})
        return {name: _example(properties[name], components, depth - 1) for name in schema.get("required", ())}
    if kind == "string" and schema.get("contentEncoding") == "base64":
        return "AAAA"
    if kind == "string" and schema.get("format") == "date-time":
        return "2024-01-01T00:00:00Z"
    return _BY_TYPE.get(str(kind), "text")
