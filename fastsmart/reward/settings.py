"""The `reward` section of a run's configuration."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from fastsmart.errors import UserError
from fastsmart.reward.registry import require_known

AUDIOBOX_AXES = ("CE", "CU", "PC", "PQ")
AUDIOBOX_DTYPES = ("float32", "bfloat16", "float16", "int8", "auto")
CLAMP_WRITERS = ("note_on", "note_off")


TONICS = {"C": 0, "D": 2, "E": 4, "F": 5, "G": 7, "A": 9, "B": 11}
ACCIDENTALS = {"": 0, "#": 1, "b": -1}


def parsed_key(text: str) -> tuple[int, bool]:
    """Pitch class of the tonic, and whether it is minor, of a key such as "F# minor"; raises UserError for another."""
    tonic, _, mode = text.strip().partition(" ")
    letter, accidental = tonic[:1].upper(), tonic[1:]
    if letter not in TONICS or accidental not in ACCIDENTALS or mode not in ("major", "minor"):
        raise UserError(f'key is {text!r}; write it as "C major", "F# minor" or "Bb major"')
    return (TONICS[letter] + ACCIDENTALS[accidental]) % 12, mode == "minor"


@dataclass(frozen=True)
class ConstraintSettings:
    """Demands of the reward `constraint`; with the defaults there are none.

    Raises UserError naming the key that is wrong.
    """

    key: str = ""
    """Key in which a clip must be, such as "C major" or "F# minor"; "" = any."""
    key_share: float = 0.9
    """Least share of its notes in the scale of that key (of minor, with the natural and the raised seventh)."""
    metre: str = ""
    """Time signature of all its bars, such as "3/4"; "" = any."""
    lowest: int = 0
    highest: int = 127
    """MIDI numbers of the lowest and highest note allowed."""
    least_density: float = 0.0
    most_density: float = 0.0
    """Notes a second; 0 = no limit."""
    voices: int = 0
    """Most notes that may sound together; 0 = no limit."""
    cadence: bool = False
    """Whether it must end on its tonic triad, the tonic in the bass, after a bass on dominant, subdominant or leading
    tone."""

    def __post_init__(self) -> None:
        if self.key:
            parsed_key(self.key)
        if not 0 < self.key_share <= 1:
            raise UserError(f"key_share is {self.key_share}; it must be above 0 and at most 1")
        if self.metre and not re.fullmatch(r"[1-9][0-9]?/(1|2|4|8|16|32)", self.metre):
            raise UserError(f'metre is {self.metre!r}; write it as "3/4"')
        if not 0 <= self.lowest <= self.highest <= 127:
            raise UserError(f"lowest {self.lowest} and highest {self.highest} must be MIDI numbers, 0 to 127, in order")
        least, most = self.least_density, self.most_density
        if not (0 <= least < math.inf and 0 <= most < math.inf) or (most and most < least):
            raise UserError(f"least_density {least} and most_density {most} must be 0 or above, the least first")
        if not 0 <= self.voices <= 128:
            raise UserError(f"voices is {self.voices}; it must be 0 (no limit) to 128")


@dataclass(frozen=True)
class RewardSettings:
    """Rewards that a run computes, and how they become one number.

    Raises UserError naming the key that is wrong.
    """

    terms: Mapping[str, float] = field(default_factory=dict)
    """Weight of every reward by name; weight 0 = computed and logged, not trained on."""
    normalize: Literal["none", "group"] = "none"
    """Form of the training signal: "none" = weighted sum of the terms as they are; "group" = each term first centred
    and divided by its standard deviation within its group."""
    typicality: str = ""
    """Statistics of real pieces for `typicality` and `presence`; "" = those beside the base model."""
    typicality_ceiling: bool = False
    """Whether a clip more typical than the median real one earns no more than that."""
    style_judge: str = ""
    """Judge of styles for `style_margin`; "" = the one beside the base model."""
    audiobox_checkpoint: str = ""
    """`checkpoint.pt`, a safetensors file or its folder; "" = the published one from the hub; "random" = weights that
    mean nothing, to try things out."""
    audiobox_axes: Mapping[str, float] = field(default_factory=lambda: {"CE": 1.0})
    """Weight of every Audiobox axis: CE enjoyment, CU usefulness, PC complexity, PQ quality."""
    audiobox_batch: int = 8
    """Ten-second windows scored at once on a GPU."""
    audiobox_dtype: Literal["float32", "bfloat16", "float16", "int8", "auto"] = "float32"
    """Arithmetic of its forward pass; "int8" on a CPU only; "auto" = the fastest that ranks clips as float32 does:
    float16 on a GPU, bfloat16 on a CPU with AMX or AVX-512 BF16, else float32."""
    clap_model: str = ""
    """Folder or hub id of the ClapModel of `clap_similarity`, `clap_class` and `pam`."""
    clap_prompt: str = ""
    """Text that `clap_similarity` compares with."""
    clap_classes: tuple[str, ...] = ()
    """Texts that `clap_class` chooses among."""
    clap_class: str = ""
    """Text of `clap_classes` that is wanted."""
    pam_pairs: tuple[tuple[str, str], ...] = ()
    """Pairs of (better, worse) texts of `pam`; none = the paper's pair."""
    clamp_checkpoint: str = ""
    """The published file of M3, CLaMP 2 or CLaMP 3 that `clamp_style`, `clamp_score` and `clamp_text` read notes with;
    "m3", "clamp2", "clamp3" = that file from the hub; "random" = weights that mean nothing, to try things out."""
    clamp_styles: str = ""
    """Real styles of `clamp_style` and `clamp_score`: the file that `fastsmart style-stats` made."""
    clamp_style: str = ""
    """The style of that file that is wanted, unless a clip's prompt asked for one."""
    clamp_others: Literal["mean", "max"] = "mean"
    """What `clamp_style` takes off: the mean likeness to the other styles, or the largest."""
    clamp_ceiling: bool = False
    """Whether a clip more like its style than the median real one earns no more than that in `clamp_style`."""
    clamp_prompt: str = ""
    """Text that `clamp_text` compares with."""
    clamp_text_model: str = "FacebookAI/xlm-roberta-base"
    """Folder or hub id of configuration and tokenizer of CLaMP's encoder of text; the checkpoint has its weights."""
    clamp_writer: Literal["note_on", "note_off"] = "note_on"
    """How `clamp_text` writes the end of a note: as a note_on of velocity 0, or as a note_off."""
    taste: str = ""
    """File of the taste that `taste` scores by, as `fastsmart live` writes it."""
    taste_caution: float = 1.0
    """Standard deviations of its uncertainty that `taste` takes off a clip's expected utility."""
    constraint: ConstraintSettings = field(default_factory=ConstraintSettings)
    """Settings that only `constraint` reads."""

    def __post_init__(self) -> None:
        for name, weight in self.terms.items():
            require_known(name, f"reward.terms.{name}: ")
            if not _is_weight(weight):
                raise UserError(
                    f"reward.terms.{name} is {weight!r}; a weight is a number from 0 up (an empty clip has the lowest "
                    f"value of every reward and would be the best under a negative weight)"
                )
        if self.normalize not in ("none", "group"):
            raise UserError(f'reward.normalize is {self.normalize!r}; it is "none" or "group"')
        for axis, weight in self.audiobox_axes.items():
            if axis not in AUDIOBOX_AXES:
                raise UserError(f"reward.audiobox_axes.{axis}: Audiobox has the axes {', '.join(AUDIOBOX_AXES)}")
            if not _is_weight(weight):
                raise UserError(f"reward.audiobox_axes.{axis} is {weight!r}; a weight is a number from 0 up")
        if not any(self.audiobox_axes.values()):
            raise UserError("reward.audiobox_axes weighs no axis; give one of them a weight above 0")
        if not isinstance(self.audiobox_batch, int) or not 1 <= self.audiobox_batch <= 4096:
            raise UserError(f"reward.audiobox_batch is {self.audiobox_batch!r}; it is a whole number from 1 to 4096")
        if not (isinstance(self.taste_caution, int | float) and 0 <= self.taste_caution <= 100):
            raise UserError(f"reward.taste_caution is {self.taste_caution!r}; it is a number from 0 to 100")
        if self.audiobox_dtype not in AUDIOBOX_DTYPES:
            known = ", ".join(AUDIOBOX_DTYPES)
            raise UserError(f"reward.audiobox_dtype is {self.audiobox_dtype!r}; it is one of {known}")
        if self.clamp_others not in ("mean", "max"):
            raise UserError(f'reward.clamp_others is {self.clamp_others!r}; it is "mean" or "max"')
        if self.clamp_writer not in CLAMP_WRITERS:
            raise UserError(f'reward.clamp_writer is {self.clamp_writer!r}; it is "note_on" or "note_off"')


def _is_weight(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value >= 0
