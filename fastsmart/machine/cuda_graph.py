"""CUDA graphs: what a job has the GPU do, recorded once, so that doing it again takes one launch."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch

_ONE_AT_A_TIME = threading.Lock()  # sampler and scorer record in threads of their own


class GraphCapture:
    """Records the graphs of one consumer, all on one stream and in one pool of memory.

    One stream, since cuBLAS keeps 32 MiB of workspace for each that it meets, and graphs recorded on the same stream
    share it; so each consumer has its own. One pool, since the graphs of a consumer are replayed one after the other:
    they work in the same memory, apart from their results, which stay. Record the largest job first.

    All recordings of a process run in inference mode: PyTorch 2.11 keeps the seed of its generator as an inference
    tensor after the first, which one outside of that mode could not write.
    """

    def __init__(self) -> None:
        self._stream: torch.cuda.Stream | None = None
        self._pool: Any = None

    @torch.inference_mode()
    def __call__(self, job: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
        """The graph of a job on the current GPU, and the job's result, whose tensors every replay rewrites.

        The job must wait for nothing, and its inputs must stay where they are. Other threads may use the GPU meanwhile:
        only what this thread does can spoil the recording.
        """
        with _ONE_AT_A_TIME:
            if self._stream is None:
                self._stream, self._pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()
            here = torch.cuda.current_stream()
            self._stream.wait_stream(here)
            with torch.cuda.stream(self._stream):  # libraries choose their algorithms and Triton compiles beforehand
                job()
            here.wait_stream(self._stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"):
                result = job()
        return graph, result
