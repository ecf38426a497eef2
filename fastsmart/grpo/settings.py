"""What a run may choose about its loss and its diversity. No torch here, so that reading a config stays instant."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from fastsmart.errors import UserError
from fastsmart.limits import MOST_AT_ONCE

LossName = Literal["grpo", "bnpo", "dr_grpo", "dapo", "gspo", "cispo"]
KlName = Literal["k1", "k2", "k3"]
RatioName = Literal["behaviour", "one"]
MaskLevel = Literal["token", "sequence"]
KernelName = Literal["auto", "torch", "triton"]
Stratum = Literal["key", "register", "dynamics"]
Target = Literal["tilted", "base"]

# A ratio of exp(20) = 5e8 is as broken as an infinite one, but can still be logged.
MAX_LOG_RATIO = 20.0


@dataclass(frozen=True)
class LossSettings:
    """Loss of a step, and how far it may go; the defaults are the SMART paper's (TRL 0.16.1), except that `ratio`
    was "one" there.

    loss : what each token weighs, and where the ratio is clipped
        grpo    : mean over completions of the mean over their tokens (DeepSeekMath, arXiv 2402.03300, eq. 3)
        bnpo    : mean over all tokens of the batch; what TRL 0.16 called grpo
        dapo    : the same sum as bnpo (DAPO, arXiv 2503.14476); its paper sets clip_high to 0.28
        dr_grpo : sum over tokens / (completions × max_tokens), a constant (Dr. GRPO, arXiv 2503.20783)
        gspo    : like grpo, with one ratio a completion, the geometric mean of its tokens' (GSPO, arXiv 2507.18071);
                  its paper clips at 3e-4 and 4e-4
        cispo   : like bnpo, with the clipped ratio as a constant weight on log p, so that clipped tokens keep their
                  gradient (MiniMax-M1, arXiv 2506.13585, eq. 4-5); its paper has no lower bound: clip_low = 1
    clip_low, clip_high : the ratio is clipped to 1 − clip_low … 1 + clip_high
    beta        : weight of the KL term, 0 = none. With k3 alone a weaker pull than the textbook's, whose optimum is
                  reference × exp(reward / beta): on a token that the policy plays more often than the reference, k3
                  pulls with at most beta, where KL(policy ‖ reference) would with beta × log(policy / reference); and
                  per token no estimator sees what a token does to later ones (docs/diversity.md)
    kl          : its estimator, see fastsmart.grpo.kl
    kl_ratio    : multiply the KL by the importance ratio, which gives k1 and k3 the gradient of KL(policy ‖ reference),
                  as k2 has it on-policy without
    kl_clamp    : log(reference / policy) is limited to ± this
    ratio       : "behaviour" = policy / the sampler's log-probs; "one" = policy / itself, value exactly 1, as in a
                  trainer that takes its samples for on-policy (TRL with num_iterations = 1). Masks and mismatch
                  statistics use the sampler's log-probs in either case
    truncate    : cap of the ratio where the clip does not act, that is for negative advantages; tokens beyond it have
                  no gradient (two-sided clipping, INTELLECT-2, arXiv 2505.07291). 0 = no cap; not for cispo
    mask_low, mask_high : tokens whose ratio is outside are taken out of the policy term, their KL stays; 0 = no bound
    mask_level  : "token" tests each token's ratio, "sequence" the geometric mean of the completion's
    entropy_bonus : weight of the mean entropy, with the denominator and token weights of the loss; 0 = none
    max_tokens  : longest completion that can be sampled; only for dr_grpo
    kernel      : what computes log-probs and loss: "torch", "triton", or "auto" = Triton on a GPU that has it

    Raises UserError naming the key when a value makes no sense.
    """

    loss: LossName = "bnpo"
    clip_low: float = 0.2
    clip_high: float = 0.2
    beta: float = 0.04
    kl: KlName = "k3"
    kl_ratio: bool = False
    kl_clamp: float = 20.0
    ratio: RatioName = "behaviour"
    truncate: float = 0.0
    mask_low: float = 0.0
    mask_high: float = 0.0
    mask_level: MaskLevel = "token"
    entropy_bonus: float = 0.0
    max_tokens: int = 0
    kernel: KernelName = "auto"

    def __post_init__(self) -> None:
        names = {"loss": LossName, "kl": KlName, "ratio": RatioName, "mask_level": MaskLevel, "kernel": KernelName}
        for key, name in names.items():
            if getattr(self, key) not in get_args(name):
                raise UserError(f'{key} must be one of {", ".join(get_args(name))}; got "{getattr(self, key)}"')
        rules = [
            ("clip_low", 0.0 < self.clip_low <= 1.0, "must be above 0 and at most 1"),
            ("clip_high", 0.0 < self.clip_high < math.inf, "must be above 0"),
            ("beta", 0.0 <= self.beta < math.inf, "must be 0 or above"),
            ("kl_clamp", 0.0 < self.kl_clamp <= MAX_LOG_RATIO, f"must be above 0 and at most {MAX_LOG_RATIO:g}"),
            ("mask_low", 0.0 <= self.mask_low < 1.0, "must be between 0 and 1"),
            ("mask_high", self.mask_high == 0.0 or 1.0 < self.mask_high < math.inf, "must be 0 (no bound) or above 1"),
            ("truncate", 0.0 <= self.truncate < math.inf, "must be 0 (no cap) or above 1"),
            ("max_tokens", 0 <= self.max_tokens <= MOST_AT_ONCE, f"must be from 0 to {MOST_AT_ONCE:,}"),
            ("entropy_bonus", 0.0 <= self.entropy_bonus < math.inf, "must be 0 or above"),
        ]
        for key, holds, rule in rules:
            if not holds:
                raise UserError(f"{key} {rule}; got {getattr(self, key)}")
        if self.truncate and self.loss == "cispo":
            raise UserError(
                f"truncate does nothing for cispo, which caps at 1 + clip_high; set it to 0, not {self.truncate}"
            )
        if self.truncate and not self.truncate > 1.0 + self.clip_high:
            raise UserError(f"truncate must be 0 (no cap) or above 1 + clip_high; got {self.truncate}")
        if self.loss == "dr_grpo" and self.max_tokens <= 0:
            raise UserError("dr_grpo divides by max_tokens: set it to the longest completion that can be sampled")

    @property
    def per_sequence(self) -> bool:
        """Whether every completion weighs the same, whatever its length."""
        return self.loss in ("grpo", "gspo")


@dataclass(frozen=True)
class DiversitySettings:
    """Parts that hold against the collapse that reward alone brings. With the defaults every part is off.

    Four parts, each by itself or together (docs/diversity.md): advantages within strata, which take the pressure off
    the shares of keys and registers; a witness that pulls the batch towards a diverse target; a controller that chooses
    the weight of the witness so that diversity stays above a floor; and rehearsal of the target's clips.

    Raises UserError naming the key when a value makes no sense.
    """

    stratify: float = 1.0
    """Share of the reward's differences between strata that stays in the advantages; 1 = plain group baseline."""

    strata: tuple[Stratum, ...] = ("key", "register", "dynamics")
    """What clips are compared within: best-fitting diatonic set, third of the base's register, of its loudness."""

    weight: float = 0.0
    """Weight of the witness beside the reward, both in units of the base's spread; where a floor is set, the first."""

    floor: float = 0.0
    """Least share of the base's pairwise diversity to keep, by a controller of the witness's weight; 0 = none. Only
    checkpoints that keep as much on held-out prompts can be the best."""

    target: Target = "tilted"
    """What the witness pulls towards: the most diverse weighting of base clips with more reward, or the base."""

    tilt: float = 1.0
    """Mean reward of the tilted target above the base's, in its standard deviations."""

    gate: float = 0.5
    """Quantile of the base's reward below which a clip earns nothing for being rare."""

    rehearse: int = 0
    """Clips of the target whose likelihood each step raises beside the policy loss; 0 = none."""

    rehearse_weight: float = 0.3
    """Weight of their mean negative log-likelihood, nats a token, beside the policy loss."""

    style_kl: float = 0.0
    """Nats a completion that the outputs of each of `prompts.styles` may be from the base's, by a controller for each:
    of the weight that its divergence has in the advantages. 0 = any. Needs no calibration."""

    clips: int = 1024
    """Outputs of the base policy that calibration samples before the first step."""

    def __post_init__(self) -> None:
        for name in self.strata:
            if name not in get_args(Stratum):
                raise UserError(f"strata has {name!r}; choose of {', '.join(get_args(Stratum))}")
        rules = [
            ("stratify", 0.0 <= self.stratify <= 1.0, "must be from 0 to 1"),
            ("weight", 0.0 <= self.weight < math.inf, "must be 0 or above"),
            ("floor", 0.0 <= self.floor < 1.0, "must be 0 (none) or below 1"),
            ("tilt", 0.0 <= self.tilt < math.inf, "must be 0 or above"),
            ("gate", 0.0 <= self.gate < 1.0, "must be from 0 to below 1"),
            ("rehearse", self.rehearse >= 0, "must be 0 (none) or above"),
            ("rehearse_weight", 0.0 <= self.rehearse_weight < math.inf, "must be 0 or above"),
            ("style_kl", 0.0 <= self.style_kl < math.inf, "must be 0 (any) or above"),
            ("clips", self.clips >= 64, "must be at least 64"),
        ]
        for key, holds, rule in rules:
            if not holds:
                raise UserError(f"{key} {rule}; got {getattr(self, key)}")
        if self.target not in get_args(Target):
            raise UserError(f"target must be one of {', '.join(get_args(Target))}; got {self.target!r}")

    @property
    def pulls(self) -> bool:
        """Whether there is a witness."""
        return self.weight > 0 or self.floor > 0

    @property
    def active(self) -> bool:
        """Whether any part is on."""
        return self.pulls or self.stratify < 1 or self.rehearse > 0
