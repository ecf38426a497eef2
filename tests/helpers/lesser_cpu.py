"""A pytest plugin, and the environment it needs, that show the tests a CPU with AVX2 and nothing above.

`pytest -p lesser_cpu` in a process with ENVIRONMENT in its own: oneDNN, MKL and ATen read these. Whoever asks PyTorch
what the processor itself has (vLLM, for its own kernels) is answered here.
"""

from __future__ import annotations

ENVIRONMENT = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}


def pytest_configure() -> None:
    import torch

    assert torch.backends.cpu.get_cpu_capability() == "AVX2", f"set {ENVIRONMENT} before torch is imported"
    for name in dir(torch.cpu):
        if name.startswith(("_is_avx512_", "_is_amx_", "_is_vnni_")):
            setattr(torch.cpu, name, lambda: False)
