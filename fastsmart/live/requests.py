"""What a request may carry: orders as small JSON objects, a MIDI file of bounded size."""

from __future__ import annotations

import json
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request

MOST_JSON = 256 * 1024  # bytes of an order; two thousand notes from a keyboard fit
LONGEST_NAME = 80  # characters of a file's name that are repeated to whoever sent it


async def body(request: Request, most: int, too_much: str) -> bytes:
    """The body of a request; raises HTTPException 413 with the sentence before more than `most` bytes are held."""
    said = request.headers.get("content-length", "0")
    if not said.isascii() or not said.isdigit() or len(said) > 18 or int(said) > most:
        raise HTTPException(413, too_much)
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > most:
            raise HTTPException(413, too_much)
        parts.append(part)
    return b"".join(parts)


async def order(request: Request, **kinds: type | tuple[type, ...]) -> dict[str, Any]:
    """The JSON object of a request; raises HTTPException 400 unless the named keys are there and of these kinds."""
    content = await body(request, MOST_JSON, f"an order is at most {MOST_JSON // 1024} KiB")
    try:
        found = json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise HTTPException(400, "an order is a JSON object") from error
    if not isinstance(found, dict):
        raise HTTPException(400, "an order is a JSON object")
    for key, kind in kinds.items():
        if not isinstance(found.get(key), kind) or isinstance(found.get(key), bool):
            raise HTTPException(400, f'an order of this kind says its "{key}"')
    return found


def file_name(text: str) -> str:
    """What the listener calls a file, without what breaks a line, and not too long."""
    shown = "".join(c for c in text if c.isprintable())[-LONGEST_NAME:].strip()
    return shown or "your file"
