"""Passes of a policy over micro-batches on a GPU: 16-bit products, and recorded as CUDA graphs where shapes repeat.

A step of the paper's policy in four micro-batches launches 1,808 kernels, which takes a processor 68 ms and an H100 a
quarter of that to work off; replayed they follow one another in 1.2 µs.

Shape letters: N completions and T tokens of a shape, B <= N completions of a micro-batch, M completion tokens of it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.profiler import record_function

from fastsmart.grpo.fused import fused_policy_loss
from fastsmart.grpo.losses import LossStats
from fastsmart.grpo.settings import LossSettings
from fastsmart.kernels.jit import choose_kernel
from fastsmart.kernels.logprob import LogProb, logprob
from fastsmart.machine.cuda_graph import GraphCapture
from fastsmart.policy.cast import CastPolicy
from fastsmart.policy.transformer import Policy
from fastsmart.trainer.batch import MicroBatch

MOST_SHAPES = 8  # recorded for a policy
WASTE = 1.25  # a recorded shape is used for a micro-batch of at least one part in so many of its tokens
STEP = 8  # recorded lengths are multiples of it: rows of 16 bytes in every dtype


@dataclass
class Shape:
    """The inputs of recorded passes of N completions of at most T tokens, which stay where they are.

    rows      : int64 [N, T]; what is beside a micro-batch's own tokens may be any id
    targets   : int64 [N T], the id that each place predicts, where it is a completion's
    sampler_logprobs, reference : float32 [N T]
    begins, ends : int64 [N], of each completion in [N T]
    advantage : float32 [N]
    denominator : float64 scalar
    graphs    : what has been recorded, by what it computes
    """

    rows: Tensor
    targets: Tensor
    sampler_logprobs: Tensor
    reference: Tensor
    begins: Tensor
    ends: Tensor
    advantage: Tensor
    denominator: Tensor
    graphs: dict[Any, tuple[Callable[[], None], Any]] = field(default_factory=dict)

    @staticmethod
    def of(completions: int, tokens: int, device: torch.device) -> Shape:
        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        places = completions * tokens
        return Shape(
            rows=zeros(completions, tokens),
            targets=zeros(places),
            sampler_logprobs=zeros(places, dtype=torch.float32),
            reference=zeros(places, dtype=torch.float32),
            begins=zeros(completions),
            ends=zeros(completions),
            advantage=zeros(completions, dtype=torch.float32),
            denominator=torch.ones((), dtype=torch.float64, device=device),
        )

    def take(self, batch: MicroBatch) -> Tensor:
        """Put a micro-batch in; gives the place in [N T] of each of its completion tokens, int64 [M]."""
        completions, tokens = batch.rows.shape
        wider = self.rows.shape[1] - tokens
        places = batch.gather_index + wider * batch.sequence if wider else batch.gather_index
        self.rows[:completions, :tokens] = batch.rows
        self.targets.index_copy_(0, places, batch.ids)
        self.sampler_logprobs.index_copy_(0, places, batch.sampler_logprobs)
        if completions < len(self.begins):
            self.begins.zero_()
            self.ends.zero_()
        begins = batch.begins + wider * torch.arange(completions, device=batch.begins.device)
        self.begins[:completions] = begins
        self.ends[:completions] = begins + batch.offsets.diff()
        return places


class RecordedPasses:
    """Log-probs and gradients of a policy over micro-batches, by kernels that are replayed where a shape comes again.

    The first micro-batch of a shape is recorded, which takes about as long as two of them launched; a later one that
    is not much smaller is put into the same shape, padded. Beyond `MOST_SHAPES`, micro-batches are launched.

    record : how a job is recorded: it gives what replays it, and the job's result, which replays write anew
    """

    def __init__(
        self,
        policy: Policy,
        dtype: torch.dtype,
        temperature: float,
        kernel: str = "auto",
        record: Callable[[Callable[[], Any]], tuple[Any, Any]] | None = None,
    ) -> None:
        self.cast = CastPolicy(policy, dtype, kernel)
        self.temperature, self.kernel = temperature, kernel
        self.shapes: list[Shape] = []
        self._record = record or _recorder()

    def logprobs(self, batch: MicroBatch) -> Tensor:
        """Log-prob [M] of every completion token of a micro-batch."""
        shape = self._shape(batch)
        places = shape.take(batch)
        with record_function("reference"):
            found = self._run(shape, "logprobs", lambda: self._forward(shape, with_gradient=False).logprob)
        return found.index_select(0, places)

    def add_gradients(
        self,
        batch: MicroBatch,
        ref_logprob: Tensor,
        advantage: Tensor,
        settings: LossSettings,
        denominator: float,
        alone: bool = False,
    ) -> LossStats:
        """Add the gradient of a micro-batch's share of the loss to what the policy's parameters hold.

        ref_logprob [M] and advantage [B] as for `policy_loss`; gives the statistics. `alone`: nothing else is added
        before the optimizer's step, so that the gradients need not outlive the next call.
        """
        shape = self._shape(batch)
        places = shape.take(batch)
        shape.reference.index_copy_(0, places, ref_logprob)
        shape.advantage[: len(advantage)] = advantage
        shape.denominator.fill_(denominator)
        with record_function("forward"):
            gradients, sums, peaks = self._run(shape, settings, lambda: self._both_passes(shape, settings))
        add_to_gradients(list(self.cast.policy.parameters()), gradients, copy=not alone)
        return LossStats(sums.clone(), peaks.clone())

    def _shape(self, batch: MicroBatch) -> Shape:
        """The shape that this micro-batch takes: the smallest recorded one that wastes little, else one of its own."""
        if not self.cast.refresh():
            self.shapes.clear()
        completions, tokens = batch.rows.shape
        wide = min(-(-tokens // STEP) * STEP, self.cast.policy.size.max_positions)
        fitting = [
            shape
            for shape in self.shapes
            if shape.rows.shape[0] >= completions
            and shape.rows.shape[1] >= tokens
            and shape.rows.numel() <= WASTE * completions * wide
        ]
        if fitting:
            return min(fitting, key=lambda shape: shape.rows.numel())
        shape = Shape.of(completions, wide, batch.rows.device)
        if len(self.shapes) < MOST_SHAPES:
            self.shapes.append(shape)
        return shape

    def _run(self, shape: Shape, key: Any, job: Callable[[], Any]) -> Any:
        if not any(shape is known for known in self.shapes):
            return job()
        if key not in shape.graphs:
            graph, result = self._record(_outside_inference_mode(job))
            shape.graphs[key] = graph.replay, result
        replay, result = shape.graphs[key]
        replay()
        return result

    def _forward(self, shape: Shape, with_gradient: bool = True) -> LogProb:
        with torch.set_grad_enabled(with_gradient):
            hidden = self.cast.hidden(shape.rows).flatten(0, 1)
            return logprob(hidden, self.cast.policy.lm_head.weight, shape.targets, self.temperature, self.kernel)

    def _both_passes(self, shape: Shape, settings: LossSettings) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
        """Gradients of all parameters, and the sums and peaks of `LossStats`."""
        ours = self._forward(shape)
        loss, stats = fused_policy_loss(
            ours.logprob,
            shape.sampler_logprobs,
            shape.reference,
            shape.advantage,
            shape.begins,
            settings,
            shape.denominator,
            ours.entropy if settings.entropy_bonus else ours.entropy.detach(),
            shape.ends,
        )
        with torch.autograd.set_multithreading_enabled(False):  # the thread that records
            gradients = torch.autograd.grad(loss, list(self.cast.policy.parameters()))
        return gradients, stats.sums, stats.peaks


def passes_of(policy: Policy, dtype: torch.dtype, temperature: float, kernel: str = "auto") -> RecordedPasses:
    """The passes of a policy, the same ones as long as it lives."""
    known = _PASSES.setdefault(policy, {})
    kernel = choose_kernel(kernel, policy.device)
    key = dtype, temperature, kernel
    if key not in known:
        known[key] = RecordedPasses(policy, dtype, temperature, kernel)
    return known[key]


def add_to_gradients(parameters: list[torch.nn.Parameter], gradients: tuple[Tensor, ...], copy: bool = True) -> None:
    """Add to each parameter's gradient; where there is none, it becomes the one that is given, or a copy of it."""
    held = [(p.grad, g) for p, g in zip(parameters, gradients, strict=True) if p.grad is not None]
    if held:
        torch._foreach_add_([old for old, _ in held], [new for _, new in held])
    fresh = [(p, g) for p, g in zip(parameters, gradients, strict=True) if p.grad is None]
    given = [gradient for _, gradient in fresh]
    if fresh and copy:
        copies = [torch.empty_like(gradient) for gradient in given]
        torch._foreach_copy_(copies, given)
        given = copies
    for (parameter, _), gradient in zip(fresh, given, strict=True):
        parameter.grad = gradient


def _outside_inference_mode(job: Callable[[], Any]) -> Callable[[], Any]:
    """Recordings are made in inference mode, in which there are no gradients."""

    def outside() -> Any:
        with torch.inference_mode(False), torch.enable_grad():
            return job()

    return outside


def _recorder() -> GraphCapture:
    """One for the process: its graphs are replayed by the trainer, one after the other."""
    if not _RECORDER:
        _RECORDER.append(GraphCapture())
    return _RECORDER[0]


_PASSES: weakref.WeakKeyDictionary[Policy, dict[Any, RecordedPasses]] = weakref.WeakKeyDictionary()
_RECORDER: list[GraphCapture] = []
