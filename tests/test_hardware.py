"""What the kernel says of processors, and what a library may use of them."""

import ast
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from fastsmart.machine import hardware

ROOT = Path(__file__).parents[1]

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


def openmp_says(code: str, **environment: str) -> str:
    """What GNU OpenMP prints of its settings when it is loaded, in a process without any but those given."""
    clean = {name: value for name, value in os.environ.items() if name not in hardware.WAITING}
    environment = clean | {"OMP_DISPLAY_ENV": "verbose"} | environment
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    return done.stdout + done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="torch computes with another OpenMP there")
def test_threads_wait_as_fastsmart_says_unless_the_user_or_torch_was_first():
    """By GNU OpenMP's own word, not ours."""
    show = "print(fastsmart.machine.hardware.waiting())"
    said = openmp_says(f"import fastsmart, torch; {show}")
    assert "GOMP_SPINCOUNT = '6000'" in said
    assert "{'GOMP_SPINCOUNT': '6000', 'set_by': 'fastsmart'}" in said
    said = openmp_says(f"import fastsmart, torch; {show}", OMP_WAIT_POLICY="active")
    assert "OMP_WAIT_POLICY = 'ACTIVE'" in said
    assert "{'OMP_WAIT_POLICY': 'active', 'set_by': 'environment'}" in said
    said = openmp_says(f"import torch, fastsmart; {show}; import os; print(os.environ.get('GOMP_SPINCOUNT'))")
    assert "GOMP_SPINCOUNT = '6000'" not in said
    assert "{'set_by': 'nobody'}\nNone" in said


@pytest.mark.parametrize("script", sorted((ROOT / "bench").glob("*.py")), ids=lambda path: path.stem)
def test_benchmarks_see_to_how_threads_wait_before_whatever_loads_torch(script):
    tree = ast.parse(script.read_text(encoding="utf-8"))
    names = [
        name.split(".")[0]
        for node in tree.body
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in ([node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names])
    ]
    foreign = [name for name in names if name not in sys.stdlib_module_names]
    if script.stem in ("gpu_first", "gpu_suite"):  # run where fastsmart is not installed; what they start imports it
        assert "fastsmart" not in foreign
    elif any(isinstance(node, ast.If) and "__main__" in ast.unparse(node.test) for node in tree.body):
        assert foreign[0] == "as_commands"


ALDER_LAKE = ZEN3.replace("vaes", "avx_vnni")
SAPPHIRE_RAPIDS = ZEN3.replace("vaes", "avx_vnni avx512f avx512_vnni")
SKYLAKE_X = ZEN3.replace("vaes", "avx512f")


@pytest.mark.parametrize(
    ("processor", "limit", "products"),
    [
        (ZEN4, "", "exact"),
        (ZEN4, "DEFAULT", "exact"),
        (ZEN4, "AVX512_CORE_AMX", "exact"),
        (ZEN4, "AVX512_CORE", "saturating"),
        (ZEN4, "avx2_vnni", "saturating"),  # the processor has no such instructions on 256 bits
        (ALDER_LAKE, "", "exact"),
        (ALDER_LAKE, "AVX2_VNNI", "exact"),
        (SAPPHIRE_RAPIDS, "AVX2_VNNI_2", "exact"),
        (SAPPHIRE_RAPIDS, "AVX512_CORE", "saturating"),
        (ALDER_LAKE, "avx2", "saturating"),
        (SKYLAKE_X, "", "saturating"),
        (ZEN3, "", "saturating"),
        (ZEN3, "AVX", "none"),
        (NEOVERSE, "", "none"),
    ],
)
def test_processor_and_environment_say_how_8_bit_products_are_summed(cpuinfo, monkeypatch, processor, limit, products):
    cpuinfo(processor)
    monkeypatch.delenv("DNNL_MAX_CPU_ISA", raising=False)
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
    assert hardware.onednn_8_bit() == products
    assert hardware.library_limits().get("ONEDNN_MAX_CPU_ISA", "") == limit


@pytest.mark.parametrize(
    ("said", "ranks", "threads"),
    [
        ("3", 1, 3),
        ("3,2", 1, 3),  # OpenMP's list for nested regions
        ("", 1, 5),
        ("0", 1, 5),
        ("many", 1, 5),
        ("1", 2, 5),  # as torchrun sets it without being asked
    ],
)
def test_threads_are_as_many_as_the_environment_says(
    said: str, ranks: int, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", said)
    monkeypatch.setattr("fastsmart.machine.files.cpu_cores", lambda: 5)
    assert hardware.compute_threads(ranks) == threads
