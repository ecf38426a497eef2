"""Rewards by a text that the music should fit: CLAP (Wu et al. 2023, arXiv 2211.06687) through transformers.

CLAP puts sound and text into one space. The model is any `ClapModel` of a local folder or the hub, such as
`laion/larger_clap_music`, and hears 48 kHz; what was rendered at 16 kHz holds nothing above 8 kHz.

Shape letters: N clips, W windows, P prompts, D width of the common space.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastsmart.audio.resample import resample
from fastsmart.errors import UserError
from fastsmart.reward.base import Clips, Surroundings, heard
from fastsmart.reward.settings import RewardSettings

# Deshmukh et al. 2024 (arXiv 2402.00282), which found that an opposing pair is steadier than one prompt
PAM_PAIRS = (("the sound is clear and clean", "the sound is noisy and with artifacts"),)
_WINDOWS = 8  # in one forward pass


class ClapSimilarity:
    """Cosine between a clip and a text, -1..1; a clip of no length has -1.

    Says how well the clip fits the words among everything CLAP has heard, so differences between piano pieces are
    small; weigh it accordingly, or normalise within groups. Hacked by whatever else the words' sounds have in common.

    model  : folder or hub id of a ClapModel with its tokenizer
    prompt : such as "a calm solo piano piece"
    device : where it runs

    Raises UserError when transformers or the model is missing, or the prompt is empty.
    """

    name = "clap_similarity"
    needs_audio = True

    def __init__(self, model: str | Path, prompt: str, device: str = "cpu") -> None:
        _require_texts([prompt], "reward.clap_prompt")
        self.clap = Clap(model, device)
        self.text = self.clap.text([prompt])

    @classmethod
    def from_settings(cls, settings: RewardSettings, surroundings: Surroundings) -> ClapSimilarity:
        return cls(settings.clap_model, settings.clap_prompt, surroundings.device)

    def __call__(self, clips: Clips) -> np.ndarray:
        return self.clap.score(clips, self.name, lambda audio: (audio @ self.text.T)[:, 0], lowest=-1.0)


class ClapClass:
    """Probability of one class among several by zero-shot classification, 0..1; a clip of no length has 0.

    classes : texts, such as ("classical piano", "jazz piano", "ragtime piano")
    wanted  : the one whose probability is the reward
    model, device : as for `ClapSimilarity`

    Raises UserError when transformers or the model is missing, or `wanted` is not one of at least two classes.
    """

    name = "clap_class"
    needs_audio = True

    def __init__(self, model: str | Path, classes: Sequence[str], wanted: str, device: str = "cpu") -> None:
        _require_texts(classes, "reward.clap_classes")
        if len(set(classes)) < 2 or wanted not in classes:
            raise UserError(f"reward.clap_class is {wanted!r}; it must be one of at least two reward.clap_classes")
        self.clap, self.wanted = Clap(model, device), list(classes).index(wanted)
        self.text = self.clap.text(classes)

    @classmethod
    def from_settings(cls, settings: RewardSettings, surroundings: Surroundings) -> ClapClass:
        return cls(settings.clap_model, settings.clap_classes, settings.clap_class, surroundings.device)

    def __call__(self, clips: Clips) -> np.ndarray:
        def probability(audio: Tensor) -> Tensor:
            return (self.clap.scale * audio @ self.text.T).softmax(-1)[:, self.wanted]

        return self.clap.score(clips, self.name, probability, lowest=0.0)


class Pam:
    """Probability of the better text of opposing pairs, 0..1, their mean; a clip of no length has 0.

    PAM, prompting audio-language models for audio quality (Deshmukh et al. 2024, arXiv 2402.00282). It tells recordings
    with faults from clean ones; every render of one soundfont is about equally clean, so it sees what a policy can
    change only at the margin.

    pairs : (better, worse) texts
    model, device : as for `ClapSimilarity`

    Raises UserError when transformers or the model is missing, or there is no pair.
    """

    name = "pam"
    needs_audio = True

    def __init__(self, model: str | Path, pairs: Sequence[tuple[str, str]] = PAM_PAIRS, device: str = "cpu") -> None:
        texts = [text for pair in pairs for text in pair]
        _require_texts(texts, "reward.pam_pairs")
        self.clap = Clap(model, device)
        self.text = self.clap.text(texts)

    @classmethod
    def from_settings(cls, settings: RewardSettings, surroundings: Surroundings) -> Pam:
        return cls(settings.clap_model, settings.pam_pairs or PAM_PAIRS, surroundings.device)

    def __call__(self, clips: Clips) -> np.ndarray:
        def probability(audio: Tensor) -> Tensor:
            logits = self.clap.scale * audio @ self.text.T
            return logits.unflatten(-1, (-1, 2)).softmax(-1)[..., 0].mean(-1)

        return self.clap.score(clips, self.name, probability, lowest=0.0)


class Clap:
    """A ClapModel that hears clips window by window, without the random crops of its feature extractor.

    scale : what a cosine is multiplied by before a softmax
    """

    def __init__(self, model: str | Path, device: str) -> None:
        if not str(model):
            raise UserError("reward.clap_model names no model; give a folder or hub id such as laion/larger_clap_music")
        try:
            from transformers import AutoTokenizer, ClapFeatureExtractor, ClapModel
        except ImportError as error:
            raise UserError(f"CLAP needs transformers ({error}); pip install 'fastsmart[clap]'") from error
        try:
            self.model = cast(Any, ClapModel).from_pretrained(str(model))
            self.tokenizer = AutoTokenizer.from_pretrained(str(model), trust_remote_code=False)
            self.extractor = ClapFeatureExtractor.from_pretrained(str(model))
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            reason = " ".join(str(error).split()[:30])
            raise UserError(f"cannot load a ClapModel with its tokenizer from {model}: {reason}") from error
        self.device = torch.device(device)
        self.model.to(self.device).eval()
        self.scale = float(self.model.logit_scale_a.detach().exp())

    @torch.inference_mode()
    def text(self, prompts: Sequence[str]) -> Tensor:
        """Texts in the common space, float32 [P, D], each of length 1."""
        tokens = self.tokenizer(list(prompts), padding=True, return_tensors="pt").to(self.device)
        features = self.model.get_text_features(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"])
        return F.normalize(features.pooler_output, dim=-1)

    @torch.inference_mode()
    def score(self, clips: Clips, reward: str, value: Any, lowest: float) -> np.ndarray:
        """`value` of windows [W, D] as float32 [W], averaged over each clip by their length, [N].

        NaN where there is no audio, `lowest` where a clip has no length. Raises UserError when nothing was rendered.
        """
        audio = heard(clips, reward)
        size, rate = int(self.extractor.nb_max_samples), int(self.extractor.sampling_rate)
        scores = np.full(len(audio), lowest, np.float32)
        for i in range(len(audio)):
            samples = audio.clip(i)
            if not np.isfinite(samples).all():
                scores[i] = np.nan
            elif len(samples):
                samples = resample(samples, audio.sample_rate, rate)
                windows = [samples[at : at + size] for at in range(0, len(samples), size)]
                values = [
                    value(self._hear(windows[at : at + _WINDOWS], rate)) for at in range(0, len(windows), _WINDOWS)
                ]
                scores[i] = np.average(torch.cat(values).cpu().numpy(), weights=[len(w) for w in windows])
        return scores

    def _hear(self, windows: Sequence[np.ndarray], rate: int) -> Tensor:
        """Windows no longer than the model's own, in the common space, float32 [W, D], each of length 1."""
        features = self.extractor(list(windows), sampling_rate=rate, return_tensors="pt")
        none_longer = torch.zeros(len(windows), 1, dtype=torch.bool)  # the extractor would draw one at random
        heard_as = self.model.get_audio_features(
            input_features=features["input_features"].float().to(self.device), is_longer=none_longer.to(self.device)
        )
        return F.normalize(heard_as.pooler_output, dim=-1)


def _require_texts(texts: Sequence[str], key: str) -> None:
    if not texts or not all(text.strip() for text in texts):
        raise UserError(f"{key} needs a text, such as 'a calm solo piano piece'")
