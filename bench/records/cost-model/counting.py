"""What the code does, counted and not timed: operations of its matrix products, bytes that its operators read and
write, and operators, which are kernels on a GPU.

Counted with tensors that have a shape and no content, so that the published sizes cost nothing. Bytes are what moves
when no cache helps and nothing is fused beyond what our kernels fuse; a call of one of these counts as one operator.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from harness import Work
from scaling import GROUP, PROMPT, VOCABULARY, Job
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from fastsmart.kernels import logprob
from fastsmart.policy.transformer import Policy, PolicySize
from fastsmart.reward.audiobox import gpu
from fastsmart.reward.audiobox.architecture import FRAMES, WINDOW, Size, encoder_shapes
from fastsmart.reward.audiobox.encoder import encoder_weights
from fastsmart.sampling import SamplingSettings, cuda_graph_batch, decoder_weights, native, sampler
from fastsmart.tokens.prompts import procedural
from fastsmart.tokens.vocabulary import load_vocabulary
from fastsmart.trainer.micro_batch import MicroBatch
from fastsmart.trainer.update import completion_logprobs

FREE = {"empty", "empty_like", "empty_strided", "new_empty", "_unsafe_view", "lift_fresh", "device", "promote_types"}
FREE |= {"_record_function_enter_new", "_record_function_exit"}  # marks for a profiler

OURS = [(gpu, "gated_attention"), (gpu, "convolution_gelu"), (gpu, "norm_of_sum"), (sampler, "sample_tokens")]
OURS += [
    (cuda_graph_batch, name)
    for name in ("normalised_product", "attend_next", "added_product", "gated_product", "sample_next")
]


class Operators(TorchDispatchMode):
    """The work of each operator that runs under it; views and empty tensors are free."""

    def __init__(self, flops: FlopCounterMode) -> None:
        super().__init__()
        self.flops, self.seen = flops, 0
        self.work: list[Work] = []
        self.inside = False  # one of our kernels

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.split("::")[1]
        returns = [r.alias_info for r in func._schema.returns]
        view = any(alias is not None and not alias.is_write for alias in returns)
        if not view and name not in FREE and not self.inside:
            self.add(name, (args, kwargs, out))
        return out

    def add(self, name: str, tensors: object) -> None:
        done = self.flops.get_total_flops()
        moved = sum(t.numel() * t.element_size() for t in tree_leaves(tensors) if isinstance(t, Tensor))
        self.work.append(Work(name, 1e-9 * (done - self.seen), 1e-9 * moved))
        self.seen = done

    def as_kernel(self, function: Callable) -> Callable:
        """`function`, whose torch twin runs, counted as the one kernel it is on a GPU."""

        def call(*args: Any) -> Any:
            outside, self.inside = self.inside, True
            out = function(*args)
            self.inside = outside
            self.add(function.__name__, (args, out))
            return out

        return call


@contextmanager
def counting() -> Iterator[list[Work]]:
    """The work of what runs in the block, an operator each: on a CPU, but as the path of a GPU."""
    flops = FlopCounterMode(display=False, custom_mapping=CPU_ONLY)
    operators = Operators(flops)
    with ExitStack() as patched:
        for module, name in OURS:
            patched.enter_context(patch.object(module, name, operators.as_kernel(getattr(module, name))))
        patched.enter_context(patch.object(logprob, "CHUNK_ELEMENTS", logprob.GPU_CHUNK_ELEMENTS))
        patched.enter_context(flops)
        patched.enter_context(operators)
        yield operators.work


def _attention(query: Any, key: Any, value: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    return sdpa_flop_count(query, key, value)


def _attention_backward(gradient: Any, query: Any, key: Any, value: Any, *_: Any, out_shape: Any, **__: Any) -> int:
    return sdpa_backward_flop_count(gradient, query, key, value)


# what PyTorch's counter does not know of
CPU_ONLY = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


def make_size(job: Job) -> PolicySize:
    return PolicySize(VOCABULARY, job.width, 4 * job.width, job.layers, job.width // 64, job.width // 64)


def update_work(job: Job, micro_batch: int = 16, dtype: torch.dtype = torch.bfloat16) -> list[Work]:
    """Reference pass, forward and backward pass over all micro-batches; not the loss itself, which is vectors, nor the
    optimizer."""
    rows = min(micro_batch, job.clips)
    with FakeTensorMode():
        policy = Policy(make_size(job), load_vocabulary("smart"))
        ids = torch.zeros(rows, PROMPT + job.tokens - 1, dtype=torch.int64)
        each = torch.zeros(rows * job.tokens, dtype=torch.int64)
        batch = MicroBatch(ids, each, each, each, each, each.float(), each, each)
        with counting() as work:
            with torch.no_grad():
                completion_logprobs(policy, batch, 1.0, dtype, "torch")
            completion_logprobs(policy, batch, 1.0, dtype, "torch").logprob.sum().backward()
    return work * (job.clips // rows)


def audiobox_work(windows: int, dtype: torch.dtype = torch.bfloat16) -> list[Work]:
    """The encoder on whole windows in one batch."""
    with FakeTensorMode():
        weights = encoder_weights({name: torch.empty(shape) for name, shape in encoder_shapes(Size()).items()})
        encoder = gpu.BatchEncoder(weights, torch.device("cpu"), dtype, windows)
        with counting() as work:
            encoder.forward(torch.empty(windows, WINDOW), torch.full((windows,), FRAMES, dtype=torch.int32))
    return work


def sampling_work(job: Job, dtype: torch.dtype = torch.bfloat16, static_cache: bool = False) -> list[Work]:
    """The native sampler, really run, so for small jobs only; `static_cache` as where a step is recorded and
    replayed."""
    vocab = load_vocabulary("smart")
    prompts, settings = (
        procedural(vocab, job.clips // GROUP, seed=0).tokens,
        SamplingSettings(max_tokens=job.tokens, ignore_eos=True),
    )
    with (  # as on a GPU
        patch.object(decoder_weights, "_packing_library", lambda weight: ""),
        patch.object(cuda_graph_batch, "serves", lambda rows, dtype, device: dtype.itemsize == 2),
    ):
        engine = native.NativeEngine(Policy(make_size(job), vocab), dtype=dtype, static_cache=static_cache)
        list(engine.stream(prompts, settings, (0,)))  # makes the cache
    with counting() as work:
        list(engine.stream(prompts, settings, (0,)))
    return work


def decode_kernels(static_cache: bool = True) -> tuple[int, int]:
    """Kernels of a decode step: of a layer, and of all else."""

    def step(layers: int) -> int:
        shorter, longer = (
            len(sampling_work(Job(64, layers, GROUP, tokens), static_cache=static_cache)) for tokens in (8, 9)
        )
        return longer - shorter

    one, two = step(1), step(2)
    return two - one, 2 * one - two
