"""GET /openapi.json: what the server takes and answers, made of the same types that check it."""

from __future__ import annotations

from typing import Any

import pydantic
from pydantic.json_schema import models_json_schema

from gpt4moe.serve import responses
from gpt4moe.serve.requests import ChatRequest, CompletionRequest

REF = "#/components/schemas/{model}"
COMPLETE = (CompletionRequest, responses.Completion, responses.Completion)
CHAT = (ChatRequest, responses.ChatCompletion, responses.ChatChunk)
ASKED = (CompletionRequest, ChatRequest)
ANSWERED = (
    responses.Completion,
    responses.ChatCompletion,
    responses.ChatChunk,
    responses.Model,
    responses.Models,
    responses.Health,
    responses.Failure,
)
Kind = type[pydantic.BaseModel]
ALWAYS = {401: "no or a wrong API key", 429: "too many requests", 500: "a fault of the server", 503: "shutting down"}
OF_BODIES = {
    400: "a request that cannot be served",
    404: "a model that is not served",
    408: "a body that came too slowly",
    413: "a body that is too large",
    415: "a body that is not application/json",
}


def describe(version: str, model_name: str, with_key: bool) -> dict[str, Any]:
    """The document, in OpenAPI 3.1, of a server of one model."""
    modes = [(kind, "validation") for kind in ASKED] + [(kind, "serialization") for kind in ANSWERED]
    _, schemas = models_json_schema(modes, ref_template=REF)
    components: dict[str, Any] = {"schemas": schemas["$defs"]}
    for kind in ASKED:
        components["schemas"][kind.__name__]["properties"]["model"]["enum"] = [model_name]
    document: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {"title": "gpt4moe", "version": version, "description": "OpenAI-compatible; see docs/serving.md"},
        "paths": _paths(model_name),
        "components": components,
    }
    if with_key:
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        document["security"] = [{"key": []}]
    return document


def _paths(model_name: str) -> dict[str, Any]:
    name = {"name": "name", "in": "path", "required": True, "schema": {"type": "string", "enum": [model_name]}}
    text = {"text/plain": {"schema": {"type": "string"}}}
    draining = _answer("shutting down", responses.Health)
    return {
        "/v1/completions": {"post": _post("continue texts", *COMPLETE)},
        "/v1/chat/completions": {"post": _post("the next turn of a chat", *CHAT)},
        "/v1/models": {"get": _get("the models", _answer("the models", responses.Models), _failures(ALWAYS))},
        "/v1/models/{name}": {
            "get": _get(
                "one model",
                _answer("the model", responses.Model),
                _failures(ALWAYS | {404: "a model that is not served"}),
            )
            | {"parameters": [name]}
        },
        "/healthz": {"get": _get("whether requests are taken", _answer("yes", responses.Health), {"503": draining})},
        "/metrics": {"get": _get("counts for Prometheus", {"description": "the counts", "content": text}, {})},
    }


def _post(summary: str, asked: Kind, answered: Kind, streamed: Kind) -> dict[str, Any]:
    answer = _answer("the whole answer, or its events where stream is true", answered)
    answer["content"]["text/event-stream"] = {"schema": _event(streamed)}
    body = {"required": True, "content": {"application/json": {"schema": _ref(asked)}}}
    responses_ = {"200": answer} | _failures(OF_BODIES | ALWAYS)
    return {"summary": summary, "requestBody": body, "responses": responses_}


def _event(kind: Kind) -> dict[str, Any]:
    data = {"type": "string", "description": f"{kind.__name__} or Failure as JSON; [DONE] in the last event"}
    return {"type": "object", "properties": {"data": data}, "required": ["data"]}


def _get(summary: str, answer: dict[str, Any], others: dict[str, Any]) -> dict[str, Any]:
    return {"summary": summary, "responses": {"200": answer} | others}


def _failures(statuses: dict[int, str]) -> dict[str, Any]:
    return {str(status): _answer(said, responses.Failure) for status, said in sorted(statuses.items())}


def _answer(description: str, kind: Kind) -> dict[str, Any]:
    return {"description": description, "content": {"application/json": {"schema": _ref(kind)}}}


def _ref(kind: Kind) -> dict[str, str]:
    return {"$ref": REF.format(model=kind.__name__)}
