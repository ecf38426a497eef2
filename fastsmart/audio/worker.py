"""One process of the render pool: notes come in over a pipe as raw bytes, audio goes out into shared memory.

Started by `fastsmart.audio.pool` as `python -m fastsmart.audio.worker PIPE MEMORY` with two inherited file
descriptors. It ends when the pipe does, in the middle of a clip if need be, so it never outlives its pool.
"""

from __future__ import annotations

import json
import mmap
import os
import select
import struct
import sys
import threading
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING

import numpy as np

from fastsmart.audio.bank_renderer import make_renderer
from fastsmart.audio.events import Piece, piece_arrays
from fastsmart.audio.settings import RenderSettings
from fastsmart.errors import UserError

if TYPE_CHECKING:
    from fastsmart.notes import NoteBatch

# clip, notes M, pedal changes C, end s; then onset s and duration s, float64 [M], pedal s, float64 [C], pitch and
# velocity, uint8 [M], pedal down, bool [C]
TASK = struct.Struct("<qqqd")
REPORT = struct.Struct("<qq")  # clip or one of the two below, samples of the clip; REFUSED is followed by the reason
READY, REFUSED = -1, -2


def pack_task(index: int, notes: NoteBatch, i: int) -> bytes:
    """Piece i as the bytes of a task for clip `index`: 32 + 18 M + 9 C of them."""
    piece = piece_arrays(notes, i)
    wide = [np.ascontiguousarray(x, np.float64) for x in (piece.onset_s, piece.duration_s, piece.pedal_s)]
    narrow = [np.ascontiguousarray(x, np.uint8) for x in (piece.pitch, piece.velocity, piece.pedal_down)]
    head = TASK.pack(index, len(piece.onset_s), len(piece.pedal_s), piece.end_s)
    return head + b"".join(column.tobytes() for column in wide + narrow)


def unpack_task(task: bytes) -> tuple[int, Piece]:
    """The clip's index and its piece."""
    index, m, c, end_s = TASK.unpack_from(task)
    wide = np.frombuffer(task, np.float64, 2 * m + c, TASK.size)
    narrow = np.frombuffer(task, np.uint8, 2 * m + c, TASK.size + wide.nbytes)
    columns = wide[:m], wide[m : 2 * m], narrow[:m], narrow[m : 2 * m]
    return index, Piece(*columns, end_s, wide[2 * m :], narrow[2 * m :].view(bool))


def leave_with_pool(pipe: int) -> None:
    """End this process as soon as the other end of the pipe is closed, which a killed pool's is too."""
    poll = select.poll()
    poll.register(pipe, 0)  # nothing but the hang-up
    poll.poll()
    os._exit(0)


def serve(connection: Connection, memory: mmap.mmap) -> None:
    """Read the settings, then render task after task; returns when the other end of the pipe is closed."""
    try:
        settings = RenderSettings(**json.loads(connection.recv_bytes()))
        try:
            renderer = make_renderer(settings)
            block = np.frombuffer(memory, np.float32).reshape(-1, settings.max_samples)
            connection.send_bytes(REPORT.pack(READY, 0))
            while True:
                index, piece = unpack_task(connection.recv_bytes())
                connection.send_bytes(REPORT.pack(index, renderer.render_into(block[index], piece)))
        except UserError as error:
            connection.send_bytes(REPORT.pack(REFUSED, 0) + str(error).encode("utf-8", "replace"))
    except (EOFError, ConnectionError):
        return


if __name__ == "__main__":
    pipe, memory = map(int, sys.argv[1:])
    threading.Thread(target=leave_with_pool, args=(pipe,), daemon=True).start()
    serve(Connection(pipe), mmap.mmap(memory, 0))
