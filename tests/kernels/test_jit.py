"""Which kernel runs where, and what the ahead-of-time compiler says of each."""

import os
import subprocess
import sys
import textwrap

import pytest
import torch

from fastsmart.errors import UserError
from fastsmart.kernels import jit
from fastsmart.kernels.jit import choose_kernel

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def test_auto_is_triton_on_a_gpu_only(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr(jit, "INTERPRETED", False)
    assert [choose_kernel("auto", d) for d in (CPU, GPU)] == ["torch", "triton"]
    assert choose_kernel("triton", GPU) == "triton"
    assert [choose_kernel("torch", d) for d in (CPU, GPU)] == ["torch", "torch"]
    with pytest.raises(UserError, match='kernel "triton" needs the triton package and an NVIDIA GPU, not cpu'):
        choose_kernel("triton", CPU)
    with pytest.raises(UserError, match="one of auto, torch, triton"):
        choose_kernel("cuda", CPU)


def test_the_interpreter_runs_only_when_asked(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr(jit, "INTERPRETED", True)
    assert [choose_kernel(k, CPU) for k in ("auto", "triton")] == ["torch", "triton"]


def test_nothing_needs_triton_on_a_cpu(tmp_path):
    """The imports of sampling and update, and a log-prob, where `import triton` fails."""
    script = textwrap.dedent("""
        import sys
        sys.modules["triton"] = None
        import torch, fastsmart.sampling.native, fastsmart.trainer.update
        from fastsmart.errors import UserError
        from fastsmart.kernels import logprob
        ones = torch.ones(2, 3)
        print(logprob.logprob(ones, ones, torch.zeros(2, dtype=torch.int64)).entropy)
        try:
            logprob.logprob(ones, ones, torch.zeros(2, dtype=torch.int64), kernel="triton")
        except UserError as error:
            print(error)
    """)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-P", "-c", script], capture_output=True, text=True, cwd=tmp_path, env=environment, check=True
    )
    assert "tensor([0.6931, 0.6931])" in run.stdout
    assert 'kernel "triton" needs the triton package' in run.stdout


@pytest.mark.parametrize(
    "architecture",
    [pytest.param("sm_80", marks=pytest.mark.slow), "sm_90", pytest.param("sm_100", marks=pytest.mark.slow)],
)
def test_every_kernel_compiles_without_spills(tmp_path, architecture):
    """By the ptxas of Triton's wheel: those of every kernel file."""
    pytest.importorskip("triton")
    run = subprocess.run(
        [sys.executable, "-P", "-m", "fastsmart.kernels.aot", architecture],
        capture_output=True,
        text=True,
        env=os.environ | {"TRITON_CACHE_DIR": str(tmp_path)},
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    rows = [line.rsplit(maxsplit=4) for line in run.stdout.splitlines()[1:]]
    assert {named for _, named, *_ in rows} == {architecture}
    assert len({name for name, *_ in rows}) >= 8
    for name, _, registers, spills, _ in rows:
        assert 0 < int(registers) <= 255
        assert spills == "0"
        # as launched, with sizes that are multiples of 16; without that knowledge it takes all 255
        assert not name.startswith("attend_next") or int(registers) < 192


def test_what_is_said_of_a_kernels_integers_is_true_of_its_launches(tmp_path):
    """Those named multiples of 16 are integers of the kernel; the number of rows of a log-prob, which differs from one
    micro-batch to the next, compiles nothing anew."""
    pytest.importorskip("triton")
    script = textwrap.dedent("""
        from fastsmart.kernels import aot, logprob_rows
        for shipped in aot.shipped_kernels():
            for name in shipped.aligned:
                assert name in shipped.types and shipped.types[name] == "i32", (shipped.name, name)
        for kernel in (logprob_rows._forward_whole, logprob_rows._backward):
            print([p.name for p in kernel.params if p.do_not_specialize])
    """)
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    run = subprocess.run(
        [sys.executable, "-P", "-c", script], capture_output=True, text=True, cwd=tmp_path, env=environment, check=True
    )
    assert run.stdout.splitlines() == ["['rows']"] * 2


def test_attention_reads_vectors(tmp_path):
    """Keys and values come by asynchronous copies of 16 bytes, as the strides of the encoder's rows allow; taken for
    any strides they would come number by number. Single numbers are the gates of a query, some loads a program."""
    pytest.importorskip("triton")
    script = textwrap.dedent("""
        import dataclasses
        from fastsmart.kernels import aot, attention
        shipped = attention.SHIPPED[0]
        for case in (shipped, dataclasses.replace(shipped, aligned=())):
            for architecture in ("sm_80", "sm_90"):
                ptx = aot.compiled(case, architecture).asm["ptx"]
                vectors = sum("cp.async" in line and "0x10" in line for line in ptx.splitlines())
                print(architecture, vectors, ptx.count("ld.global.b16"))
    """)
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path / "cache")}
    run = subprocess.run(
        [sys.executable, "-P", "-c", script], capture_output=True, text=True, cwd=tmp_path, env=environment, check=True
    )
    counts = [tuple(map(int, line.split()[1:])) for line in run.stdout.splitlines()]
    assert all(vectors >= 8 and single <= 8 for vectors, single in counts[:2]), run.stdout
    assert all(not vectors and single > 100 for vectors, single in counts[2:]), run.stdout


def test_a_kernel_that_spills_fails(tmp_path):
    """16,384 numbers kept by one warp until their sum is known do not fit into its registers."""
    pytest.importorskip("triton")
    (tmp_path / "greedy.py").write_text(
        textwrap.dedent("""
            import sys
            from fastsmart.kernels import aot
            from fastsmart.kernels.jit import Shipped, jit, tl

            @jit
            def greedy(x, BLOCK: tl.constexpr):
                column = tl.arange(0, BLOCK)
                row = tl.load(x + column)
                tl.store(x + column, tl.exp(row - tl.sum(row, axis=0)))

            aot.shipped_kernels = lambda: [Shipped("greedy", greedy, {"x": "*fp32"}, {"BLOCK": 16384}, num_warps=1)]
            sys.exit(aot.main(["sm_90"]))
        """)
    )
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path / "cache"), "TRITON_INTERPRET": "0"}
    run = subprocess.run(
        [sys.executable, str(tmp_path / "greedy.py")], capture_output=True, text=True, env=environment, check=False
    )
    assert run.returncode == 1, run.stdout + run.stderr
