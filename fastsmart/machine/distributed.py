"""The processes of a run started by torchrun: one a GPU (or one a share of the cores), all doing the same steps.

Every rank samples, renders and scores its share of the prompts; numbers about all completions are gathered as one
small table, gradients are added up as one flat bucket. Whoever has the same table takes the same decisions, so there
is no barrier. Without torchrun there is one rank, and nothing here costs anything.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta
from uuid import uuid4

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from fastsmart.errors import UserError

TIMEOUT = timedelta(minutes=15)  # a rank that is silent for longer is taken for dead, and torchrun starts all anew


@dataclass(frozen=True)
class Ranks:
    """Place of this process among `world` of them, `local_world` on this machine.

    Rank 0 is the one that writes files and talks to people (`leader`).
    """

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1

    @property
    def leader(self) -> bool:
        return self.rank == 0

    def share(self, total: int, rank: int | None = None) -> range:
        """The part of 0 .. total - 1 that falls to a rank (None = this one): contiguous, in the order of the ranks."""
        rank = self.rank if rank is None else rank
        return range(total * rank // self.world, total * (rank + 1) // self.world)

    def gather(self, rows: np.ndarray, total: int) -> np.ndarray:
        """The rows of all ranks in order, float64 [total, K], from this rank's, [len(share(total)), K]."""
        if self.world == 1:
            return rows
        most = max(len(self.share(total, rank)) for rank in range(self.world))
        padded = torch.zeros(most, rows.shape[1], dtype=torch.float64)
        padded[: len(rows)] = torch.from_numpy(np.ascontiguousarray(rows))
        all_rows = [torch.empty_like(padded) for _ in range(self.world)]
        dist.all_gather(all_rows, padded)
        return np.concatenate([part[: len(self.share(total, rank))].numpy() for rank, part in enumerate(all_rows)])

    def max(self, value: int) -> int:
        """The largest of the ranks' values."""
        return int(self.gather(np.array([[value]], np.float64), self.world).max())

    def broadcast(self, value: int) -> int:
        """Rank 0's value; the others wait until it is there."""
        return int(self.gather(np.array([[value]], np.float64), self.world)[0, 0])

    @torch.no_grad()
    def all_reduce_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Replace every gradient by its sum over the ranks, in one all-reduce of a flat bucket."""
        if self.world == 1:
            return
        gradients = [p.grad for p in parameters if p.grad is not None]
        bucket = torch.cat([g.reshape(-1) for g in gradients])
        dist.all_reduce(bucket)
        parts = bucket.split([g.numel() for g in gradients])
        torch._foreach_copy_(gradients, [part.view_as(g) for part, g in zip(parts, gradients, strict=True)])

    def close(self) -> None:
        """Leave the group."""
        if self.world > 1 and dist.is_initialized():
            dist.destroy_process_group()


def join_ranks() -> Ranks:
    """Join the other processes that torchrun has started, as the environment says; stay alone without torchrun.

    Collectives on GPU tensors go over NCCL, those on CPU tensors over gloo.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Ranks()
    try:
        place = [int(os.environ[key]) for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")]
    except KeyError as error:
        raise UserError(f"WORLD_SIZE is set but {error} is not; start several ranks with torchrun") from error
    ranks = Ranks(*place)
    if torch.cuda.is_available():
        if ranks.local_rank >= torch.cuda.device_count():
            raise UserError(
                f"{ranks.local_world} ranks on a machine with {torch.cuda.device_count()} GPUs; "
                f"use torchrun --nproc-per-node {torch.cuda.device_count()}"
            )
        torch.cuda.set_device(ranks.local_rank)
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        store, rank, world = next(rendezvous("env://", timeout=TIMEOUT))
        store = of_this_attempt(store, rank, world)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=TIMEOUT)
    return ranks


def of_this_attempt(store: dist.Store, rank: int, world: int) -> dist.Store:
    """The part of a store that belongs to the ranks alive now.

    torchrun (2.13) keeps one store from restart to restart: a rank started again would find the addresses of those that
    died and wait for them. How often a rank was restarted does not tell attempts apart, as machines count on their
    own. So each rank writes a random word, rank 0 answers every word it finds with the name of its attempt, and goes on
    when all the others have read that name. A word that a dead rank left is answered too, which does no harm.
    """
    if rank:
        word = uuid4().hex
        store.set(f"rank {rank}", word)
        attempt = store.get(word).decode()  # waits for the answer
        store.add(f"{attempt} arrived", 1)
        return dist.PrefixStore(attempt, store)
    attempt, answered, deadline = uuid4().hex, set[str](), time.monotonic() + TIMEOUT.total_seconds()
    while (arrived := store.add(f"{attempt} arrived", 0)) < world - 1:
        if time.monotonic() > deadline:
            raise TimeoutError(f"{arrived + 1} of {world} ranks came within {TIMEOUT}")
        for key in (f"rank {other}" for other in range(1, world)):
            word = store.get(key).decode() if store.check([key]) else ""
            if word and word not in answered:
                store.set(word, attempt)
                answered.add(word)
        time.sleep(0.01)
    return dist.PrefixStore(attempt, store)
