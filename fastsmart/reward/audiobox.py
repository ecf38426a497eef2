"""Meta Audiobox Aesthetics (Tjandra et al. 2025, arXiv 2502.05139) as a reward: how much a listener would enjoy it.

Shape letters: N clips, W windows of ten seconds, T samples.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch

from fastsmart.errors import UserError
from fastsmart.hub import cached, fetch
from fastsmart.reward.base import Clips, heard, unrendered
from fastsmart.reward.settings import AUDIOBOX_AXES

SAMPLE_RATE = 16_000
WINDOW_S = 10
LOWEST = 1.0  # of the scale from 1 to 10 on which people rated every axis
HUB_ID = "facebook/audiobox-aesthetics"
HUB_FILES = ("config.json", "model.safetensors")
MODEL_KEYS = (
    "proj_num_layer",
    "proj_ln",
    "proj_act_fn",
    "proj_dropout",
    "nth_layer",
    "use_weighted_layer_sum",
    "precision",
    "normalize_embed",
    "output_dim",
)


@dataclass(frozen=True)
class Weights:
    """A checkpoint as read: constructor arguments of the model, its tensors, mean and std of every axis."""

    config: dict[str, Any]
    state: dict[str, torch.Tensor]
    target: dict[str, dict[str, float]]


class AudioboxReward:
    """Predicted ratings of enjoyment (CE), usefulness (CU), complexity (PC) and quality (PQ), each 1..10.

    A clip is scored as the package `audiobox_aesthetics` scores it: windows of 10 s, zero-padded and masked,
    predictions brought back to the scale of the raters, and averaged by the real length of the windows. The reward is
    the weighted sum of the axes times `scale`: with CE alone, 0.1..1.0 as in SMART. A clip of no length has the lowest
    rating; silence that was rendered is rated like any sound.

    Hacked by whatever its raters' data did not hold: scores of tuned policies exceed those of recordings people like
    better, the notes get denser and ever more alike, and the soundfont alone moves CE by more than one point. It hears
    loudness, so normalise what it hears; compare scores only under one soundfont.

    checkpoint : `checkpoint.pt`, a safetensors file with `config.json` beside it, the folder of either, or
                 "" or "facebook/audiobox-aesthetics" for the published weights from the hub or its cache
    axes       : weight of every axis that counts
    scale      : what a point on the raters' scale is worth
    batch_size : windows in one forward pass
    device, dtype : where and in what arithmetic; "float32", "bfloat16" or "float16"

    Raises UserError when the package or the weights are missing, broken or of another model.
    """

    name = "audiobox"
    needs_audio = True

    def __init__(
        self,
        checkpoint: str | Path = "",
        axes: Mapping[str, float] | None = None,
        *,
        scale: float = 0.1,
        batch_size: int = 8,
        device: str = "cpu",
        dtype: str = "float32",
    ) -> None:
        self.axes = dict(axes or {"CE": 1.0})
        unknown = sorted(set(self.axes) - set(AUDIOBOX_AXES))
        if unknown:
            raise UserError(f"Audiobox has no axis {unknown[0]!r}; it has {', '.join(AUDIOBOX_AXES)}")
        self.scale, self.batch_size = scale, batch_size
        self.device, self.dtype = torch.device(device), getattr(torch, dtype)
        weights = read_weights(checkpoint)
        self.target = weights.target
        self.model = _build(weights, checkpoint or HUB_ID).to(self.device)
        # upstream's own switch for mixed precision, which its constructor leaves off whatever its config says
        self.model.precision, self.model.enable_autocast = self.dtype, self.dtype != torch.float32

    def __call__(self, clips: Clips) -> np.ndarray:
        ratings = self.rate(clips)
        weighted = np.stack([weight * ratings[axis] for axis, weight in self.axes.items()])
        return (self.scale * weighted.sum(axis=0)).astype(np.float32)

    def rate(self, clips: Clips) -> dict[str, np.ndarray]:
        """All four axes of every clip on the raters' scale, float32 [N] each; NaN where there is no audio.

        Raises UserError when the audio is not at 16 kHz.
        """
        audio = heard(clips, self.name)
        if audio.sample_rate != SAMPLE_RATE:
            raise UserError(f"Audiobox listens at 16000 Hz, these clips are at {audio.sample_rate} Hz; render at 16000")
        size, lost = WINDOW_S * SAMPLE_RATE, unrendered(audio)
        windows = [(i, at) for i in np.flatnonzero(~lost) for at in range(0, int(audio.lengths[i]), size)]
        clip = np.array([i for i, _ in windows], np.int64)
        length = np.array([min(int(audio.lengths[i]) - at, size) for i, at in windows], np.int64)
        rated = np.empty((len(windows), len(AUDIOBOX_AXES)))
        for first in range(0, len(windows), self.batch_size):
            chunk = slice(first, first + self.batch_size)
            samples = np.zeros((len(windows[chunk]), size), np.float32)
            for row, (i, at), taken in zip(samples, windows[chunk], length[chunk], strict=True):
                row[:taken] = audio.samples[i, at : at + taken]
            rated[chunk] = self._forward(samples, length[chunk])
        ratings = {}
        total = np.bincount(clip, length, len(audio))
        for axis, values in zip(AUDIOBOX_AXES, rated.T, strict=True):
            mean = np.bincount(clip, length * values, len(audio)) / np.maximum(total, 1)
            ratings[axis] = np.select([lost, total > 0], [np.nan, mean], LOWEST).astype(np.float32)
        return ratings

    @torch.inference_mode()
    def _forward(self, samples: np.ndarray, length: np.ndarray) -> np.ndarray:
        """Ratings of windows, float64 [W, 4]; samples float32 [W, T], the first `length` [W] of each row real."""
        wav = torch.from_numpy(samples).to(self.device)
        mask = torch.arange(wav.shape[-1], device=self.device) < torch.as_tensor(length, device=self.device)[:, None]
        predicted = self.model({"wav": wav[:, None], "mask": mask[:, None]})
        mean, std = ([self.target[axis][moment] for axis in AUDIOBOX_AXES] for moment in ("mean", "std"))
        stacked = torch.stack([predicted[axis].float() for axis in AUDIOBOX_AXES], dim=1)
        return stacked.cpu().numpy().astype(np.float64) * std + mean


def read_weights(checkpoint: str | Path) -> Weights:
    """Read a checkpoint in either of its published forms; see `AudioboxReward`.

    Raises UserError when it is missing, truncated, not a checkpoint, or holds anything but tensors and plain values.
    """
    if not checkpoint or str(checkpoint) == HUB_ID:
        return _read_safetensors(_from_hub())
    path = Path(checkpoint)
    if path.is_dir():
        inside = [path / "model.safetensors", path / "checkpoint.pt"]
        found = [file for file in inside if file.exists()]
        if not found:
            raise UserError(f"{path} holds neither model.safetensors nor checkpoint.pt; name the folder that does")
        path = found[0]
    if not path.is_file():
        raise UserError(f"no Audiobox weights at {path}; {_how_to_get_them()}")
    return _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)


def cached_checkpoint() -> Path | None:
    """The published weights, if this machine's hub cache holds them."""
    found = [cached(HUB_ID, file) for file in HUB_FILES]
    return found[-1] if all(found) else None


