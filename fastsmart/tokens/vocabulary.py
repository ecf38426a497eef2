"""The token vocabulary, read from a MidiTok REMI description. Shape letter: V tokens."""

from __future__ import annotations

import json
import re
import tempfile
from dataclasses import dataclass
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastsmart.errors import UserError
from fastsmart.limits import require_name
from fastsmart.machine.files import read_file
from fastsmart.tokens.styles import STYLES_FILE, Styles, read_styles

if TYPE_CHECKING:
    from miditok import REMI

LARGEST_BYTES = 4 * 2**20  # of a MidiTok JSON
LARGEST_NUMBER = 10_000  # of its settings; MIDI's own largest is 8192
TOKENIZER_FILE = "tokenizer.json"  # the name MidiTok gives it, beside a checkpoint
PRESETS = ("smart",)
# Token types the decoder knows; a vocabulary with any other type is refused rather than decoded wrongly.
MUSIC_TYPES = ("Bar", "Position", "Pitch", "Velocity", "Duration", "Tempo", "TimeSig")


@dataclass(frozen=True)
class Vocabulary:
    """A REMI vocabulary: id -> token text such as `Pitch_60`, and the MidiTok JSON it comes from.

    tokens      : V token texts in id order
    description : the MidiTok JSON, as text; written beside every checkpoint so that MidiTok can load it too
    styles      : what the policy of this vocabulary calls some of its tokens; None where it knows no styles
    """

    tokens: tuple[str, ...]
    description: str
    styles: Styles | None = None

    def __len__(self) -> int:
        return len(self.tokens)

    @cached_property
    def _id(self) -> dict[str, int]:
        return {token: i for i, token in enumerate(self.tokens)}

    def id(self, token: str) -> int:
        """The id of a token text; raises UserError when the vocabulary has no such token."""
        try:
            return self._id[token]
        except KeyError:
            kind = token.split("_")[0]
            known = ", ".join(t for t in self.tokens if t.split("_")[0] == kind) or f"no {kind} tokens"
            raise UserError(f"the vocabulary has no token {token}; it has {known}") from None

    def ids_of(self, kind: str) -> list[int]:
        """All ids of one token type (`Pitch`, `Tempo` ...), in id order."""
        return [i for i, token in enumerate(self.tokens) if token.startswith(kind + "_")]

    def values_of(self, kind: str) -> list[str]:
        """Values behind the underscore, of all tokens of one type, in id order."""
        return [self.tokens[i].split("_", 1)[1] for i in self.ids_of(kind)]

    @property
    def pad_id(self) -> int:
        return self.id("PAD_None")

    @property
    def bos_id(self) -> int:
        return self.id("BOS_None")

    @property
    def eos_id(self) -> int:
        return self.id("EOS_None")

    @cached_property
    def style_ids(self) -> list[int]:
        """Ids of the tokens that name styles and composers, in id order; none where there are no styles."""
        return [i for i, token in enumerate(self.tokens) if self.styles and self.styles.name_of(token)]

    @cached_property
    def tokenizer(self) -> REMI:
        """The MidiTok tokenizer of this vocabulary (built once: about a tenth of a second, plus MidiTok's import)."""
        return _tokenizer(self.description)

    def save(self, folder: str | Path) -> None:
        """Write the MidiTok JSON into a checkpoint folder, and styles.json where there are styles."""
        (Path(folder) / TOKENIZER_FILE).write_text(self.description, encoding="utf-8")
        if self.styles:
            self.styles.save(Path(folder))


