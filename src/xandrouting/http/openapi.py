"""The schema of the calls FastAPI does not see: the hot paths, and bodies msgspec checks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import msgspec
from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from xandrouting.http.inference import Kind

_REF = "#/components/schemas/{name}"

_UPSTREAM_METHODS = ("get", "post", "put", "patch", "delete")

_SUMMARIES = {
    "/v1/chat/completions": "Chat with a model; it is loaded if it is not",
    "/v1/completions": "Complete a text",
    "/v1/embeddings": "Embed texts",
    "/v1/rerank": "Rank documents",
    "/v1/responses": "OpenAI's responses call",
    "/v1/messages": "Anthropic's messages call",
    "/v1/messages/count_tokens": "Anthropic's token count",
    "/tokenize": "Text to tokens",
    "/detokenize": "Tokens to text",
}


def request_body(kind: type[msgspec.Struct]) -> dict[str, Any]:
    """Return FastAPI's `openapi_extra` for a call whose body is checked as `kind`."""
    reference = {"$ref": _REF.format(name=kind.__name__)}
    return {
        "requestBody": {"required": True, "content": {"application/json": {"schema": reference}}}
    }


def describe(
    app: FastAPI, hot_paths: Mapping[str, Kind], bodies: Iterable[type[msgspec.Struct]]
) -> None:
    """Make `app.openapi()` tell of the hot paths and of the bodies FastAPI does not check.

    `bodies` are all that `request_body` was called with.
    """

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            kinds = {*bodies, *(kind.body for kind in hot_paths.values())}
            app.openapi_schema = _schema(app, hot_paths, kinds)
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


def _schema(
    app: FastAPI, hot_paths: Mapping[str, Kind], kinds: set[type[msgspec.Struct]]
) -> dict[str, Any]:
    schema = get_openapi(
        title=app.title, version=app.version, summary=app.summary, routes=app.routes
    )
    _, components = msgspec.json.schema_components(
        sorted(kinds, key=lambda kind: kind.__name__), ref_template=_REF
    )
    schema["components"]["schemas"].update(components)
    any_error = _any_error(schema)
    for path, kind in hot_paths.items():
        schema["paths"][path] = {"post": _operation(path, kind, any_error)}
    schema["paths"]["/upstream/{path}"] = {
        method: _upstream_operation(method, any_error) for method in _UPSTREAM_METHODS
    }
    for operations in schema["paths"].values():
        for operation in operations.values():
            operation["responses"].pop("422", None)  # every validation error is a 400
            # FastAPI takes an error for text where the answer is text.
            operation["responses"].update(any_error)
    return schema


def _any_error(schema: dict[str, Any]) -> dict[str, Any]:
    """Return the error answers every call may give, as FastAPI wrote them for one of its own."""
    responses: dict[str, Any] = schema["paths"]["/health"]["get"]["responses"]
    return {status: answer for status, answer in responses.items() if status >= "400"}


def _operation(path: str, kind: Kind, any_error: dict[str, Any]) -> dict[str, Any]:
    answer = {"description": "The engine's answer, byte for byte", "content": {"*/*": {}}}
    return {
        "tags": ["inference"],
        "summary": _SUMMARIES[path],
        "operationId": path.strip("/").replace("/", "_"),
        "requestBody": request_body(kind.body)["requestBody"],
        "responses": {"200": answer, **any_error},
    }


def _upstream_operation(method: str, any_error: dict[str, Any]) -> dict[str, Any]:
    path = {
        "name": "path",
        "in": "path",
        "required": True,
        "description": "The model's id, and after it any path of its engine.",
        "schema": {"type": "string"},
    }
    answer = {"description": "The engine's answer, whatever it is", "content": {"*/*": {}}}
    return {
        "tags": ["llama-swap"],
        "summary": "A model's engine as it is; it is loaded if it is not",
        "operationId": f"upstream_{method}",
        "parameters": [path],
        "responses": {"default": answer, **any_error},
    }
