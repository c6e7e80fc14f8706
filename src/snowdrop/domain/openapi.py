"""The OpenAPI 3.1 document of a service, made from its spec alone."""

from typing import Any

import msgspec

from snowdrop.domain.errors import ErrorBody
from snowdrop.domain.service import EndpointSpec, ServiceSpec
from snowdrop.domain.signature import SCHEMA_REF

_ERROR_REF = {"$ref": SCHEMA_REF.format(name="SnowdropError")}
_REFUSALS = {
    "413": "The body is larger than the service takes.",
    "422": "The request does not fit the schema; `error.fields` names each field.",
    "429": "The queue is full; `Retry-After` says when to come back.",
    "500": "The service's own code failed.",
    "503": "Nothing can answer now; `Retry-After` says when to come back.",
}


def openapi_document(spec: ServiceSpec, *, version: str = "1") -> dict[str, Any]:
    """OpenAPI 3.1 of all endpoints: POST with a JSON object, and GET with a query string."""
    components: dict[str, Any] = {}
    for endpoint in spec.endpoints:
        components.update(endpoint.components)
    components["SnowdropError"] = _error_schema()
    return {
        "openapi": "3.1.0",
        "info": {"title": spec.class_name, "version": version},
        "paths": {endpoint.path: _path_item(endpoint) for endpoint in spec.endpoints},
        "components": {"schemas": components},
    }


def _error_schema() -> dict[str, Any]:
    (schema,), defined = msgspec.json.schema_components((ErrorBody,), ref_template=SCHEMA_REF)
    body = defined.get("ErrorBody", schema)
    return {"type": "object", "properties": {"error": body}, "required": ["error"]}


def _path_item(endpoint: EndpointSpec) -> dict[str, Any]:
    body = {"required": bool(endpoint.input_schema.get("required")), "content": _json(endpoint.input_schema)}
    post: dict[str, Any] = {
        "operationId": endpoint.method_name,
        "requestBody": body,
        "responses": _responses(endpoint),
    }
    required = set(endpoint.input_schema.get("required", ()))
    parameters = [
        {"name": name, "in": "query", "required": name in required, "schema": schema}
        for name, schema in endpoint.input_schema.get("properties", {}).items()
    ]
    get: dict[str, Any] = {
        "operationId": f"{endpoint.method_name}_get",
        "parameters": parameters,
        "responses": _responses(endpoint),
    }
    if endpoint.doc:
        post["description"] = get["description"] = endpoint.doc
    return {"post": post, "get": get}


def _responses(endpoint: EndpointSpec) -> dict[str, Any]:
    answers: dict[str, Any] = {"200": {"description": "The answer.", "content": _answer_content(endpoint)}}
    for status, description in _REFUSALS.items():
        answers[status] = {"description": description, "content": _json(_ERROR_REF)}
    return answers


def _answer_content(endpoint: EndpointSpec) -> dict[str, Any]:
    octets = {"schema": {"type": "string", "format": "binary"}}
    if endpoint.stream == "chunked":
        return {"application/octet-stream": octets}
    if endpoint.stream == "sse":
        item = {"schema": endpoint.output_schema}
        return {"text/event-stream": item, "application/x-ndjson": item}
    if endpoint.output_schema.get("contentEncoding") == "base64":
        return {"application/octet-stream": octets}
    return _json(endpoint.output_schema)


def _json(schema: dict[str, Any]) -> dict[str, Any]:
    return {"application/json": {"schema": schema}}
