"""Hardware of this machine: the processor and its instruction sets, memory, how busy it is, and how threads wait."""

from __future__ import annotations

import os
import platform
import sys
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Literal

CPUINFO = Path("/proc/cpuinfo")
# Of the flags the kernel lists, those that the libraries under fastsmart choose their code by, on x86 and on ARM
_FLAGS = (
    *("avx", "avx2", "fma", "avx_vnni", "avx512f", "avx512bw", "avx512vl", "avx512_vnni", "avx512_bf16"),
    *("avx512_fp16", "amx_bf16", "amx_int8", "asimd", "asimddp", "bf16", "i8mm", "sve"),
)
# Variables that hold a library back to a part of what the processor has
LIMITS = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY", "MKL_ENABLE_INSTRUCTIONS")
# What oneDNN may be held back to, in lower case, that has no such instructions; it does not tell upper from lower
_ONEDNN_WITHOUT_AVX2 = ("sse41", "avx")
_ONEDNN_WITHOUT_AVX_VNNI = (*_ONEDNN_WITHOUT_AVX2, "avx2", "avx512_core")
_ONEDNN_WITHOUT_AVX512_VNNI = (*_ONEDNN_WITHOUT_AVX_VNNI, "avx2_vnni", "avx2_vnni_2")
_ONEDNN_WITHOUT_BFLOAT16 = (*_ONEDNN_WITHOUT_AVX512_VNNI, "avx512_core_vnni")

# Turns of a loop in which a thread of GNU OpenMP looks whether work has come, before it sleeps: 0.07 ms of a Xeon's
# pauses. Its own 300,000 are milliseconds, in which a thread that waits holds a core against whoever would work there;
# with 1,000 a step of the demo takes a tenth longer on an idle machine (docs/running.md).
SPIN_COUNT = "6000"
WAITING = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")  # what GNU OpenMP waits by; it reads them when it is loaded, once
_waiting = {"set_by": "nobody"}


def wait_politely() -> None:
    """Have the threads of GNU OpenMP leave their core to others soon after they begin to wait.

    Called by `import fastsmart`, for this process and those it starts. Sets nothing where torch was imported before,
    when it would have no effect, nor where the environment says already how threads wait.
    """
    if any(name in os.environ for name in WAITING):
        _waiting["set_by"] = "environment"
    elif "torch" not in sys.modules:
        os.environ["GOMP_SPINCOUNT"] = SPIN_COUNT
        _waiting["set_by"] = "fastsmart"


def wait_by_watching() -> bool:
    """Leave it to `fastsmart.machine.politeness` how long threads wait: take back what `wait_politely` has set, which
    processes started from here set again. False where somebody else has chosen, or torch is there."""
    if _waiting["set_by"] != "fastsmart" or "torch" in sys.modules:
        return False
    os.environ.pop("GOMP_SPINCOUNT", None)
    _waiting["watched"] = "yes"
    return True


def waiting() -> dict[str, str]:
    """Variables by which threads of GNU OpenMP wait here, and under `set_by` who chose them; `watched`, "yes", where
    they wait as `fastsmart.machine.politeness` says.

    "fastsmart"; "environment", a setting found there; or "nobody", where torch came first and GNU OpenMP waits as it
    does by itself, which is slow beside other processes.
    """
    own = _waiting["set_by"] != "nobody"
    return {name: os.environ[name] for name in WAITING if own and name in os.environ} | _waiting


def compute_threads(local_world: int = 1) -> int:
    """Threads to compute with: OMP_NUM_THREADS where the environment has it, else one for each core.

    Of several ranks on a machine (`local_world`) each takes its own cores: torchrun sets OMP_NUM_THREADS=1 unasked.
    """
    asked = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    if local_world == 1 and asked.isdecimal() and int(asked):
        return int(asked)
    from fastsmart.machine.files import cpu_cores  # `import fastsmart` reads this module, and is instant

    return cpu_cores()


@cache
def _cpuinfo() -> dict[str, str]:
    """Key -> value of the first processor the kernel lists; nothing where there is no list."""
    try:
        first = CPUINFO.read_text(encoding="utf-8").split("\n\n", 1)[0]
    except OSError:
        return {}
    pairs = (line.split(":", 1) for line in first.splitlines() if ":" in line)
    return {key.strip(): value.strip() for key, value in pairs}


def cpu_family() -> str:
    """Vendor, family and model numbers of the processor: chips of one name, as "AMD EPYC", differ in them.

    On ARM implementer and part; the kind of machine where the kernel says neither.
    """
    info = _cpuinfo()
    if "cpu family" in info:
        return f"{info.get('vendor_id', '?')} family {info['cpu family']} model {info.get('model', '?')}"
    if "CPU part" in info:
        return f"implementer {info.get('CPU implementer', '?')} part {info['CPU part']}"
    return platform.machine()


def instruction_sets() -> tuple[str, ...]:
    """The vector instruction sets the processor has, as the kernel names them, that libraries choose their code by."""
    info = _cpuinfo()
    flags = set(info.get("flags", info.get("Features", "")).split())
    return tuple(flag for flag in _FLAGS if flag in flags)


def library_limits() -> dict[str, str]:
    """Variables of the environment that hold a library back to a part of those sets, with their values."""
    return {name: os.environ[name] for name in LIMITS if os.environ.get(name)}


def onednn_8_bit() -> Literal["exact", "saturating", "none"]:
    """How oneDNN sums products of 8-bit integers here, as processor and environment let it.

    "exact" in 32 bits, by AVX-512 VNNI or AVX-VNNI; "saturating", by AVX2 or AVX-512 without: two neighbouring products
    are summed in 16 bits first, and a sum beyond 32,767 is lost.
    """
    sets, limit = instruction_sets(), _onednn_limit()
    if "avx512_vnni" in sets and limit not in _ONEDNN_WITHOUT_AVX512_VNNI:
        return "exact"
    if "avx_vnni" in sets and limit not in _ONEDNN_WITHOUT_AVX_VNNI:
        return "exact"
    return "saturating" if "avx2" in sets and limit not in _ONEDNN_WITHOUT_AVX2 else "none"


def onednn_may_use_bfloat16() -> bool:
    """Whether the environment leaves oneDNN the 16-bit products of AVX-512 BF16 and AMX; says nothing about the
    processor."""
    return _onednn_limit() not in _ONEDNN_WITHOUT_BFLOAT16


def _onednn_limit() -> str:
    return (os.environ.get("ONEDNN_MAX_CPU_ISA") or os.environ.get("DNNL_MAX_CPU_ISA") or "").lower()


def load_average() -> list[float] | None:
    """Processes that ran or waited for a core, on average over the last 1, 5 and 15 minutes; None where unknown."""
    try:
        return [round(value, 2) for value in os.getloadavg()]
    except (OSError, AttributeError):
        return None


def installed_version(*packages: str) -> str | None:
    """Version of the first of these packages that is installed; None where none is."""
    for package in packages:
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return None


def memory_mb() -> tuple[float, float]:
    """Resident and shared memory of this process, MB; zeros where /proc does not say."""
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return tuple(int(lines[key].split()[0]) / 1024 for key in ("VmRSS", "RssShmem"))  # type: ignore[return-value]
    except (OSError, KeyError, ValueError):
        return 0.0, 0.0
