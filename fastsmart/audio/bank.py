"""The note bank: the notes of one soundfont and program at one rate, rendered once and kept on disk for every process.

A bank is a folder, named by a hash of all that its sound depends on, with three files:

    bank.json    what it is a bank of
    index.jsonl  one line a held note: key, velocities, gains, rates of decay, place in `waves`, checksum; or that these
                 velocities are silent, or cannot be rebuilt from a held note
    waves.i16    the notes, int16, memory-mapped

Both grow at their ends only: first the samples, then the line that tells of them, so that a reader never finds half a
note. A process that misses a note measures it under a lock of its own; where two want the same one, the second waits
and finds it there. A checksum is verified when a process first uses a note, and a damaged note is measured again.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import mmap
import os
import shutil
import zlib
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from math import ceil, inf
from pathlib import Path
from typing import Any

import numpy as np

from fastsmart.audio.events import BLOCK
from fastsmart.audio.fluidsynth import GAIN, FluidSynthRenderer, load_library
from fastsmart.audio.mixdown import HELD_BLOCKS, LEAD, MISSING, SILENT, UNFIT, Tables
from fastsmart.audio.note_model import VelocityLayers, measure, phases, velocity_layers
from fastsmart.audio.resample import resample
from fastsmart.audio.settings import SYNTH_HZ, RenderSettings
from fastsmart.audio.soundfont import find_soundfont
from fastsmart.errors import UserError
from fastsmart.machine.files import cache_folder, file_hash, os_errors_as_user_errors, write_atomic

FORMAT = 2  # of the folder, and of how notes are measured: a new number makes old banks unused
GIB = 2**30
LIMIT_VARIABLE = "FASTSMART_BANK_GIB"
DEFAULT_LIMIT_GIB = 4.0
FIT_DB = 30.0  # a held note from which single notes are rebuilt worse than this is not used
GROW_BYTES = 64 * 2**20  # the file grows in such steps, so that it is mapped anew seldom
EXACT_BYTES = 256 * 2**20  # notes rendered on demand that a process keeps
_NOTE_LOCKS = 128 * 128  # a byte of the lock file each; the next one guards the ends of the files


@dataclass(frozen=True)
class BankInfo:
    """A bank on this machine.

    soundfont   : its path when the bank was made
    sample_rate : Hz; program: of bank 0; seconds: longest note
    notes, keys : stored held notes, and keys that have any
    bytes       : on disk
    """

    path: Path
    soundfont: str
    sample_rate: int
    program: int
    seconds: float
    notes: int
    keys: int
    bytes: int


class NoteBank:
    """The bank that `settings` need, filled as notes are asked for.

    settings : of which soundfont, program, sample_rate and the window count

    Owns a memory map, and FluidSynth once a note is missing: a context manager, or call `close`. Not for several
    threads at once.

    Raises UserError when the soundfont cannot be used or the cache folder cannot be written; without FluidSynth, when
    a note is asked for that is not there.
    """

    def __init__(self, settings: RenderSettings) -> None:
        self.soundfont = find_soundfont(settings.soundfont)
        self.sample_rate = settings.sample_rate
        # whole steps of five seconds, so that windows of about one length share a bank
        self.seconds = 5.0 * ceil(settings.max_samples / settings.sample_rate / 5.0)
        self._settings = RenderSettings(
            str(self.soundfont), "fluidsynth", sample_rate=SYNTH_HZ, max_seconds=self.seconds, program=settings.program
        )
        identity = {
            "format": FORMAT,
            "soundfont": file_hash(self.soundfont),
            "fluidsynth": _synth_version(),
            "gain": GAIN,
            "sample_rate": settings.sample_rate,
            "program": settings.program,
            "seconds": self.seconds,
        }
        name = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:20]
        self.path = banks_folder() / name
        self._renderer: FluidSynthRenderer | None = None
        self._layers: dict[int, VelocityLayers] = {}
        self._exact: OrderedDict[tuple[int, int, int, int], np.ndarray] = OrderedDict()
        self._exact_bytes = 0
        self._told: dict[tuple[int, int], dict[str, Any]] = {}  # index lines not yet verified, by key and velocity
        self._read = 0  # bytes of the index
        self._end = 0  # samples in use of `waves`
        self._notes = 0  # rows of the tables in use
        count, step = phases(settings.sample_rate)
        self._limit = limit_bytes()
        with os_errors_as_user_errors(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            if not (self.path / "bank.json").exists():
                write_atomic(self.path / "bank.json", json.dumps(identity | {"path": str(self.soundfont)}))
            os.utime(self.path)  # the least recently used bank goes first
            self._lock_fd = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT, 0o644)
            self._waves_fd = os.open(self.path / "waves.i16", os.O_RDWR | os.O_CREAT, 0o644)
            self._index_fd = os.open(self.path / "index.jsonl", os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        self.tables = Tables(
            waves=np.zeros(0, np.int16),
            offset=np.zeros(_NOTE_LOCKS, np.int64),
            length=np.zeros(_NOTE_LOCKS, np.int64),
            decay=np.zeros((_NOTE_LOCKS, len(HELD_BLOCKS)), np.float32),
            note_of=np.full((128, 128), MISSING, np.int32),
            gain=np.zeros((128, 128), np.float32),
            faster=np.zeros((128, 128), np.float32),
            phases=count,
            step=step,
        )
        self._read_index()
        make_room(self.path, self._limit)

    def ensure(self, pitch: np.ndarray, velocity: np.ndarray) -> np.ndarray:
        """Have notes, [M] keys and velocities, in the tables; bool [M], those that must be rendered on demand."""
        entry = self.tables.note_of[pitch, velocity]
        if (entry == MISSING).any():
            missing = np.unique(np.stack([pitch, velocity], axis=1)[entry == MISSING], axis=0)
            for key, level in missing.tolist():
                self._obtain(key, level)
            entry = self.tables.note_of[pitch, velocity]
        return entry == UNFIT

    def stored(self, pitch: np.ndarray, velocity: np.ndarray) -> bool:
        """Whether all these notes, [M] keys and velocities, are stored; those that others stored are found too."""
        missing = self.tables.note_of[pitch, velocity] == MISSING
        if missing.any():
            self._read_index()
            for note in zip(pitch[missing].tolist(), velocity[missing].tolist(), strict=True):
                if not self._take(*note):
                    return False
        return bool((self.tables.note_of[pitch, velocity] >= SILENT).all())

    def on_demand(self, key: int, velocity: int, phase: int, held: int) -> tuple[np.ndarray, float]:
        """A note as FluidSynth plays it, released after `held` blocks, at the bank's rate, and the gain it needs.

        float32 [T], LEAD samples early and `phase` blocks late. Kept for the next time, as long as there is room.
        """
        kinds = self._layers_of(key)
        named = int(kinds.release[velocity])
        held = min(held, int(self.seconds * SYNTH_HZ / BLOCK))
        wave = self._exact.pop((key, named, phase, held), None)
        if wave is None:
            blocks = int(self.seconds * SYNTH_HZ / BLOCK)
            played = self._synth().strike(key, [named], held, blocks)[0] if named else np.zeros(1, np.float32)
            played = played[: int(np.flatnonzero(played)[-1]) + 1] if played.any() else played[:1]
            count, step = self.tables.phases, self.tables.step
            padded = np.concatenate([np.zeros((count + phase) * BLOCK, np.float32), played])
            wave = resample(padded, SYNTH_HZ, self.sample_rate)[step - LEAD :]
            self._exact_bytes += wave.nbytes
        self._exact[key, named, phase, held] = wave
        while self._exact_bytes > EXACT_BYTES and len(self._exact) > 1:
            self._exact_bytes -= self._exact.popitem(last=False)[1].nbytes
        return wave, float(kinds.gain[velocity] / kinds.gain[named]) if named else 0.0

    @property
    def samples(self) -> int:
        """Samples of `tables.waves` that hold notes."""
        return min(self._end, len(self.tables.waves))

    @property
    def info(self) -> BankInfo:
        """Contents on disk."""
        return read_info(self.path)

    def close(self) -> None:
        """Let go of the files and of FluidSynth."""
        if self._renderer:
            self._renderer.close()
        self.tables = self.tables._replace(waves=np.zeros(0, np.int16))
        for descriptor in (self._lock_fd, self._waves_fd, self._index_fd):
            with suppress(OSError):
                os.close(descriptor)

    def __enter__(self) -> NoteBank:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _obtain(self, key: int, velocity: int) -> None:
        """Bring one note into the tables: from the index, or measured and stored."""
        if self._take(key, velocity):
            return
        kinds = self._layers_of(key)
        anchor = int(kinds.held[velocity])
        with self._locked(key * 128 + anchor):
            self._read_index()
            if self._take(key, velocity):
                return
            mine = np.flatnonzero((kinds.held == anchor) & (np.arange(128) > 0))
            if anchor == 0:
                line: dict[str, Any] = {"key": key, "velocities": mine.tolist(), "length": 0, "snr_db": inf}
                samples = np.zeros(0, np.int16)
            else:
                tone = measure(self._synth(), key, anchor, kinds, self.sample_rate, self.seconds)
                samples = tone.samples if tone.snr_db >= FIT_DB else np.zeros(0, np.int16)
                line = {
                    "key": key,
                    "velocities": mine.tolist(),
                    "gain": (kinds.gain[mine] * tone.level).tolist(),
                    "faster": tone.faster[mine].tolist(),
                    "decay": tone.decay.tolist(),
                    "length": samples.size // self.tables.phases,
                    "snr_db": tone.snr_db,
                }
            if not self._store(line, samples):
                self.tables.note_of[key, mine] = UNFIT

    def _store(self, line: dict[str, Any], samples: np.ndarray) -> bool:
        """Write a note at the ends of the files and take it in; False where there is no room for it."""
        raw = samples.tobytes()
        with self._locked(_NOTE_LOCKS):
            self._read_index()
            line["offset"] = self._end
            line["checksum"] = _checksum(line, raw)
            if 2 * self._end + len(raw) > self._limit:
                return False
            try:
                size = os.fstat(self._waves_fd).st_size
                if 2 * self._end + len(raw) > size:
                    os.ftruncate(self._waves_fd, -(-(2 * self._end + len(raw)) // GROW_BYTES) * GROW_BYTES)
                _write_all(self._waves_fd, raw, 2 * self._end)
                # what a full disk or a crash left of a line is closed by the line break
                os.write(self._index_fd, b"\n" + json.dumps(line).encode() + b"\n")
            except OSError:  # a full disk, or a file system that may not be written: it goes on without storing
                return False
            self._read_index()
        return self._take(line["key"], line["velocities"][0])

    def _take(self, key: int, velocity: int) -> bool:
        """Move a note from the index, once its checksum is verified, into the tables; True when it is there."""
        if self.tables.note_of[key, velocity] != MISSING:
            return True
        line = self._told.pop((key, velocity), None)
        if line is None:
            return False
        velocities, length, count = line["velocities"], line["length"], self.tables.phases
        for level in velocities:
            self._told.pop((key, level), None)
        end = line["offset"] + count * length
        if length and end > len(self.tables.waves):
            self._map()
        samples = self.tables.waves[line["offset"] : end] if length else np.zeros(0, np.int16)
        if _checksum(line, samples.data) != line["checksum"]:
            return False
        if length == 0:
            self.tables.note_of[key, velocities] = SILENT if line["snr_db"] >= FIT_DB else UNFIT
            return True
        row, self._notes = self._notes, self._notes + 1
        self.tables.offset[row], self.tables.length[row] = line["offset"], length
        self.tables.decay[row] = line["decay"]
        self.tables.gain[key, velocities] = line["gain"]
        self.tables.faster[key, velocities] = line["faster"]
        self.tables.note_of[key, velocities] = row
        return True

    def _map(self) -> None:
        memory = mmap.mmap(self._waves_fd, 0, prot=mmap.PROT_READ)
        self.tables = self.tables._replace(waves=np.frombuffer(memory, np.int16))

    def _read_index(self) -> None:
        """Take in the lines that were added since the last time."""
        raw = os.pread(self._index_fd, os.fstat(self._index_fd).st_size - self._read, self._read)
        raw = raw[: raw.rfind(b"\n") + 1]
        self._read += len(raw)
        size = os.fstat(self._waves_fd).st_size
        for line in _lines(raw):
            end = line["offset"] + self.tables.phases * line["length"]
            if 2 * end > size:  # the file has been cut
                continue
            self._told |= {(line["key"], velocity): line for velocity in line["velocities"]}
            self._end = max(self._end, end)

    @contextmanager
    def _locked(self, byte: int) -> Iterator[None]:
        """Hold one byte of the lock file; the system lets go of it when this process dies."""
        fcntl.lockf(self._lock_fd, fcntl.LOCK_EX, 1, byte)
        try:
            yield
        finally:
            fcntl.lockf(self._lock_fd, fcntl.LOCK_UN, 1, byte)

    def _layers_of(self, key: int) -> VelocityLayers:
        if key not in self._layers:
            self._layers[key] = velocity_layers(self._synth(), key)
        return self._layers[key]

    def _synth(self) -> FluidSynthRenderer:
        if self._renderer is None:
            self._renderer = FluidSynthRenderer(self._settings)
        return self._renderer


def banks_folder() -> Path:
    """Folder of all banks: `bank` in fastsmart's cache folder."""
    return cache_folder("bank")


