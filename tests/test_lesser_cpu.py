"""On a CPU with AVX2 and nothing above, tests pass as on any other: a part of them, whose outcome hangs on what the
processor can do, is run again as on such a CPU."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import lesser_cpu
import pytest

from fastsmart.machine.hardware import instruction_sets

ROOT = Path(__file__).parents[1]
TESTS = [
    "tests/bench/test_stages.py::test_a_stage_is_measured_beside_its_peers[score]",
    "tests/reward/test_audiobox_reward.py",
    "tests/sampling/test_native.py::test_logprobs_are_those_of_a_full_forward_pass",
    "tests/sampling/test_vllm.py::test_in_bfloat16_the_logprobs_are_those_of_a_float32_head",
    "tests/sampling/test_vllm.py::test_engines_and_syncs_under_other_numbers_of_threads_compute_with_the_weights_they_were_sent",
]


@pytest.mark.timeout(1800)  # about 40 s of a core, on machines that may be busy
@pytest.mark.skipif(platform.machine() != "x86_64", reason="the sets that are taken away are those of x86")
@pytest.mark.skipif("avx512f" not in instruction_sets(), reason="this CPU is such a one: every test here runs on it")
def test_what_hangs_on_the_processor_passes_without_avx_512():
    helpers = os.pathsep.join(str(ROOT / folder) for folder in ("tests/helpers", "bench"))
    environment = os.environ | lesser_cpu.ENVIRONMENT | {"PYTHONPATH": helpers}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "lesser_cpu",
        "-q",
        "--no-header",
        "-p",
        "no:cacheprovider",
        *TESTS,
    ]
    found = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout[-6000:] + found.stderr[-2000:]
    assert "passed" in found.stdout.splitlines()[-1]
