"""Images of chats: data URLs, and files below a folder that the server allows; nothing is fetched from elsewhere."""

from __future__ import annotations

import base64
import binascii
import pathlib
import urllib.parse

from gpt4moe.data.images import TooManyLines, image_problem
from gpt4moe.infer.pictures import Picture, fitted_picture
from gpt4moe.serve.errors import ApiError
from gpt4moe.serve.service import Service

SHOWN = 60


def read_image(service: Service, url: str) -> Picture:
    """The image behind a URL, fitted to the model; raises the refusal of one that cannot be had or read."""
    if service.images is None:
        raise _refusal(url, "is an image, and the model reads none")
    data = _data_url(url) if url[:5].lower() == "data:" else _file(service, url)
    problem = image_problem(data, service.images.max_pixels)
    if problem:
        raise _refusal(url, problem)
    try:
        return fitted_picture(data, service.images, by_lines=True)
    except TooManyLines as error:
        raise _refusal(url, str(error)) from None


def _data_url(url: str) -> bytes:
    header, comma, payload = url.partition(",")
    if not comma or not header.lower().endswith(";base64"):
        raise _refusal(url, "must have the form data:image/png;base64,DATA")
    try:
        return base64.b64decode(urllib.parse.unquote(payload), validate=True)
    except (binascii.Error, ValueError):
        raise _refusal(url, "is not base64") from None


def _file(service: Service, url: str) -> bytes:
    scheme, _, rest = url.partition("://")
    if rest and scheme.lower() != "file":
        raise _refusal(url, "is not fetched: send a data URL")
    root = service.config.image_root
    if root is None:
        raise _refusal(url, "is a file, and this server reads none (--image_root): send a data URL")
    named = urllib.parse.unquote(rest) if rest else url
    if "\0" in named:
        raise _refusal(url, "is no path")
    folder = pathlib.Path(root).resolve()
    try:
        # Links are followed first: what counts is where the file lies.
        path = (folder / named).resolve()
        is_inside = path.is_relative_to(folder)
        data = _read(path, service.config.max_body_bytes) if is_inside else None
    except (OSError, ValueError, RuntimeError):
        data = None
    if data is None:  # the same words for all of these, so that nobody can look around outside
        raise _refusal(url, "is not a file below the server's --image_root, or is too large")
    return data


def _read(path: pathlib.Path, max_bytes: int) -> bytes | None:
    if not path.is_file() or path.stat().st_size > max_bytes:
        return None
    return path.read_bytes()


def _refusal(url: str, problem: str) -> ApiError:
    shown = url if len(url) <= SHOWN else url[:SHOWN] + "..."
    return ApiError(400, f"image_url={shown!r} {problem}", param="messages", code="invalid_image")