def list_banks() -> list[BankInfo]:
    """The banks on this machine, the one used last first; what is damaged, or goes meanwhile, is left out."""
    found: list[tuple[float, BankInfo]] = []
    for path in banks_folder().glob("*/bank.json"):
        with suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
            found.append((path.parent.stat().st_mtime, read_info(path.parent)))
    return [info for _, info in sorted(found, key=lambda pair: pair[0], reverse=True)]


def read_info(path: Path) -> BankInfo:
    """Read what a bank's folder says about it."""
    identity = json.loads((path / "bank.json").read_text(encoding="utf-8"))
    index = path / "index.jsonl"
    stored = [line for line in _lines(index.read_bytes()) if line["length"]] if index.exists() else []
    used = sum(file.stat().st_blocks * 512 for file in path.iterdir())
    keys = ("sample_rate", "program", "seconds")
    sound = {key: identity[key] for key in keys}
    held_keys = len({line["key"] for line in stored})
    return BankInfo(path, identity["path"], **sound, notes=len(stored), keys=held_keys, bytes=used)


def limit_bytes() -> int:
    """The most that banks may take on disk: FASTSMART_BANK_GIB, by default 4; raises UserError when it is no number."""
    text = os.environ.get(LIMIT_VARIABLE, "")
    try:
        limit = float(text) if text else DEFAULT_LIMIT_GIB
        return int(limit * GIB)
    except (ValueError, OverflowError) as error:
        raise UserError(f"{LIMIT_VARIABLE} = {text!r} must be a number of GiB, such as 4") from error


