"""Whole runs by name, each a plain function returning a config."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from fastsmart.audio.settings import RenderSettings
from fastsmart.config import Config
from fastsmart.credit.settings import CreditSettings
from fastsmart.dpo.settings import DpoSettings
from fastsmart.errors import UserError
from fastsmart.grpo.settings import LossSettings
from fastsmart.policy.settings import PolicySettings
from fastsmart.reward.settings import RewardSettings
from fastsmart.sampling.settings import SamplingSettings
from fastsmart.tilt.settings import TiltSettings
from fastsmart.tokens.settings import PromptSettings
from fastsmart.trainer.settings import MergeSettings, TrainSettings

AUTHORS_POLICY = "lucacasini/metamidipianophi3_4L"
STYLES = ("baroque", "classical", "folk", "hymn", "pop", "ragtime", "romantic")  # of styles-tiny


def demo() -> Config:
    """A few minutes on two CPU cores: the shipped POP909 policy, a blend of formula rewards.

    Consonance is what is learnt; on its own it is hacked within 40 steps by playing ever fewer notes. Presence, variety
    and typicality hold against that, but not against outputs that become alike (docs/diversity.md). Every term
    is logged on its own.
    """
    return Config(
        policy=PolicySettings(source="pop909-tiny"),
        prompts=PromptSettings(
            source="first-note",
            time_signatures=("4/4",),
            tempo_min=60.0,
            tempo_max=150.0,
            pitch_min=38,  # of POP909's first notes nine in ten lie between each two of these limits
            pitch_max=81,
            velocity_min=51,
            velocity_max=115,
            duration_min=0.25,
            duration_max=4.0,
        ),
        sampling=SamplingSettings(group=8, max_tokens=250),
        reward=RewardSettings(
            terms={"consonance": 5.0, "typicality": 1.0, "presence": 3.0, "variety": 1.0}, normalize="none"
        ),
        grpo=LossSettings(beta=0.04),
        train=TrainSettings(steps=40, prompts=8, learning_rate=3e-4, eval_every=10, eval_prompts=64, save_every=10),
    )


def smart_paper() -> Config:
    """The paper's main run (arXiv 2504.16839, section 4): 200 steps, CE, beta 0.04, four-token prompts.

    Needs the authors' policy (hub), Audiobox weights, and the Yamaha-C5-Salamander soundfont as audio.soundfont. What
    differs from the authors' trainer:

    * Sampling is over all tokens; theirs was with top_k 50 while log-probs were over all, which fastsmart refuses.
    * Clips come from the note bank as FluidSynth plays them, not from TinySoundFont (audio.backend = "tinysoundfont"),
      and are peak-normalised after the average to mono, not before.
    * One opening in eight is held out for evaluation and never trained on.
    * Matrix products are in bfloat16 on CUDA, in float32 on a CPU.
    """
    return Config(
        policy=PolicySettings(source=AUTHORS_POLICY, vocabulary="smart"),
        prompts=PromptSettings(source="procedural"),
        sampling=SamplingSettings(group=8, max_tokens=256, temperature=1.0),
        audio=RenderSettings(max_seconds=10.0, tail="cut", normalize="peak", empty="silence"),
        reward=RewardSettings(terms={"audiobox": 1.0}, audiobox_axes={"CE": 1.0}, audiobox_batch=32),
        grpo=LossSettings(loss="bnpo", ratio="one", beta=0.04, kl="k3"),
        train=TrainSettings(
            steps=200,
            prompts=4,
            micro_batch=64,
            learning_rate=1e-4,
            schedule="linear",
            advantage_scale="group",
            seed=0,
            eval_every=0,
            eval_prompts=1000,
            save_every=20,
            keep=10,
            listen=15,
        ),
    )


def smart_released() -> Config:
    """The authors' released script: 64 completions a step, seven-token prompts with a first note, seed 1.

    Its soundfont is MuseScore General, which scores about 1.1 lower in CE than the paper's; there is no evaluation in
    the script, here there is one before and after.
    """
    paper = smart_paper()
    return replace(
        paper,
        prompts=PromptSettings(source="procedural-note"),
        train=replace(paper.train, prompts=8, seed=1, eval_prompts=64, listen=6),
    )


def h200() -> Config:
    """The released script's steps of 64 completions as one NVIDIA H200 likes them: scoring in float16, updates in one
    piece, the next batch drawn while the policy learns (so the loss has a ratio). docs/scaling.md has what to expect.
    The stages were measured on an H100, this preset as a whole was not.

    On several GPUs give each its 64 completions: train.prompts = 8 times their number.
    """
    released = smart_released()
    return replace(
        released,
        reward=replace(released.reward, audiobox_dtype="float16", audiobox_batch=32),
        grpo=replace(released.grpo, ratio="behaviour"),
        train=replace(released.train, pipeline="one-step-off", score_batch=32),
    )


def diverse() -> Config:
    """The demo by credit for single notes: three runs of eight rounds, merged, then tilted towards the most diverse.

    Outputs become better and stay different from each other: docs/diversity.md says how much.
    """
    base = demo()
    return replace(
        base,
        sampling=replace(base.sampling, group=2),
        train=replace(
            base.train,
            algorithm="credit",
            steps=630,
            prompts=128,
            learning_rate=2.5e-4,
            schedule="linear",
            eval_every=0,
            eval_prompts=256,
            save_every=20,
        ),
        credit=CreditSettings(
            prompts=256,
            round_steps=20,
            clips=64,
            window=6,
            alternatives=4,
            strength=6.0,
            neutral=("mean_pitch", "mean_velocity"),
            neutral_share=0.25,
        ),
        merge=MergeSettings(runs=3, scale=1.2, temperature=0.85, tilt_steps=150, tilt_learning_rate=2e-4),
        tilt=TiltSettings(prompts=4096, clips=64, weights="diverse", gain=1.1),
    )


def styles() -> Config:
    """The demo's reward for seven styles, each of which is to keep its voice: `styles-tiny`, asked for each in turn.

    The margin pays a clip for being heard as it was asked for, up to the median real piece of its style; credit for
    single notes, which knows the style, goes far less far from the base than GRPO for the same reward. What three
    seeds gave is in docs/styles.md.
    """
    base = demo()
    return replace(
        base,
        policy=PolicySettings(source="styles-tiny"),
        prompts=replace(base.prompts, styles=STYLES),
        sampling=replace(base.sampling, group=2),
        reward=replace(base.reward, terms={**base.reward.terms, "style_margin": 0.1}),
        train=replace(
            base.train,
            algorithm="credit",
            steps=120,
            prompts=10 * len(STYLES),
            learning_rate=3e-4,
            schedule="linear",
            eval_every=40,
            eval_prompts=70,
            save_every=20,
        ),
        credit=CreditSettings(
            prompts=40 * len(STYLES), round_steps=20, clips=64, window=6, alternatives=4, strength=6.0
        ),
    )


def dpo() -> Config:
    """The demo by DPO-Positive: three rounds of 1,024 completions, small enough for two CPU cores."""
    base = demo()
    return replace(
        base,
        sampling=replace(base.sampling, group=16),
        train=replace(
            base.train, algorithm="dpo", steps=96, learning_rate=5e-5, schedule="constant", eval_every=32, save_every=32
        ),
        dpo=DpoSettings(prompts=64, round_steps=32, pairs=8, keep=0.125),
    )


def notagen_dpo() -> Config:
    """The numbers of NotaGen's CLaMP-DPO (arXiv 2502.18008): three rounds of 112 prompts with 100 completions each, the
    best and the worst ten of them paired, 10,000 steps of one pair, AdamW at 1e-6.

    Policy, prompts and reward are the demo's and to be replaced: the paper's prompts are styles, its reward is the
    likeness to the pieces of the style. It samples with temperature 1.2, top-k 9 and top-p 0.9; fastsmart refuses the
    last two in training, as its log-probs are over the whole vocabulary. The authors' trainer leaves dropout on in the
    reference; here there is none.
    """
    base = dpo()
    return replace(
        base,
        sampling=replace(base.sampling, group=100),
        train=replace(base.train, steps=30_000, prompts=1, learning_rate=1e-6, eval_every=10_000, save_every=1_000),
        dpo=DpoSettings(prompts=112, round_steps=10_000, pairs=1, keep=0.1, beta=0.1, penalty=10.0),
    )


PRESETS: dict[str, Callable[[], Config]] = {
    "demo": demo,
    "smart-paper": smart_paper,
    "smart-released": smart_released,
    "h200": h200,
    "diverse": diverse,
    "styles": styles,
    "dpo": dpo,
    "notagen-dpo": notagen_dpo,
}


def load_preset(name: str) -> Config:
    """The preset of that name; raises UserError naming those there are."""
    if name not in PRESETS:
        raise UserError(f"no preset {name}; there are {', '.join(PRESETS)}")
    return PRESETS[name]()