def load_vocabulary(source: str | Path = "smart") -> Vocabulary:
    """A vocabulary from a preset name, the path of a MidiTok JSON (or a folder holding one), or a hub id.

    A styles.json beside the MidiTok JSON says what styles its tokens name.

    Raises UserError when nothing of that name is found, or it is not a REMI vocabulary that fastsmart can decode.
    """
    require_name(source, "source", "the name of a vocabulary, or a path")
    text, name, beside = _read(source)
    try:
        params = json.loads(text)
        too_large = _too_large(params.get("config")) if isinstance(params, dict) else ""
    except (ValueError, RecursionError) as error:
        raise UserError(f"{name} is not a MidiTok JSON file: {error}") from error
    if not isinstance(params, dict) or not isinstance(params.get("config"), dict):
        raise UserError(f"{name} is not a MidiTok JSON file: it has no 'config' entry")
    if too_large:
        raise UserError(f"{name} asks for a vocabulary beyond reason: {too_large}")
    if params.get("tokenization") != "REMI":
        raise UserError(f"{name} holds a {params.get('tokenization')} tokenizer; fastsmart decodes REMI")
    if params.get("model") is not None or params.get("has_bpe"):
        raise UserError(f"{name} has merged tokens (BPE, Unigram or WordPiece); fastsmart decodes plain REMI")
    try:
        tokens = _tokens(text)
        special = {t.split("_")[0] for t in params["config"].get("special_tokens", [])}
    except Exception as error:  # MidiTok checks little of what it reads, and fails in many ways
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"{name} is not a tokenizer MidiTok can build: {reason}") from error
    unknown = {t.split("_")[0] for t in tokens} - set(MUSIC_TYPES) - special
    missing = {"PAD", "BOS", "EOS", "Bar", "Position", "Pitch", "Velocity", "Duration"} - {
        t.split("_")[0] for t in tokens
    }
    if unknown or missing:
        problem = f"token types {sorted(unknown)} that" if unknown else f"no {sorted(missing)}, which"
        raise UserError(f"{name} has {problem} fastsmart does not support; use plain piano REMI as preset 'smart' does")
    styles = beside / STYLES_FILE if beside else None
    return Vocabulary(tokens, text, read_styles(styles, tokens) if styles and styles.is_file() else None)


def _too_large(config: Any) -> str:
    """The first number or list of a tokenizer's settings that would build tokens for ever; "" where there is none."""
    if isinstance(config, dict):
        for key, part in config.items():
            if any(len(digits) > 4 for digits in re.findall(r"\d+", key)):  # beats are keys, such as 0_4
                return f"{key[:40]} is a key"
            if said := _too_large(part):
                return f"{key[:40]} is {said}"
    if isinstance(config, dict | list) and len(config) > LARGEST_NUMBER:
        return f"a list of {len(config):,}"
    if isinstance(config, list):
        return next((said for part in config if (said := _too_large(part))), "")
    is_number = isinstance(config, int | float)
    return str(config)[:40] if is_number and not abs(config) <= LARGEST_NUMBER else ""


def derived(description: str) -> dict[str, Any] | None:
    """Tokens that MidiTok makes of a preset, stored, as its import takes a second; None for another `description`.

    tokens : texts in id order; decode : the tables of `fastsmart.tokens.decode`
    """
    name = next((name for name in PRESETS if description == _preset(f"{name}.json")), None)
    return json.loads(_preset(f"{name}.derived.json")) if name else None


def _tokens(description: str) -> tuple[str, ...]:
    """The texts of a MidiTok JSON's tokens in id order."""
    if stored := derived(description):
        return tuple(stored["tokens"])
    by_text = _tokenizer(description).vocab
    return tuple(sorted(by_text, key=by_text.__getitem__))


def _tokenizer(description: str) -> REMI:
    from miditok import REMI

    with tempfile.TemporaryDirectory() as folder:  # MidiTok reads its JSON from a file only
        path = Path(folder) / TOKENIZER_FILE
        path.write_text(description, encoding="utf-8")
        return REMI(params=path)


def _preset(name: str) -> str:
    return (resources.files("fastsmart.tokens") / "presets" / name).read_text(encoding="utf-8")


def _read(source: str | Path) -> tuple[str, str, Path | None]:
    """A MidiTok JSON, its name for messages, and the folder it lies in; None for a preset."""
    if str(source) in PRESETS:
        return _preset(f"{source}.json"), f"preset {source}", None
    path = Path(source)
    if path.is_dir():
        path = path / TOKENIZER_FILE
    if path.is_file():
        return read_file(path, LARGEST_BYTES).decode("utf-8", errors="replace"), str(path), path.parent
    if path.parent == Path() or path.is_absolute() or str(source).count("/") != 1 or path.suffix == ".json":
        raise UserError(
            f"no vocabulary {source}: give a preset ({', '.join(PRESETS)}), a MidiTok JSON file or a hub id"
        )
    from fastsmart.machine.hub import fetch

    path = fetch(str(source), TOKENIZER_FILE)
    return read_file(path, LARGEST_BYTES).decode("utf-8", errors="replace"), f"{source}/{TOKENIZER_FILE}", path.parent
