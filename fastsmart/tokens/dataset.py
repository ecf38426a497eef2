"""A folder of MIDI files as one memory-mapped file of token ids. Shape letters: P pieces, V vocabulary.

On disk a dataset is a folder: `tokens.bin` (uint16, little endian, pieces one after the other), `offsets.npy`
(int64 [P + 1]), `dataset.json` (files, damaged files with the reason, settings) and the MidiTok JSON.
"""

from __future__ import annotations

import json
import struct
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from fastsmart.errors import UserError
from fastsmart.machine.files import atomic_folder, cpu_cores, is_special, os_errors_as_user_errors
from fastsmart.machine.workers import start_worker
from fastsmart.notes import LARGEST_BYTES, MIDI_SUFFIXES
from fastsmart.tokens.vocabulary import Vocabulary, load_vocabulary

DRUMLESS_PROGRAM = 0  # every voice is read as a piano
HEADER = struct.Struct("<?")  # one message of a worker: encoded or not, then ids or the reason


@dataclass(frozen=True)
class TokenDataset:
    """Encoded pieces.

    ids     : uint16 [total], memory-mapped read-only
    offsets : int64 [P + 1], piece p is `ids[offsets[p]:offsets[p + 1]]`
    files   : P file names, relative to the folder they were read from
    damaged : (file name, reason) of what could not be read
    vocab   : the vocabulary the ids belong to
    source  : the folder of MIDI files, as an absolute path
    """

    ids: np.ndarray
    offsets: np.ndarray
    files: tuple[str, ...]
    damaged: tuple[tuple[str, str], ...]
    vocab: Vocabulary
    source: str

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def piece(self, p: int) -> np.ndarray:
        """Ids of piece p, uint16."""
        return self.ids[self.offsets[p] : self.offsets[p + 1]]

    @staticmethod
    def open(folder: str | Path) -> TokenDataset:
        """Map an encoded dataset; raises UserError when the folder does not hold a whole one."""
        folder = Path(folder)
        try:
            record = json.loads((folder / "dataset.json").read_text(encoding="utf-8"))
            offsets = np.load(folder / "offsets.npy", allow_pickle=False)
            ids = np.memmap(folder / "tokens.bin", np.uint16, "r")
            files, damaged = tuple(record["files"]), tuple((name, reason) for name, reason in record["damaged"])
            whole = len(ids) == offsets[-1] and len(offsets) == len(files) + 1
        except (OSError, ValueError, KeyError, TypeError, IndexError, MemoryError, RecursionError) as error:
            raise UserError(
                f"{folder} is not an encoded dataset ({error}); make one with: fastsmart pretrain --midi DIR"
            ) from error
        if not whole:
            raise UserError(f"{folder} is incomplete: its files disagree on their length; delete it and encode again")
        return TokenDataset(ids, offsets, files, damaged, load_vocabulary(folder), record["source"])


def encode_folder(
    midi: str | Path,
    out: str | Path,
    vocab: Vocabulary,
    workers: int = 0,
    progress: Callable[[int, int, int], None] | None = None,
) -> TokenDataset:
    """Encode every MIDI file below a folder with MidiTok, in parallel, into the dataset folder `out`.

    All voices but drums are merged into one piano part; a meter of one beat (1/4) is read as four beats with a
    downbeat at the start. A damaged file is recorded with its reason and left out, also when it takes the worker
    process down with it. `workers` 0 means one a core; `progress(done, total, damaged)` is called after each file.
    The dataset appears in one step when it is complete.

    Raises UserError when there is no MIDI file below `midi`, none could be read, or `out` cannot be written.
    """
    midi, out = Path(midi), Path(out)
    found = (p for p in midi.rglob("*") if p.suffix.lower() in MIDI_SUFFIXES and not is_special(p))
    files = sorted(str(p.relative_to(midi)) for p in found)
    if not files:
        raise UserError(f"no MIDI files ({', '.join(MIDI_SUFFIXES)}) below {midi}")
    workers = min(workers or cpu_cores(), len(files))
    lengths, kept, damaged = [], [], []
    with atomic_folder(out) as part, os_errors_as_user_errors(out):
        with open(part / "tokens.bin", "wb") as sink:
            for done, (name, ids, reason) in enumerate(_encode_in_order(midi, files, vocab, workers), 1):
                if ids is None:
                    damaged.append((name, reason))
                else:
                    kept.append(name)
                    lengths.append(len(ids))
                    sink.write(ids.tobytes())
                if progress:
                    progress(done, len(files), len(damaged))
        if not kept:
            raise UserError(
                f"none of the {len(files)} MIDI files below {midi} could be read; the first: {damaged[0][1]}"
            )
        np.save(part / "offsets.npy", np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64))
        vocab.save(part)
        record = {"source": str(midi.resolve()), "files": kept, "damaged": damaged}
        (part / "dataset.json").write_text(json.dumps(record, indent=1), encoding="utf-8")
    return TokenDataset.open(out)


