"""Cores of a rank, divided so that ranks, renderer processes and the training thread do not fight for them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from fastsmart.machine.distributed import Ranks

MIN_TO_SPLIT = 4  # cores of a GPU rank from which its training thread gets one of its own


def rank_cores(available: Sequence[int], near: Sequence[Sequence[int]], local_rank: int) -> list[int]:
    """The cores of one of the ranks of a machine.

    available : cores this process may use at all
    near      : for each local rank, the cores near its device (all of them where there is nothing to choose)

    Ranks near the same cores share them evenly, in order. Where there are more ranks than cores, or a rank has none
    near, it may use all that are available.
    """
    mine = sorted(set(near[local_rank]) & set(available))
    sharers = [rank for rank in range(len(near)) if sorted(set(near[rank]) & set(available)) == mine]
    place, count = sharers.index(local_rank), len(sharers)
    share = mine[len(mine) * place // count : len(mine) * (place + 1) // count]
    return share or sorted(available)


def split_cores(cores: Sequence[int], on_gpu: bool) -> tuple[list[int], list[int]]:
    """Cores of the training thread, and of the render workers and helper threads, of one rank.

    A training thread that feeds a GPU gets one core to itself; one that computes needs them all.
    """
    if not on_gpu or len(cores) < MIN_TO_SPLIT:
        return list(cores), list(cores)
    return list(cores[:1]), list(cores[1:])


def bind_cores(ranks: Ranks) -> None:
    """Keep this process, and what it will start, to the cores of its rank."""
    if ranks.local_world == 1 or not hasattr(os, "sched_setaffinity"):
        return
    available = sorted(os.sched_getaffinity(0))
    near = [_cores_near_gpu(rank) or available for rank in range(ranks.local_world)]
    os.sched_setaffinity(0, rank_cores(available, near, ranks.local_rank))


@contextmanager
def separate_helpers(device: torch.device) -> Iterator[Callable[[], None]]:
    """Processes and threads started inside the block get the helpers' cores; afterwards this thread keeps its own.

    Gives a function that puts the thread back on all of them.
    """
    if not hasattr(os, "sched_setaffinity"):
        yield lambda: None
        return
    cores = sorted(os.sched_getaffinity(0))
    training, helpers = split_cores(cores, device.type == "cuda")
    os.sched_setaffinity(0, helpers)
    try:
        yield lambda: os.sched_setaffinity(0, cores)
    finally:
        os.sched_setaffinity(0, training)


def parse_cores(text: str) -> list[int]:
    """The cores of a kernel list such as `0-3,8-11`."""
    cores: list[int] = []
    for part in filter(None, text.strip().split(",")):
        low, _, high = part.partition("-")
        cores += range(int(low), int(high or low) + 1)
    return cores


def _cores_near_gpu(index: int) -> list[int]:
    """Cores on the memory node of a GPU, as the kernel has them; empty where it does not say, or there is no GPU."""
    if index >= torch.cuda.device_count():
        return []
    gpu: Any = torch.cuda.get_device_properties(index)
    address = f"{gpu.pci_domain_id:04x}:{gpu.pci_bus_id:02x}:{gpu.pci_device_id:02x}.0"
    path = Path("/sys/bus/pci/devices") / address / "local_cpulist"
    return parse_cores(path.read_text(encoding="ascii")) if path.exists() else []
