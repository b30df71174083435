"""/v1/models, and the refusal of models that are not served."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from gpt4moe.serve.errors import ApiError
from gpt4moe.serve.exchange import json_response
from gpt4moe.serve.responses import Model, Models
from gpt4moe.serve.service import Service


def check_model(service: Service, name: str) -> None:
    """Raises the refusal of a model of another name."""
    if name != service.config.model_name:
        said = f"the model {name!r} does not exist; this server has {service.config.model_name!r}"
        raise ApiError(404, said, param="model", code="model_not_found")


async def list_models(request: Request, service: Service) -> Response:
    """GET /v1/models: the one that is served."""
    return json_response(Models(data=[_served(service)]))


async def show_model(request: Request, service: Service) -> Response:
    """GET /v1/models/NAME."""
    check_model(service, request.path_params["name"])
    return json_response(_served(service))


def _served(service: Service) -> Model:
    return Model(
        id=service.config.model_name,
        created=service.created,
        owned_by="gpt4moe",
        max_model_len=service.engine.max_length,
    )
