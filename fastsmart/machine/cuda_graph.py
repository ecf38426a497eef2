"""CUDA graphs: what a job has the GPU do, recorded once, so that doing it again takes one launch."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch

_ONE_AT_A_TIME = threading.Lock()  # sampler and scorer record in threads of their own


def capture_graph(job: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
    """The graph of a job on the current GPU, and the job's result, whose tensors every replay rewrites.

    The job must wait for nothing, and its inputs must stay where they are. Other threads may use the GPU meanwhile:
    only what this thread does can spoil the recording.
    """
    with _ONE_AT_A_TIME:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # libraries choose their algorithms and Triton compiles before the recording
            job()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            result = job()
    return graph, result