def _read_torch(path: Path) -> Weights:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (UnpicklingError, RuntimeError, EOFError, OSError, ValueError) as error:
        raise UserError(
            f"{path} is not a complete checkpoint of plain tensors (nothing in it was run); {_how_to_get_them()}"
        ) from error
    try:
        state = {re.sub(r"^model\.", "", key): tensor for key, tensor in content["state_dict"].items()}
        config = {key: content["model_cfg"][key] for key in MODEL_KEYS}
        target = content["target_transform"]
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is not an Audiobox checkpoint, it lacks {error}; {_how_to_get_them()}") from error
    return Weights(config, state, _checked_target(target, path))


def _read_safetensors(path: Path) -> Weights:
    import safetensors
    from safetensors.torch import load_file

    beside = path.with_name("config.json")
    try:
        config = json.loads(beside.read_text(encoding="utf-8"))
        target = config.pop("target_transform")
        state = load_file(path)
    except (OSError, ValueError, KeyError, AttributeError, safetensors.SafetensorError) as error:
        raise UserError(f"cannot read Audiobox weights from {path} and {beside.name} beside it ({error})") from error
    return Weights({key: config[key] for key in MODEL_KEYS if key in config}, state, _checked_target(target, path))


def _checked_target(target: Any, path: Path) -> dict[str, dict[str, float]]:
    try:
        return {axis: {key: float(target[axis][key]) for key in ("mean", "std")} for axis in AUDIOBOX_AXES}
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} does not say the mean and std of every axis in target_transform ({error})") from error


def _build(weights: Weights, source: str | Path) -> torch.nn.Module:
    """Upstream's model with these weights, made without touching the random state of the run."""
    try:
        from audiobox_aesthetics.model.aes import AesMultiOutput
    except ImportError as error:
        raise UserError(
            f"the reward audiobox needs a package that is not here ({error}); pip install 'fastsmart[audiobox]', or, "
            f"without its audio dependencies, pip install --no-deps audiobox_aesthetics==0.0.4 huggingface_hub"
        ) from error
    try:
        with torch.random.fork_rng(), warnings.catch_warnings(action="ignore", category=FutureWarning):
            model = AesMultiOutput(**weights.config, target_transform=weights.target)
        model.load_state_dict(weights.state)
    except (RuntimeError, TypeError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split()[:40])
        raise UserError(f"{source} holds the weights of another model than Audiobox Aesthetics: {reason}") from error
    return model.eval()


def _from_hub() -> Path:
    """Path of the published safetensors, from the cache or the network; `config.json` is fetched beside it."""
    try:
        return [fetch(HUB_ID, file) for file in HUB_FILES][-1]
    except UserError as error:
        raise UserError(f"cannot fetch {HUB_ID} from the hub; {_how_to_get_them()}") from error


def _how_to_get_them() -> str:
    return (
        f"download {' and '.join(HUB_FILES)} (or checkpoint.pt) of the hub model {HUB_ID} into one folder and name it "
        f"in reward.audiobox_checkpoint"
    )
