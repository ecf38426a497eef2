"""What stands before every request: who may ask, how much they may send, and what a browser may do with the answer.

The page and all its parts lie below a token that nobody can guess; without it there is nothing. A page of another site
can have a browser ask here all the same. It cannot read the token, and where it has made its own name mean this machine
(DNS rebinding), `Host` says its name; where it sends something, `Origin` does.
"""

from __future__ import annotations

import ipaddress
import secrets
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from starlette.responses import JSONResponse, Response

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "midi=(self), camera=(), microphone=(), geolocation=()",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
}
METHODS = ("GET", "HEAD", "POST")


class Guard:
    """An ASGI application that lets pass what has the token and comes from its own page.

    token : first part of every path
    """

    def __init__(self, app: App, token: str) -> None:
        self._app, self._token = app, token.encode()

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            return  # no WebSocket is spoken here: closed without an answer
        refusal = self._refusal(scope)

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                added = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
                message["headers"] = [*message.get("headers", []), *added]
            await send(message)

        if refusal is not None:
            await refusal(scope, receive, guarded)
            return
        rest = scope["path"][len(self._token) + 1 :]
        await self._app({**scope, "path": rest, "raw_path": rest.encode()}, receive, guarded)

    def _refusal(self, scope: Message) -> Response | None:
        """What to answer instead; None = let it pass."""
        headers = [(name.lower(), value.decode("latin-1")) for name, value in scope["headers"]]
        host = [value for name, value in headers if name == b"host"]
        origin = [value for name, value in headers if name == b"origin"]
        if len(host) != 1 or not is_local_name(host[0]):
            return refused(403, "this address is not one of this machine's; open the address that was printed")
        if len(origin) > 1 or (origin and origin[0] not in (f"http://{host[0]}", f"https://{host[0]}")):
            return refused(403, "another page asked for this; open the address that was printed")
        first, slash, _ = scope["path"].removeprefix("/").partition("/")
        if not slash or not secrets.compare_digest(first.encode("utf-8", "replace"), self._token):
            return refused(404, "there is nothing here; open the whole address that was printed, with its last part")
        if scope["method"] not in METHODS:
            return refused(405, "that is not done here")
        return None


def refused(status: int, sentence: str) -> JSONResponse:
    """One sentence for a person, and a status for a program."""
    return JSONResponse({"error": sentence}, status)


def is_local_name(host: str) -> bool:
    """Whether a `Host` header is an address in numbers or localhost, with a port or without: names can be made to mean
    this machine by whoever owns them, numbers cannot."""
    name, bracket, port = host.rpartition("]")
    if bracket:
        name, port = name.removeprefix("["), port.removeprefix(":")
    else:
        name, _, port = host.partition(":")
    if port and not (port.isascii() and port.isdigit() and len(port) <= 5):
        return False
    if name == "localhost" and not bracket:
        return True
    try:
        return ipaddress.ip_address(name).version == (6 if bracket else 4)
    except ValueError:
        return False
