"""Streams of a GPU, one each for sampler, scorer and trainer, and CUDA graphs: a job recorded once and replayed."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

_ONE_AT_A_TIME = threading.Lock()  # sampler and scorer record in threads of their own


class OwnStream:
    """Stream of a GPU that one of these works on, so that sampler, scorer and trainer run side by side.

        own = OwnStream(device, urgent=True)
        with own.in_turn():  # the trainer's weights are read when it has made them, and changed when they are read
            weights.copy_(policy)
        with own.on():  # while the trainer does what it likes
            sample()

    PyTorch's default stream, on which all else happens, neither waits for such a stream nor is waited for. Without a
    GPU nothing of this does anything.

    stream : None without a GPU
    urgent : whether its kernels go before those of other streams that are ready too
    """

    def __init__(self, device: torch.device, urgent: bool = False) -> None:
        self.stream = torch.cuda.Stream(device, priority=-1 if urgent else 0) if device.type == "cuda" else None

    def on(self) -> AbstractContextManager[Any]:
        """Inside the block, what this thread has the GPU do goes to this stream."""
        return torch.cuda.stream(self.stream) if self.stream else nullcontext()

    @contextmanager
    def in_turn(self) -> Iterator[None]:
        """The same, after all that the thread's stream outside of the block has been given; it waits for the block."""
        outside = torch.cuda.current_stream() if self.stream else None
        if self.stream and outside:
            self.stream.wait_stream(outside)
        with self.on():
            yield
        if self.stream and outside:
            outside.wait_stream(self.stream)


class GraphCapture:
    """Records the graphs of one consumer, all on one stream and in one pool of memory.

    stream : the consumer's, whose priority the recorded kernels keep; None = one of the recorder's own

    One stream, since cuBLAS keeps 32 MiB of workspace for each that it meets, and graphs recorded on the same stream
    share it; so each consumer has its own. One pool, since the graphs of a consumer are replayed one after the other:
    they work in the same memory, apart from their results, which stay. Record the largest job first.

    All recordings of a process run in inference mode: PyTorch 2.11 keeps the seed of its generator as an inference
    tensor after the first, which one outside of that mode could not write.
    """

    def __init__(self, stream: torch.cuda.Stream | None = None) -> None:
        self._stream = stream
        self._pool: Any = None

    @torch.inference_mode()
    def __call__(self, job: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
        """The graph of a job on the current GPU, and the job's result, whose tensors every replay rewrites.

        The job must wait for nothing, and its inputs must stay where they are. Other threads may use the GPU meanwhile:
        only what this thread does can spoil the recording.
        """
        with _ONE_AT_A_TIME:
            self._stream = self._stream or torch.cuda.Stream()
            self._pool = self._pool or torch.cuda.graph_pool_handle()
            here = torch.cuda.current_stream()
            self._stream.wait_stream(here)
            with torch.cuda.stream(self._stream):  # libraries choose their algorithms and Triton compiles beforehand
                job()
            here.wait_stream(self._stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"):
                result = job()
        return graph, result
