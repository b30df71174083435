"""The server as an ASGI application: routes, limits, errors in one form."""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Awaitable, Callable

import prometheus_client
import pydantic
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Mount, Route

import gpt4moe
from gpt4moe.config.check import CallerError
from gpt4moe.infer.engine.request import EngineClosed, QueueFull
from gpt4moe.serve import openapi
from gpt4moe.serve.chat import chat
from gpt4moe.serve.completions import complete
from gpt4moe.serve.errors import ApiError, respond
from gpt4moe.serve.gate import Gate
from gpt4moe.serve.model_names import list_models, show_model
from gpt4moe.serve.monitor import EngineCollector, Traffic, show_health, show_metrics
from gpt4moe.serve.service import Service

PAGE = pathlib.Path(__file__).with_name("chat.html")
# The page is all in one file and speaks to this server alone.
PAGE_POLICY = (
    "default-src 'none'; connect-src 'self'; img-src data:; script-src 'unsafe-inline'; style-src 'unsafe-inline'"
)
ANSWERED = (ApiError, CallerError, QueueFull, EngineClosed, pydantic.ValidationError, HTTPException, Exception)


def make_app(service: Service) -> Starlette:
    """The application of a service whose engine runs in a thread; `gpt4moe.serve.server` listens for it."""
    registry = prometheus_client.CollectorRegistry()
    registry.register(EngineCollector(service.engine))
    traffic = Traffic(registry)
    document = openapi.describe(gpt4moe.__version__, service.config.model_name, service.config.api_key is not None)
    page, policy = PAGE.read_text(encoding="utf-8"), {"Content-Security-Policy": PAGE_POLICY}

    def of(handler: Callable[[Request, Service], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
        return functools.partial(handler, service=service)

    guarded = [
        Route("/completions", of(complete), methods=["POST"]),
        Route("/chat/completions", of(chat), methods=["POST"]),
        Route("/models", of(list_models), methods=["GET"]),
        Route("/models/{name:path}", of(show_model), methods=["GET"]),
    ]
    return Starlette(
        routes=[
            Mount("/v1", routes=guarded, middleware=[Middleware(Gate, service=service, traffic=traffic)]),
            Route("/healthz", of(show_health), methods=["GET"]),
            Route("/metrics", lambda request: show_metrics(registry), methods=["GET"]),
            Route("/openapi.json", lambda request: JSONResponse(document), methods=["GET"]),
            Route("/", lambda request: HTMLResponse(page, headers=policy), methods=["GET"]),
        ],
        exception_handlers=dict.fromkeys(ANSWERED, respond),
    )
