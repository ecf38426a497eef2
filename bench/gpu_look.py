"""What the checks of gpu_first.py share: where they run, how a kernel is timed, and what one line of findings says."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from harness import Ceilings, Work, measured_ceilings, timed
from torch import Tensor

from fastsmart.kernels.jit import INTERPRETED, triton
from fastsmart.machine.cuda_graph import GraphCapture

Finding = dict[str, Any]
Check = Callable[["Look"], Iterator[Finding]]


@dataclass
class Look:
    """Where and how thoroughly the checks look.

    device  : "cuda" or "cpu"
    quick   : toy shapes, one run
    profile : print a table of kernels for decode step, encoder and update
    """

    device: str
    quick: bool = False
    profile: bool = False
    _ceilings: dict[torch.dtype, Ceilings] = field(default_factory=dict)
    _capture: GraphCapture = field(default_factory=GraphCapture)

    @property
    def on_gpu(self) -> bool:
        return self.device != "cpu"

    @property
    def kernel(self) -> str:
        """What is held against the twin: "triton", in its interpreter without a GPU; the twin itself without Triton."""
        return "triton" if triton is not None and (self.on_gpu or INTERPRETED) else "torch"

    def size(self, full: int, quick: int) -> int:
        """One of two sizes."""
        return quick if self.quick else full

    def dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Of a kernel's numbers: float32 without a GPU, where Triton's interpreter cuts off what a GPU rounds."""
        return dtype if self.on_gpu else torch.float32

    def normal(self, *size: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Normal numbers on the device."""
        return torch.randn(size, device=self.device, dtype=dtype)

    def ceilings(self, dtype: torch.dtype = torch.float32) -> Ceilings:
        """What this machine reached in large products of this dtype, and in copies."""
        if dtype not in self._ceilings:
            self._ceilings[dtype] = measured_ceilings(self.device, dtype, runs=self.size(5, 1))
        return self._ceilings[dtype]

    def launched_us(self, job: Callable[[], object], runs: int = 20) -> float:
        """Microseconds of a job as Python launches it, the median of some runs."""
        for _ in range(self.size(3, 0)):
            job()
        return 1e6 * statistics.median(timed(job, self.device) for _ in range(self.size(runs, 1)))

    def replayed_us(self, job: Callable[[], object], times: int = 50) -> float:
        """Microseconds of a job as one of `times` in a CUDA graph: without launches, its numbers in the L2 cache where
        they fit. Without a GPU, as it is called."""
        if not self.on_gpu:
            return self.launched_us(job)
        graph, _ = self._capture(lambda: [job() for _ in range(times)])
        return self.launched_us(graph.replay) / times

    def finding(
        self,
        case: str,
        *,
        us: float | None = None,
        work: Sequence[Work] = (),
        dtype: torch.dtype = torch.float32,
        apart: float | None = None,
        limit: float | None = None,
        **more: Any,
    ) -> Finding:
        """A line: microseconds beside the floor of `work` in `dtype`, and how far from the twin, beside the limit.

        Where the caches of a GPU hold what counts as read from memory, more than the floor is reached.
        """
        line: Finding = {"case": case}
        if us is not None:
            line["us"] = us
        if us is not None and work:
            line["floor_us"] = 1e6 * self.ceilings(dtype).floor_s(work)
            line["share_of_floor"] = line["floor_us"] / us
        if apart is not None:
            line |= {"apart": apart, "limit": limit, "ok": limit is None or apart <= limit}  # NaN is not
        return line | more

    def kernel_table(self, job: Callable[[], object], title: str) -> None:
        """Print which kernels a job spends its time in, on a GPU and where asked for."""
        if not (self.on_gpu and self.profile):
            return
        from torch.profiler import ProfilerActivity
        from torch.profiler import profile as profiled

        with profiled(activities=[ProfilerActivity.CUDA]) as profile:
            job()
            torch.cuda.synchronize()
        table = profile.key_averages().table(sort_by="self_device_time_total", row_limit=20, max_name_column_width=80)
        print(f"--- {title}\n{table}", flush=True)


def apart(found: Tensor, exact: Tensor) -> float:
    """|found - exact| / |exact|, of all numbers as one vector."""
    found, exact = found.detach().double().cpu(), exact.detach().double().cpu()
    return float((found - exact).norm() / exact.norm().clamp_min(1e-300))
