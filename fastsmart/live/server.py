"""The server of the page, on a loopback port of its own."""

from __future__ import annotations

import asyncio
import os
import secrets
import socket
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from fastsmart.errors import UserError
from fastsmart.live.events import Events
from fastsmart.live.guard import Guard, refused
from fastsmart.live.handlers import PAGE, Handlers
from fastsmart.live.session import Stale
from fastsmart.live.studio import Studio
from fastsmart.machine.files import read_file
from fastsmart.machine.signals import stop_signals
from fastsmart.words import in_one_line

TOKEN_FILE = ".token"
TOKEN_BYTES = 24
LONGEST_SENTENCE = 600  # characters; it may quote a damaged file
POSTS = ("choose", "undo", "skip", "settings", "back", "reset", "phrase", "played", "answer", "drop")


def make_app(studio: Studio, token: str) -> Guard:
    """The application, all of it below `/TOKEN/`."""
    own = Handlers(studio)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> Any:
        studio.events.begin()
        yield

    routes = [
        *(Route(f"/{name}", own.page) for name in PAGE),
        Route("/state", own.state),
        Route("/events", own.events),
        Route("/clips/{id}.flac", own.clip),
        Route("/clips/{id}.mid", own.midi),
        Route("/piano/{pitch}.flac", own.key),
        Route("/choices.jsonl", own.choices),
        Route("/taste.json", own.taste),
        *(Route(f"/{name}", getattr(own, name), methods=["POST"]) for name in POSTS),
    ]
    return Guard(Starlette(routes=routes, lifespan=lifespan, exception_handlers=_REFUSALS), token)


async def _told(request: Request, error: Exception) -> Response:
    """One sentence for what a listener can mend."""
    sentence = in_one_line(str(error))
    shown = sentence if len(sentence) <= LONGEST_SENTENCE else f"{sentence[:LONGEST_SENTENCE]}..."
    return refused(409 if isinstance(error, Stale) else 422, shown)


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    said = {404: "there is nothing here", 405: "that is not done here"}
    plain = error.detail in ("Not Found", "Method Not Allowed")
    return refused(error.status_code, said.get(error.status_code, error.detail) if plain else error.detail)


async def _gone(request: Request, error: Exception) -> Response:
    return refused(400, "the request ended too early")


_REFUSALS: Any = {UserError: _told, HTTPException: _refused, ClientDisconnect: _gone}


def token_of(folder: Path) -> str:
    """The folder's token, made when it is first asked for; only its owner can read the file. The address stays the
    same when the server starts again, so that open pages find it."""
    path = folder / TOKEN_FILE
    with suppress(OSError, UserError, UnicodeDecodeError):
        if len(token := read_file(path).decode("ascii").strip()) >= TOKEN_BYTES and token.isalnum():
            return token
    token = secrets.token_hex(TOKEN_BYTES)
    with suppress(FileNotFoundError):
        path.unlink()
    with open(path, "x", encoding="ascii", opener=_private) as to:
        to.write(token + "\n")
    return token


def _private(name: str, flags: int) -> int:
    return os.open(name, flags, 0o600)


def listen_at(host: str, port: int) -> socket.socket:
    """A socket that listens there: who comes before `serve` waits. Raises UserError where it cannot."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    found = socket.socket(family, socket.SOCK_STREAM)
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind((host, port))
        found.listen()
    except OSError as error:
        found.close()
        raise UserError(
            f"cannot listen at {host} port {port}: {error.strerror or error}; choose another --port, or 0 for any"
        ) from error
    return found


class _Server(uvicorn.Server):
    """A server that lets pages go before it waits for their streams to end."""

    def __init__(self, config: uvicorn.Config, events: Events) -> None:
        super().__init__(config)
        self._events = events

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._events.close()
        await super().shutdown(sockets)


def serve(app: Guard, at: socket.socket, events: Events) -> int:
    """Serve until Ctrl-C or SIGTERM; returns 128 + the signal's number, the exit code.

    events : of the application's studio; closed at the end
    """
    config = uvicorn.Config(
        app, http="h11", ws="none", loop="asyncio", log_level="warning", access_log=False, server_header=False,
        timeout_graceful_shutdown=2, h11_max_incomplete_event_size=32 * 1024, lifespan="on",
    )  # fmt: skip
    with stop_signals() as stop:  # uvicorn takes the signal, ends in order, and passes it on
        asyncio.run(_Server(config, events).serve(sockets=[at]))
    return stop.exit_code
