"""What the kernel says of processors, and what a library may use of them."""

import platform
import subprocess
from pathlib import Path

import pytest

from fastsmart.machine import hardware

ZEN3 = """\
processor\t: 0
vendor_id\t: AuthenticAMD
cpu family\t: 25
model\t\t: 1
model name\t: AMD EPYC
flags\t\t: fpu sse4_2 avx avx2 fma vaes

processor\t: 1
vendor_id\t: AuthenticAMD
"""
ZEN4 = ZEN3.replace("model\t\t: 1", "model\t\t: 17").replace("vaes", "avx512f avx512_vnni avx512_bf16")
NEOVERSE = """\
processor\t: 0
Features\t: fp asimd asimddp sve i8mm bf16
CPU implementer\t: 0x41
CPU part\t: 0xd40
"""


@pytest.fixture
def cpuinfo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Have the kernel list another processor."""

    def pretend(text: str) -> None:
        (tmp_path / "cpuinfo").write_text(text)
        monkeypatch.setattr(hardware, "CPUINFO", tmp_path / "cpuinfo")
        hardware._cpuinfo.cache_clear()

    yield pretend
    hardware._cpuinfo.cache_clear()


def test_chips_of_one_name_are_told_apart(cpuinfo):
    cpuinfo(ZEN3)
    assert (hardware.cpu_family(), hardware.instruction_sets()) == (
        "AuthenticAMD family 25 model 1",
        ("avx", "avx2", "fma"),
    )
    cpuinfo(ZEN4)
    assert hardware.cpu_family() == "AuthenticAMD family 25 model 17"
    assert hardware.instruction_sets() == ("avx", "avx2", "fma", "avx512f", "avx512_vnni", "avx512_bf16")


def test_processors_other_than_x86_are_named_too(cpuinfo):
    cpuinfo(NEOVERSE)
    assert hardware.cpu_family() == "implementer 0x41 part 0xd40"
    assert hardware.instruction_sets() == ("asimd", "asimddp", "bf16", "i8mm", "sve")
    cpuinfo("")
    assert (hardware.cpu_family(), hardware.instruction_sets()) == (platform.machine(), ())


@pytest.mark.skipif(platform.machine() != "x86_64", reason="lscpu names other processors otherwise")
def test_this_processor_is_what_lscpu_says():
    listed = subprocess.run(["lscpu"], capture_output=True, text=True, check=True, env={"LC_ALL": "C"}).stdout
    said = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in listed.splitlines())}
    assert hardware.cpu_family() == f"{said['Vendor ID']} family {said['CPU family']} model {said['Model']}"
    assert set(hardware.instruction_sets()) <= set(said["Flags"].split())


@pytest.mark.parametrize(
    ("limit", "may"),
    [("", True), ("DEFAULT", True), ("AVX512_CORE_AMX", True), ("AVX512_CORE", False), ("avx2", False), ("AVX", False)],
)
def test_what_holds_onednn_back_holds_8_bit_products_back(monkeypatch, limit, may):
    monkeypatch.delenv("DNNL_MAX_CPU_ISA", raising=False)
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
    assert hardware.onednn_may_use_vnni() is may
    assert hardware.library_limits().get("ONEDNN_MAX_CPU_ISA", "") == limit
