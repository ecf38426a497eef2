"""What is answered to each request of the page."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from fastsmart.errors import UserError
from fastsmart.live.requests import body, file_name, order
from fastsmart.live.session import Stale
from fastsmart.live.sound import KEYS
from fastsmart.live.studio import Studio
from fastsmart.notes import LARGEST_BYTES
from fastsmart.taste.choices import NAME

PAGE = {  # what the page is made of, by the last part of its address
    "": "live.html",
    "page.css": "page.css",
    "live.css": "live.css",
    "roll.js": "roll.js",
    "sound.js": "sound.js",
    "phrase.js": "phrase.js",
    "live.js": "live.js",
}
KINDS = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
FRESH = {"cache-control": "no-store"}
KEPT = {"cache-control": "private, max-age=86400"}


class Handlers:
    """One method for each address. What a listener can mend is raised as UserError."""

    def __init__(self, studio: Studio) -> None:
        self.studio, self.session = studio, studio.session
        self._page = {name: _page_file(file) for name, file in PAGE.items()}

    # ---------------------------------------------------------------------------------------------- what is shown

    async def page(self, request: Request) -> Response:
        name = request.url.path.rpartition("/")[2]
        return Response(self._page[name], media_type=KINDS[Path(PAGE[name]).suffix], headers=FRESH)

    async def state(self, request: Request) -> Response:
        return JSONResponse(await run_in_threadpool(self.studio.view), headers=FRESH)

    async def events(self, request: Request) -> Response:
        if self.studio.events.full:
            raise HTTPException(503, "this page is open too often; close it elsewhere")
        stream = self.studio.events.listen(await run_in_threadpool(self.studio.view))
        return StreamingResponse(stream, media_type="text/event-stream", headers=FRESH)

    async def clip(self, request: Request) -> Response:
        id = self._id(request)
        content = await run_in_threadpool(self.studio.sound.clip, id, partial(self.session.notes, id))
        return Response(content, media_type="audio/flac", headers=KEPT)

    async def midi(self, request: Request) -> Response:
        id = self._id(request)
        content = await run_in_threadpool(lambda: self.session.notes(id).midi_bytes(0))
        return Response(content, media_type="audio/midi", headers=_as_file(f"{id}.mid"))

    async def key(self, request: Request) -> Response:
        pitch = request.path_params["pitch"]
        if pitch not in map(str, KEYS):
            raise HTTPException(404, "there is no such key")
        content = await run_in_threadpool(self.studio.sound.key, int(pitch))
        return Response(content, media_type="audio/flac", headers=KEPT)

    async def choices(self, request: Request) -> Response:
        path = self.session.folder.choices_file
        content = await run_in_threadpool(lambda: path.read_bytes() if path.exists() else b"")
        return Response(content, media_type="application/jsonl", headers=_as_file(path.name))

    async def taste(self, request: Request) -> Response:
        path = self.session.folder.taste_file(self.session.listener)
        if not path.is_file():
            raise HTTPException(404, "nothing has been learnt yet")
        content = await run_in_threadpool(path.read_bytes)
        return Response(content, media_type="application/json", headers=_as_file("taste.json"))

    # ----------------------------------------------------------------------------------------- what a listener does

    async def choose(self, request: Request) -> Response:
        asked = await order(request, left=str, right=str, choice=str)
        return await self._done(self.session.choose, asked["left"], asked["right"], asked["choice"])

    async def undo(self, request: Request) -> Response:
        return await self._done(self.session.undo)

    async def skip(self, request: Request) -> Response:
        return await self._done(self.session.skip)

    async def settings(self, request: Request) -> Response:
        asked = await order(request)
        return await self._done(self.session.configure, *map(asked.get, ("boldness", "paused", "listener")))

    async def back(self, request: Request) -> Response:
        asked = await order(request, version=int)
        return await self._done(self.studio.teacher.go_back, asked["version"])

    async def reset(self, request: Request) -> Response:
        return await self._done(self.studio.teacher.reset)

    async def phrase(self, request: Request) -> Response:
        bars, name = request.query_params.get("bars") or "0", file_name(request.query_params.get("name", ""))
        if not re.fullmatch(r"[0-9]{1,4}", bars):
            raise UserError("the number of bars is a whole number; 0 takes all")
        too_much = f"{name} is larger than {LARGEST_BYTES // 2**20} MiB, which no piece needs; choose a MIDI file"
        content = await body(request, LARGEST_BYTES, too_much)
        return await self._answered(lambda: self.studio.answers.take(content, name, int(bars)))

    async def played(self, request: Request) -> Response:
        asked = await order(request, notes=list, tempo=(int, float))
        return await self._answered(lambda: self.studio.answers.take_played(asked["notes"], asked["tempo"]))

    async def answer(self, request: Request) -> Response:
        if self.studio.answers.phrase is None:
            raise Stale("there is no phrase to answer; choose a MIDI file or play one")
        return await self._answered(lambda: None)

    async def drop(self, request: Request) -> Response:
        return await self._done(self.studio.answers.drop)

    # ------------------------------------------------------------------------------------------------------ inside

    async def _done(self, job: Callable[..., Any], *arguments: Any) -> Response:
        await run_in_threadpool(job, *arguments)
        return JSONResponse(await run_in_threadpool(self.studio.view), headers=FRESH)

    async def _answered(self, take: Callable[[], None]) -> Response:
        await run_in_threadpool(take)
        self.studio.answers.begin()
        return JSONResponse({}, headers=FRESH)

    def _id(self, request: Request) -> str:
        id = request.path_params["id"]
        if not NAME.fullmatch(id) or not self.session.has(id):
            raise HTTPException(404, "there is no such piece")
        return id


def _page_file(name: str) -> bytes:
    room = "fastsmart.study" if name == "page.css" else "fastsmart.live"  # reports and this page look alike
    return (resources.files(room) / ("pages" if room == "fastsmart.study" else "page") / name).read_bytes()


def _as_file(name: str) -> dict[str, str]:
    return {**FRESH, "content-disposition": f'attachment; filename="{name}"'}