def make_room(keep: Path, limit: int) -> None:
    """Remove the banks that were not used for longest until all take no more than `limit` bytes; `keep` stays.

    A process that still uses a removed one keeps its files until it ends, as the system does with files in use.
    """
    banks = list_banks()
    total = sum(bank.bytes for bank in banks)
    for bank in reversed(banks):
        if total <= limit or bank.path == keep:
            continue
        shutil.rmtree(bank.path, ignore_errors=True)
        total -= bank.bytes


def _synth_version() -> str | None:
    """Version of FluidSynth; None where there is none, which is enough for notes that are stored."""
    try:
        return load_library().fluid_version_str().decode()
    except UserError:
        return None


def _lines(raw: bytes) -> Iterator[dict[str, Any]]:
    """The index lines that are whole."""
    for text in raw.splitlines():
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):  # empty, or cut by a crash
            continue
        if isinstance(line, dict) and {"key", "velocities", "length", "offset", "checksum"} <= line.keys():
            yield line


def _checksum(line: dict[str, Any], samples: bytes | memoryview) -> int:
    said = {key: value for key, value in line.items() if key != "checksum"}
    return zlib.crc32(json.dumps(said, sort_keys=True).encode(), zlib.crc32(samples))


def _write_all(descriptor: int, raw: bytes, offset: int) -> None:
    done = 0
    while done < len(raw):
        done += os.pwrite(descriptor, memoryview(raw)[done:], offset + done)
