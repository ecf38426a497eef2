"""Decoding tokens to notes in seconds: the numba decoder beside MidiTok's decode and symusic's clock.

    python bench/decode.py --peer all --out bench/results/decode.json

64 pieces of 256 tokens by the shipped policy, whole, on one core. "piece by piece" is how training calls it, as
completions end. MidiTok gives a symusic score, which symusic brings from ticks to seconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import as_commands  # noqa: F401  # isort: skip  # before torch

import numpy as np
from harness import Job, Work, interleaved, measured_ceilings, parser, report
from stages import finish, made, one_pass, parse, played, run

from fastsmart.notes import NoteBatch
from fastsmart.tokens.decode import decode
from fastsmart.tokens.token_batch import TokenBatch
from fastsmart.tokens.vocabulary import Vocabulary

PEERS = ("miditok",)
PASSES = 10  # in a turn of every contender: one of ours is a few milliseconds


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    options = parser(__doc__, 15, PEERS)
    options.add_argument("--pieces", type=int, default=64, help="64")
    options.add_argument("--tokens", type=int, default=256, help="of each piece, after its prompt (256)")
    options.set_defaults(threads=1)
    given = parse(options, {"runs": 9}, arguments)
    rollout, vocab = played(given.pieces, given.tokens)
    batch = rollout.sequences()
    pieces = [TokenBatch.pack([row]) for row in batch]
    notes = decode(batch, vocab)
    peers, left_out = made({"miditok": lambda: miditok(batch, vocab, len(notes.pitch))}, given)
    jobs: dict[str, Job] = {
        "numba, one batch": lambda: [decode(batch, vocab) for _ in range(PASSES)],
        "numba, piece by piece": lambda: [decode(piece, vocab) for _ in range(PASSES) for piece in pieces],
    }
    jobs |= peers
    seconds = one_pass(interleaved(jobs, given.runs), dict.fromkeys(jobs, PASSES))
    case = report("decode", seconds, "numba, one batch", [work(batch, notes)], measured_ceilings())
    shape = f"{given.pieces} x {given.tokens}"
    return finish("decode", {shape: case | {"notes": len(notes.pitch)}}, given, left_out=left_out)


def work(batch: TokenBatch, notes: NoteBatch) -> Work:
    """Every id is read and every number of the notes written, once."""
    written = sum(x.nbytes for f in fields(notes) if isinstance(x := getattr(notes, f.name), np.ndarray))
    return Work("ids read, notes written", gbyte=1e-9 * (batch.ids.nbytes + written))


def miditok(batch: TokenBatch, vocab: Vocabulary, notes: int) -> dict[str, Job]:
    tokenizer, rows = vocab.tokenizer, [row.tolist() for row in batch]

    def job() -> list[Any]:
        return [tokenizer.decode([row]).to("second") for _ in range(PASSES) for row in rows]

    assert sum(len(track.notes) for score in job() for track in score.tracks) == PASSES * notes
    return {"MidiTok and symusic": job}


if __name__ == "__main__":
    run(main)
