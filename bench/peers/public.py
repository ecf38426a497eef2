"""The public pipeline, as the authors of SMART put it together from packages that anybody installs; all of it serial.

TRL's GRPOTrainer with transformers' generate; MidiTok decodes; symusic writes each score to a temporary MIDI file;
tinysoundfont's Synth and Sequencer play it, 48 kHz stereo, after four seconds played into the void; the
audiobox_aesthetics predictor scores all clips of the step. Their own settings: groups of 8, learning rate 1e-4,
KL 0.04, one iteration. The stages are functions and small classes, to be measured one by one too.

What it takes over from TRL 1.16 as its users get it, where that costs time: gradient checkpointing (on: a second
forward pass within the update), loss "dapo" with a KL term corrected by the ratio, entropies for the log, one forward
pass for the whole batch. What is not as its users get it, in its favour or so that both sides do the same work:
* float32 on both sides, not TRL's mixed bf16
* full vocabulary, TRL's present default (the authors' runs had its older one, 50 tokens)
* no token ends a piece: EOS is one that the policy does not have
* a score is played up to 10 s only; the authors' script plays it to its end and cuts the sound
* clips are scored ten at a time, as the predictor's own command line does; the authors' script scores the whole step at
  once, where a single tensor behind the first convolution takes 2 GB
* torchaudio, which the predictor wants for resampling, has no build that goes with every torch: where it is missing,
  a stand-in convolves with the same filter

Shape letters: N completions, T samples.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything is local; read when the libraries are imported

import numpy as np
import symusic
import tinysoundfont
import torch
import torch.nn.functional as F
from datasets import Dataset
from greenlet import getcurrent, greenlet
from miditok import REMI
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, PrinterCallback, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from fastsmart.audio.resample import _filters
from fastsmart.tokens.vocabulary import Vocabulary, load_vocabulary

SYNTH_HZ, FLUSH_S, MOST_S = 48_000, 4, 10
SCORED_AT_ONCE = 10
NEVER = "EOS_Never"  # a token beyond the policy's own
STAGES = ("sample", "decode", "render", "score", "update")

Seconds = defaultdict[str, float]  # by stage
Reward = Callable[[Sequence[Sequence[int]]], list[float]]  # prompts with their completions, N -> N


@contextmanager
def clock(seconds: Seconds, stage: str) -> Iterator[None]:
    """Add the time spent inside the block to a stage."""
    start = time.perf_counter()
    yield
    seconds[stage] += time.perf_counter() - start


def decode_midi(tokenizer: REMI, ids: Sequence[int]) -> symusic.Score:
    """A prompt and its completion, Python ints, as a score, by MidiTok."""
    return tokenizer.decode([list(ids)])


class Synth:
    """tinysoundfont with a soundfont, SF2 or SF3, loaded once for all clips."""

    def __init__(self, soundfont: str | Path) -> None:
        self.synth = tinysoundfont.Synth(samplerate=SYNTH_HZ)
        self.synth.sfload(str(soundfont))

    def render_clip(self, score: symusic.Score) -> np.ndarray:
        """The first ten seconds of a score, float32 [2, T] at 48 kHz, divided by their peak; one second of silence for
        an empty one."""
        length = round(min(score.to("second").end(), MOST_S) * SYNTH_HZ)
        self.synth.notes_off()
        self.synth.sounds_off()
        self.synth.generate(FLUSH_S * SYNTH_HZ)
        with tempfile.NamedTemporaryFile(suffix=".mid") as file:
            score.dump_midi(file.name)
            tinysoundfont.Sequencer(self.synth).midi_load(file.name)
            played = np.frombuffer(bytes(self.synth.generate(length)), np.float32)
        stereo = np.stack([played[::2], played[1::2]]) if length else np.zeros((2, SYNTH_HZ), np.float32)
        return stereo / (np.abs(stereo).max() + 1e-6)


class Aesthetics:
    """The predictor of audiobox_aesthetics with the weights of a local `checkpoint.pt`."""

    def __init__(self, checkpoint: str | Path) -> None:
        self.predictor = _predictor_module().initialize_predictor(str(checkpoint))

    def score_clips(self, clips: Sequence[np.ndarray], at_once: int = SCORED_AT_ONCE) -> list[float]:
        """Content enjoyment over ten of clips float32 [2, T] at 48 kHz."""
        batch = [{"path": torch.from_numpy(clip), "sample_rate": SYNTH_HZ} for clip in clips]
        rated: list[dict[str, float]] = []
        for start in range(0, len(batch), at_once):
            rated += self.predictor.forward(batch[start : start + at_once])
        return [axes["CE"] / 10 for axes in rated]


def _predictor_module() -> ModuleType:
    """audiobox_aesthetics.infer, which imports torchaudio to resample."""
    missing = importlib.util.find_spec("torchaudio") is None
    if missing:
        sys.modules["torchaudio"] = ModuleType("torchaudio")
        sys.modules["torchaudio"].functional = SimpleNamespace(resample=_resample)  # type: ignore[attr-defined]
    try:
        import audiobox_aesthetics.infer as module
    finally:
        if missing:
            del sys.modules["torchaudio"]
    return module


def _resample(wav: torch.Tensor, orig_freq: int, new_freq: int) -> torch.Tensor:
    """torchaudio.functional.resample of wav [C, T], whole ratios only: one strided convolution with its filter."""
    if orig_freq == new_freq:
        return wav
    taps, lead = _filters(orig_freq, new_freq)
    step = orig_freq // new_freq
    assert step * new_freq == orig_freq, "the public pipeline goes from 48 kHz to 16 kHz"
    padded = F.pad(wav[:, None], (lead, lead + step))
    return F.conv1d(padded, torch.from_numpy(taps)[:, None], stride=step)[:, 0, : -(-wav.shape[-1] // step)]


def public_reward(soundfont: str | Path, audiobox: str | Path, tokenizer: REMI, seconds: Seconds) -> Reward:
    """The authors' reward: one stage after the other, each over all completions; the time of each goes to `seconds`."""
    synth, aesthetics = Synth(soundfont), Aesthetics(audiobox)

    def reward(pieces: Sequence[Sequence[int]]) -> list[float]:
        with clock(seconds, "decode"):
            scores = [decode_midi(tokenizer, ids) for ids in pieces]
        with clock(seconds, "render"):
            clips = [synth.render_clip(score) for score in scores]
        with clock(seconds, "score"):
            return aesthetics.score_clips(clips)

    return reward


