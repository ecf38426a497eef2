"""Clips that are played to a listener, on disk: tokens, notes and features of each in one file."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load as load_arrays
from safetensors.numpy import save as save_arrays

from fastsmart.errors import UserError
from fastsmart.machine.files import make_folder, read_file, write_atomic
from fastsmart.notes import NoteBatch
from fastsmart.reward.taste_embedding import ClipEmbedding
from fastsmart.reward.taste_features import feature_names, features
from fastsmart.taste.choices import NAME

SUFFIX = ".safetensors"
_ARRAYS = tuple(f.name for f in fields(NoteBatch) if f.name not in ("ticks_per_beat", "pedals"))


@dataclass(frozen=True)
class Clip:
    """A finished clip.

    id       : its name: 1 to 64 letters, digits, _ or -
    tokens   : int32 [L], prompt and completion
    prompt   : how many of the tokens are the prompt
    notes    : NoteBatch of one piece, as it is played
    vector   : `features`, float64 [F], and the components of an embedding after them
    version  : step of the policy that played it
    components : how many of the vector's numbers, the last, are of an embedding
    """

    id: str
    tokens: np.ndarray
    prompt: int
    notes: NoteBatch
    vector: np.ndarray
    version: int = 0
    components: int = 0

    @staticmethod
    def of(id: str, tokens: np.ndarray, prompt: int, notes: NoteBatch, version: int = 0) -> Clip:
        """A clip with the features of its notes."""
        return Clip(id, np.asarray(tokens, np.int32), prompt, notes, features(notes)[0], version)

    def embedded(self, embedding: ClipEmbedding | None) -> Clip:
        """The same clip with the components of this embedding, or without any."""
        named, found = self.vector[: len(self.vector) - self.components], embedding(self.notes)[0] if embedding else ()
        return replace(self, vector=np.concatenate([named, found]), components=len(found))


class ClipFolder:
    """The clips of a folder, one file each, never written again.

    clips = ClipFolder(out / "clips")
    clips.save(Clip.of("a1", tokens, 5, notes))
    taste = Taste.fit(standing(choices), clips.vectors(choices), standard)
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def path(self, id: str) -> Path:
        """File of a clip; raises UserError for what cannot be the id of one."""
        if not NAME.fullmatch(id):
            raise UserError(f"{id!r} is no id of a clip: it has 1 to 64 letters, digits, _ or -")
        return self.folder / f"{id}{SUFFIX}"

    def ids(self) -> list[str]:
        """Ids of all clips, sorted."""
        return sorted(path.stem for path in self.folder.glob(f"*{SUFFIX}") if NAME.fullmatch(path.stem))

    def save(self, clip: Clip) -> None:
        """Write a clip in one step; raises UserError when the disk is full."""
        path = self.path(clip.id)
        make_folder(self.folder)
        arrays = {f"notes.{name}": np.ascontiguousarray(getattr(clip.notes, name)) for name in _ARRAYS}
        about = {
            "prompt": clip.prompt,
            "version": clip.version,
            "ticks_per_beat": clip.notes.ticks_per_beat,
            "names": _names(len(clip.vector) - clip.components),
            "components": clip.components,
        }
        arrays |= {"tokens": np.asarray(clip.tokens, np.int32), "vector": np.asarray(clip.vector, np.float64)}
        write_atomic(path, save_arrays(arrays, {"clip": json.dumps(about)}))

    def load(self, id: str) -> Clip:
        """Read a clip; raises UserError naming the file when it is missing or damaged.

        Features of another version of fastsmart are taken from the notes anew.
        """
        path = self.path(id)
        try:
            content = read_file(path)
            arrays = load_arrays(content)
            header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
            about = json.loads(header["__metadata__"]["clip"])
            parts: dict[str, Any] = {name: arrays[f"notes.{name}"] for name in _ARRAYS}
            notes = NoteBatch(**parts, ticks_per_beat=int(about["ticks_per_beat"]))
            vector, components = arrays["vector"], int(about.get("components", 0))
            named = len(vector) - components
            if tuple(about["names"]) != _names(named):
                vector = np.concatenate([features(notes)[0], vector[named:]])
            tokens, prompt, version = arrays["tokens"], int(about["prompt"]), int(about["version"])
            return Clip(id, tokens, prompt, notes, vector, version, components)
        except OSError as error:
            raise UserError(f"cannot read the clip {path}: {error.strerror}; put its file back") from error
        except (SafetensorError, ValueError, KeyError, TypeError, IndexError, RecursionError) as error:
            raise UserError(f"{path} is damaged ({error}); remove it and take back the choices about it") from error

    def vectors(self, ids: Iterable[str]) -> dict[str, np.ndarray]:
        """Features [F] of the named clips by their ids."""
        return {id: self.load(id).vector for id in dict.fromkeys(ids)}


def _names(count: int) -> tuple[str, ...]:
    """Names of so many features of this version of fastsmart."""
    return feature_names(count > len(feature_names()))
