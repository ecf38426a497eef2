"""The benchmark of a step beside other processes, at toy size: each way of waiting is what its process really does."""

import json
import os
import sys

import psutil
import pytest

if sys.platform != "linux":
    pytest.skip("processes are pinned to cores as Linux does it", allow_module_level=True)
import busy

TWO_CORES = pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="threads wait for each other on two cores")


def check(figures, jobs):
    assert list(figures["jobs"]) == jobs
    for job in figures["jobs"].values():
        assert "'watched': 'yes'" in job["waits"]["fastsmart"]
        assert "'fastsmart'" in job["waits"]["fastsmart"]  # nothing was set for it
        assert "'300000'" in job["waits"]["OpenMP's own"]
        for way in (busy.OURS, busy.OWN):
            assert all(seconds > 0 for each in job["step_s"][way].values() for seconds in each)
            assert job["over_idle"][way]["0"] == 1.0
        assert job["own_over_ours"].keys() == {"0", "1"}


@TWO_CORES
def test_a_step_is_timed_idle_and_beside_a_busy_process(tmp_path, monkeypatch):
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")  # of whoever runs the benchmark, not of the ways it compares
    out = tmp_path / "busy.json"
    check(busy.main(["--quick", "--jobs", "score", "--busy", "0", "1", "--rounds", "1", "--out", str(out)]), ["score"])
    written = json.loads(out.read_text())
    assert len(written["load_average_before"]) == 3
    assert written["machine"]["instruction_sets"]
    assert not [child for child in psutil.Process().children() if "while True" in " ".join(child.cmdline())]


def test_busy_processes_compute_and_are_gone_afterwards():
    with busy.burning(2):
        burners = [child for child in psutil.Process().children() if "while True" in " ".join(child.cmdline())]
        cores = sorted(psutil.Process().cpu_affinity())
        assert [burner.cpu_affinity() for burner in burners] == [[cores[-1]], [cores[-2 % len(cores)]]]
        used = [sum(burner.cpu_times()[:2]) for burner in burners]
        while any(sum(burner.cpu_times()[:2]) < before + 0.05 for burner, before in zip(burners, used, strict=True)):
            pass
    assert not any(burner.is_running() for burner in burners)


def test_a_step_that_fails_is_said_in_a_sentence(monkeypatch, tmp_path):
    script = tmp_path / "broken.py"
    script.write_text("print('waits', flush=True)\ninput()\nraise SystemExit(3)")
    monkeypatch.setattr(busy, "__file__", str(script))
    with pytest.raises(busy.UserError, match=r"ended its process \(exit code 3\)"):
        busy.compare("train", {busy.OURS: None, busy.OWN: 300_000}, [0], 1, True)


@pytest.mark.slow
@TWO_CORES
def test_every_job_takes_its_steps():
    check(busy.main(["--quick", "--busy", "0", "1", "--rounds", "1"]), list(busy.JOBS))