def text_tokenizer(vocab: Vocabulary) -> PreTrainedTokenizerFast:
    """What TRL takes for a tokenizer: words are token texts, and a last one is the EOS that no policy draws."""
    words = {token: i for i, token in enumerate([*vocab.tokens, NEVER])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token=vocab.tokens[vocab.pad_id]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=vocab.tokens[vocab.pad_id], eos_token=NEVER)


class PublicTrainer:
    """TRL's trainer on a Phi-3 checkpoint, one step at a time, so that others can take turns with it.

    checkpoint : folder with config.json, model.safetensors and MidiTok's tokenizer.json; also the reference policy
    prompts    : token ids, those of a step after those of the other, steps x N / group of them
    steps      : that will be taken
    reward     : may count its stages in `seconds`, which has those of the step under way
    completions : ids that are taken for drawn, the same in every step, to measure the update alone; None = generate
    options    : of GRPOConfig

    `trainer.train()` runs in a coroutine of the same thread, so that all contenders share one team of OpenMP helpers;
    it waits wherever a step begins until `step` lets it go on. Call `close`.
    """

    def __init__(
        self,
        checkpoint: str | Path,
        prompts: Sequence[Sequence[int]],
        steps: int,
        reward: Reward,
        seconds: Seconds,
        *,
        group: int = 8,
        max_tokens: int = 256,
        completions: Sequence[Sequence[int]] | None = None,
        **options: Any,
    ) -> None:
        vocab, self.seconds = load_vocabulary(checkpoint), seconds
        tokenizer = text_tokenizer(vocab)
        model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
        model.generation_config.eos_token_id = tokenizer.eos_token_id
        rows = [{"prompt": " ".join(vocab.tokens[i] for i in ids), "ids": [int(i) for i in ids]} for ids in prompts]

        def reward_of(completion_ids: list[list[int]], ids: list[list[int]], **_: object) -> list[float]:
            return reward([[*prompt, *completion] for prompt, completion in zip(ids, completion_ids, strict=True)])

        def rollout(texts: list[str], trainer: GRPOTrainer) -> dict[str, Any]:
            return {"prompt_ids": tokenizer(texts)["input_ids"], "completion_ids": completions, "logprobs": None}

        self._folder = tempfile.TemporaryDirectory()
        arguments: dict[str, Any] = {
            "output_dir": self._folder.name,
            "use_cpu": not torch.cuda.is_available(),
            "bf16": False,
            "learning_rate": 1e-4,
            "beta": 0.04,
            "num_generations": group,
            "per_device_train_batch_size": len(prompts) // steps * group,
            "max_completion_length": max_tokens,
            "max_steps": steps,
            "shuffle_dataset": False,
            "save_strategy": "no",
            "report_to": [],
            "disable_tqdm": True,
        }
        self.trainer = _TimedTrainer(
            model,
            reward_of,
            args=GRPOConfig(**arguments | options),
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            rollout_func=None if completions is None else rollout,
            callbacks=[_Turns(self)],
        )
        self.trainer.seconds = seconds
        self.trainer.remove_callback(PrinterCallback)
        self.closed = False
        self.error: BaseException | None = None
        self.outside = getcurrent()
        self._training = greenlet(self._train)
        self._go_on()

    def _train(self) -> None:
        try:
            self.trainer.train()
        except BaseException as error:  # raised by `step`; on closing, a SystemExit of `_Turns`
            self.error = error

    def _go_on(self) -> None:
        """Until the next step begins, or training ends."""
        self.outside = getcurrent()
        self._training.switch()
        if self.error:
            raise self.error

    def step(self) -> dict[str, float]:
        """One step of training; seconds of sample, of what the reward counts, of update (all the rest), and whole."""
        self.seconds.clear()
        start = time.perf_counter()
        self._go_on()
        whole = time.perf_counter() - start
        return {**self.seconds, "update": whole - sum(self.seconds.values()), "whole": whole}

    def close(self) -> None:
        """End training, where it waits."""
        self.closed = True
        if not self._training.dead:
            self._training.switch()
        self._folder.cleanup()


class _TimedTrainer(GRPOTrainer):
    seconds: Seconds

    def _generate_single_turn(self, *arguments: Any, **options: Any) -> Any:
        with clock(self.seconds, "sample"):
            return super()._generate_single_turn(*arguments, **options)


class _Turns(TrainerCallback):
    """Stops training where a step begins, when all of the step before has been done, its log included."""

    def __init__(self, turns: PublicTrainer) -> None:
        self.turns = turns

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.turns.outside.switch()
        if self.turns.closed:
            raise SystemExit