def encode_midi(path: str | Path, vocab: Vocabulary) -> np.ndarray:
    """Token ids (uint16) of one MIDI file, without BOS and EOS.

    Raises UserError naming the file when it cannot be read or holds no notes the vocabulary can express.
    """
    from symusic import Score, TimeSignature, Track

    score: Any  # symusic's stubs cannot tell that a score read from a file is in ticks
    try:
        size = Path(path).stat().st_size
        if size > LARGEST_BYTES:
            raise UserError(f"{path} is larger than {LARGEST_BYTES / 2**20:g} MiB; name a file of the right kind")
        score = Score(str(path))
    except UserError:
        raise
    except Exception as error:  # symusic raises bare RuntimeError and friends for every kind of damage
        raise UserError(f"{path} is not a readable MIDI file: {error}") from error
    piano = Track("piano", DRUMLESS_PROGRAM, False)
    for track in score.tracks:
        if not track.is_drum:
            piano.notes.extend(track.notes)
    if len(piano.notes) == 0:
        raise UserError(f"{path} has no notes")
    for note in piano.notes:
        if note.velocity < 0:  # a damaged byte above 127, which symusic takes for a signed one; `read_midi` reads 127
            note.velocity = 127
    piano.notes.sort(key=lambda note: (note.time, note.pitch, -note.velocity))
    score.tracks = [piano]
    score.time_signatures = [
        TimeSignature(s.time, 4 if s.numerator == 1 else s.numerator, s.denominator) for s in score.time_signatures
    ]
    tokenizer = vocab.tokenizer
    tokenizer.config.remove_duplicated_notes = True  # one voice doubling another costs tokens and adds nothing
    sequence = tokenizer.encode(score)
    return np.asarray((sequence[0] if isinstance(sequence, list) else sequence).ids, np.uint16)


def _encode_in_order(
    midi: Path, files: list[str], vocab: Vocabulary, workers: int
) -> Iterator[tuple[str, np.ndarray | None, str]]:
    """File i is the work of worker i modulo W, so reading the pipes in turn gives the files in order, with a bounded
    number of results waiting. A worker that dies takes one file with it and is replaced for the rest."""

    def start(first: int) -> tuple[subprocess.Popen[bytes], Connection]:
        ours, theirs = Pipe()
        process = start_worker("fastsmart.tokens.encode_worker", theirs.fileno())
        theirs.close()
        paths = [str(midi / name) for name in files[first::workers]]
        ours.send_bytes(json.dumps({"description": vocab.description, "paths": paths}).encode())
        return process, ours

    team = [start(first) for first in range(workers)]
    try:
        for i, name in enumerate(files):
            process, pipe = team[i % workers]
            try:
                message = pipe.recv_bytes()
            except (EOFError, OSError):
                yield name, None, f"{midi / name}: the encoder crashed on it (exit code {process.wait()})"
                team[i % workers] = start(i + workers)
                continue
            body = message[HEADER.size :]
            if HEADER.unpack_from(message)[0]:
                yield name, np.frombuffer(body, np.uint16), ""
            else:
                yield name, None, body.decode("utf-8")
    finally:
        for process, pipe in team:
            pipe.close()
            process.terminate()
            process.wait()
