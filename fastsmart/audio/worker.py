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

from fastsmart.audio.fluidsynth import FluidSynthRenderer, piece_arrays
from fastsmart.audio.settings import RenderSettings
from fastsmart.errors import UserError

if TYPE_CHECKING:
    from fastsmart.notes import NoteBatch

TASK = struct.Struct(
    "<qqd"
)  # clip, notes M, end s; then onset s and duration s, float64 [M], pitch, velocity, uint8 [M]
REPORT = struct.Struct("<qq")  # clip or one of the two below, samples of the clip; REFUSED is followed by the reason
READY, REFUSED = -1, -2


def pack_task(index: int, notes: NoteBatch, piece: int) -> bytes:
    """One piece as the bytes of a task: 24 + 18 M of them."""
    onset_s, duration_s, pitch, velocity, end_s = piece_arrays(notes, piece)
    columns = ((onset_s, np.float64), (duration_s, np.float64), (pitch, np.uint8), (velocity, np.uint8))
    raw = [np.ascontiguousarray(column, dtype).tobytes() for column, dtype in columns]
    return TASK.pack(index, len(onset_s), end_s) + b"".join(raw)


def unpack_task(task: bytes) -> tuple[int, tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, float]]:
    """The clip's index and its `piece_arrays`."""
    index, count, end_s = TASK.unpack_from(task)
    seconds = np.frombuffer(task, np.float64, 2 * count, TASK.size).reshape(2, count)
    midi = np.frombuffer(task, np.uint8, 2 * count, TASK.size + seconds.nbytes).reshape(2, count)
    return index, (seconds[0], seconds[1], midi[0], midi[1], end_s)


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
            renderer = FluidSynthRenderer(settings)
        except UserError as error:
            connection.send_bytes(REPORT.pack(REFUSED, 0) + str(error).encode())
            return
        block = np.frombuffer(memory, np.float32).reshape(-1, settings.max_samples)
        with renderer:
            connection.send_bytes(REPORT.pack(READY, 0))
            while True:
                index, piece = unpack_task(connection.recv_bytes())
                connection.send_bytes(REPORT.pack(index, renderer.render_into(block[index], *piece)))
    except (EOFError, ConnectionError):
        return


if __name__ == "__main__":
    pipe, memory = map(int, sys.argv[1:])
    threading.Thread(target=leave_with_pool, args=(pipe,), daemon=True).start()
    serve(Connection(pipe), mmap.mmap(memory, 0))
