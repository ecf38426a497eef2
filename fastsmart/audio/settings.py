"""`RenderSettings`: everything that decides how notes become sound, checked when it is made."""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd

from fastsmart.errors import UserError
from fastsmart.machine.files import cpu_cores

SYNTH_HZ = 48000
MOST_PHASES = 5
LONGEST_BANK_S = 60
EMPTY_S = 1.0  # the paper's length of a score without notes


@dataclass(frozen=True)
class RenderSettings:
    """Settings of rendering; all but the last three change the audio, hence the reward.

    Raises UserError naming the key (`audio.tail` …) when a value cannot be used.
    """

    soundfont: str = ""
    """Path of an SF2 or SF3 file; "" = `FASTSMART_SOUNDFONT`, else the first one installed."""
    backend: str = "bank"
    """Renderer: "bank" mixes stored notes (see `fastsmart.audio.bank`), "fluidsynth" is the reference, "tinysoundfont"
    the paper's (an optional package)."""
    bank: str = "stored"
    """What a bank holds: "stored" keeps each note once and lets it fall by a formula, "exact" has FluidSynth render
    every length of every note, and keeps those for the next time."""
    sample_rate: int = 16000
    """Samples a second, 8000-96000; rewards listen at 16000."""
    max_seconds: float = 10.0
    """Seconds at which a score is cut; notes still sounding end there."""
    tail: str = "cut"
    """End of a clip: "cut" ends it with its score, as the paper does; "release" lets the last notes fade."""
    release_s: float = 3.0
    """Seconds that tail = "release" adds at most; the silence after the fade is trimmed."""
    normalize: str = "peak"
    """Level: "peak" divides each clip by max|x| + 1e-6 (the paper does so too, but before it averages the two channels
    to mono); "loudness" brings it to -23 LUFS; "none" keeps the synth's level."""
    empty: str = "silence"
    """Sound of a score without notes: 1 s of zeros ("silence", the paper) or unscorable NaN ("nan")."""
    reverb: bool = False
    chorus: bool = False
    """Effects of backend "fluidsynth"; off, because with them a note is no longer the same wherever it stands."""
    program: int = 0
    """General MIDI program of bank 0, 0-127; 0 is the piano."""
    workers: int = 0
    """Processes of the pool; 0 = one a core."""
    clip_timeout_s: float = 60.0
    """Seconds after which a clip is taken to hang: its worker is replaced and the clip tried once more."""
    mixdown: str = "auto"
    """Place where stored notes become clips in training: "cpu", the pool; "gpu", that of the policy, so that the audio
    is where the scorer is; "auto", there if there is one and the other settings allow it."""

    def __post_init__(self) -> None:
        for key, allowed in _CHOICES.items():
            value = getattr(self, key)
            if value not in allowed:
                raise UserError(f"audio.{key} = {value!r} is not known; choose {' or '.join(map(repr, allowed))}")
        for key, (low, high) in _RANGES.items():
            value = getattr(self, key)
            whole = key in _WHOLE
            number = isinstance(value, int) if whole else isinstance(value, int | float)
            if isinstance(value, bool) or not number or not low <= value <= high:
                kind = "a whole number" if whole else "a number"
                raise UserError(f"audio.{key} = {value!r} must be {kind} from {low:g} to {high:g}")
        for key in ("reverb", "chorus"):
            if not isinstance(getattr(self, key), bool):
                raise UserError(f"audio.{key} = {getattr(self, key)!r} must be true or false")
            if getattr(self, key) and self.backend != "fluidsynth":
                raise UserError(f"audio.{key} needs audio.backend = 'fluidsynth': {self.backend} renders dry")
        if self.backend == "bank":
            self._check_bank()
        if self.mixdown == "gpu" and not self.mixes_on_gpu:
            raise UserError(
                "audio.mixdown = 'gpu' needs audio.backend = 'bank', audio.bank = 'stored', audio.tail = 'cut' and "
                "audio.normalize = 'peak' or 'none'"
            )

    def _check_bank(self) -> None:
        # with more phases a note would have to be stored too often; all usual rates have one, three or five
        if self.sample_rate > SYNTH_HZ or SYNTH_HZ // gcd(64 * self.sample_rate, SYNTH_HZ) > MOST_PHASES:
            raise UserError(
                f"audio.sample_rate = {self.sample_rate} is no rate of the note bank: choose 8000, 11025, 12000, "
                "16000, 22050, 24000, 32000, 44100 or 48000, or audio.backend = 'fluidsynth'"
            )
        if self.max_samples > LONGEST_BANK_S * self.sample_rate:
            raise UserError(
                f"audio.max_seconds = {self.max_seconds:g} is longer than the notes of a bank, {LONGEST_BANK_S} s with "
                "the release: choose audio.backend = 'fluidsynth'"
            )

    @property
    def mixes_on_gpu(self) -> bool:
        """Whether a GPU can mix such clips: what a note does after its end, and loudness, only the CPU computes."""
        return (self.backend, self.bank, self.tail) == ("bank", "stored", "cut") and self.normalize != "loudness"

    @property
    def synth_rate(self) -> int:
        """Hz at which a synth plays: 48000, the rate of the paper's pipeline, resampled to `sample_rate` afterwards."""
        return max(SYNTH_HZ, self.sample_rate)

    @property
    def max_samples(self) -> int:
        """Samples of the longest clip these settings can give."""
        seconds = self.max_seconds + (self.release_s if self.tail == "release" else 0.0)
        return max(1, round(seconds * self.sample_rate))

    @property
    def empty_samples(self) -> int:
        """Samples of a clip whose score has no notes, or that could not be rendered."""
        return min(round(EMPTY_S * self.sample_rate), self.max_samples)

    @property
    def worker_count(self) -> int:
        """Processes of the pool: `workers`, or the cores this process may run on."""
        if self.workers:
            return self.workers
        return cpu_cores()


_CHOICES = {
    "backend": ("bank", "fluidsynth", "tinysoundfont"),
    "bank": ("stored", "exact"),
    "tail": ("cut", "release"),
    "normalize": ("peak", "loudness", "none"),
    "empty": ("silence", "nan"),
    "mixdown": ("auto", "cpu", "gpu"),
}
_WHOLE = ("sample_rate", "program", "workers")
_RANGES = {  # the rates are FluidSynth's own limits
    "sample_rate": (8000, 96000),
    "max_seconds": (0.01, 3600.0),
    "release_s": (0.0, 60.0),
    "program": (0, 127),
    "workers": (0, 1024),
    "clip_timeout_s": (0.1, 86400.0),
}
