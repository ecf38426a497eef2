"""Settings of the training loop. No torch here, so that reading a config stays instant."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fastsmart.errors import UserError
from fastsmart.limits import LARGEST_SEED, MOST_AT_ONCE, MOST_STEPS, MOST_THREADS, require, require_finite

LIMITS = {
    **dict.fromkeys(("steps", "keep"), (1, MOST_STEPS)),
    **dict.fromkeys(("warmup", "eval_every", "save_every"), (0, MOST_STEPS)),
    **dict.fromkeys(("prompts", "micro_batch", "score_batch", "eval_prompts"), (1, MOST_AT_ONCE)),
    **dict.fromkeys(("iterations", "max_staleness"), (1, 1000)),
    "listen": (0, MOST_AT_ONCE),
    "threads": (0, MOST_THREADS),
    "seed": (0, LARGEST_SEED),
}


@dataclass(frozen=True)
class TrainSettings:
    """The training loop."""

    algorithm: Literal["grpo", "tilt", "dpo", "credit"] = "grpo"
    """How a step learns, with a section of its name: "grpo" = from the advantages of completions it has sampled itself;
    "tilt" = by likelihood of clips weighted by reward; "dpo" = from pairs of better and worse completions; "credit" =
    from what each note changes of the reward to be expected. All but the first sample once a round of many steps
    (docs/algorithms.md)."""
    steps: int = 200
    """Optimizer batches; of "grpo" each samples its own prompts."""
    prompts: int = 8
    """Prompts sampled side by side, of "grpo" those of a step; completions at once = prompts x sampling.group."""
    iterations: int = 1
    """Optimizer steps on each batch of completions."""
    micro_batch: int = 16
    """Completions in one forward and backward pass."""
    pipeline: Literal["off", "overlap", "one-step-off"] = "overlap"
    """Order of the stages: "off" = one stage after the other; "overlap" = clips are rendered and scored while others
    are still being sampled, with the same numbers to the last bit; "one-step-off" = the batch of a step is sampled,
    rendered and scored while the policy learns from the one before."""
    max_staleness: int = 1
    """Staleness allowed one step off: completions drawn by a policy more steps old than this are dropped and drawn
    again."""
    score_batch: int = 16
    """Clips scored in one call, at least one group; the pieces that overlap works with."""
    advantage_scale: Literal["group", "batch", "none"] = "group"
    """Divisor of a centred reward: the standard deviation of its "group" or of the "batch", or "none"."""
    learning_rate: float = 1e-4
    """Learning rate at its peak."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """Course of the learning rate from its peak towards zero."""
    warmup: int = 0
    """Steps in which the learning rate rises to its peak in a straight line."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of AdamW's means of the gradient and of its square."""
    weight_decay: float = 0.0
    """Decay of the weights in AdamW."""
    max_grad_norm: float = 1.0
    """Length to which a longer gradient is scaled down."""
    average: float = 0.0
    """Decay, a step, of an exponential mean of the weights that checkpoints keep; 0 = none."""
    seed: int = 0
    """Seed of the prompts' order and of sampling."""
    eval_every: int = 20
    """Steps between evaluations on prompts of the split "selection" (0 = only before and after)."""
    eval_prompts: int = 64
    """Prompts of each evaluation, one completion each; more than the split has openings begin with these again."""
    save_every: int = 20
    """Steps between checkpoints (0 = only the last)."""
    keep: int = 3
    """Checkpoints kept, beside the one with the best held-out reward."""
    listen: int = 6
    """Held-out prompts written to listen/ as MIDI and WAV, before and after."""
    threads: int = 0
    """CPU threads of torch (0 = OMP_NUM_THREADS of a single rank, or one a core; for a policy on a GPU, one)."""
    writers: tuple[Literal["tensorboard", "wandb"], ...] = ()
    """Services that get the metrics beside metrics.jsonl: "tensorboard", "wandb"."""
    mismatch_limit: float = 0.0
    """Mean exp |log p_trainer - log p_sampler| over tokens above which training does not begin, and a step is warned
    about; 0 = 1.001 in float32, 1.05 in bfloat16."""

    def __post_init__(self) -> None:
        require(self, "train.", LIMITS)
        require_finite(self, "train.", "learning_rate", "max_grad_norm", "weight_decay", "mismatch_limit")
        if self.listen > self.eval_prompts:
            raise UserError(f"train.listen is {self.listen}, more than the {self.eval_prompts} of train.eval_prompts")
        for key in ("learning_rate", "max_grad_norm"):
            if not getattr(self, key) > 0:
                raise UserError(f"train.{key} is {getattr(self, key)}; it must be above 0")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise UserError(f"train.betas are {self.betas}; both must be from 0 to below 1")
        if self.mismatch_limit and not self.mismatch_limit > 1:
            raise UserError(f"train.mismatch_limit is {self.mismatch_limit}; it must be above 1, or 0 for the default")
        if not 0 <= self.average < 1:
            raise UserError(f"train.average is {self.average}; it must be 0 (none) or above, and below 1")
        if not self.weight_decay >= 0:
            raise UserError(f"train.weight_decay is {self.weight_decay}; it must be 0 or above")


@dataclass(frozen=True)
class MergeSettings:
    """Several runs after each other, each tuned from the base, whose changes of weights make one policy."""

    runs: int = 1
    """Runs, each from the base, on prompts of its own; they share the steps before tilt_steps."""
    scale: float = 1.0
    """Factor of the mean change of weights; means of several runs bear more than 1."""
    temperature: float = 1.0
    """Temperature at which the merged policy plays when it is sampled at 1: its last norm is divided by it."""
    tilt_steps: int = 0
    """The last of train.steps, in which the merged policy learns as [tilt] says."""
    tilt_learning_rate: float = 0.0
    """Learning rate of these at its peak; 0 = train.learning_rate."""

    def __post_init__(self) -> None:
        require(self, "merge.", {"runs": (1, 1000), "tilt_steps": (0, MOST_STEPS)})
        require_finite(self, "merge.", "scale", "temperature", "tilt_learning_rate")
        for key in ("scale", "temperature"):
            if not getattr(self, key) > 0:
                raise UserError(f"merge.{key} is {getattr(self, key)}; it must be above 0")
        if not self.tilt_learning_rate >= 0:
            raise UserError(f"merge.tilt_learning_rate is {self.tilt_learning_rate}; it must be 0 or above")
        if self.tilt_learning_rate and not self.tilt_steps:
            raise UserError("merge.tilt_learning_rate is set, and without merge.tilt_steps nothing reads it")

    @property
    def active(self) -> bool:
        """Whether the policy that a run ends with is another than its last step's."""
        return self.runs > 1 or self.scale != 1 or self.temperature != 1 or self.tilt_steps > 0
