"""One writer a folder: the second is refused by name, and a dead one stands in nobody's way."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fastsmart.config import Config
from fastsmart.errors import UserError
from fastsmart.machine import folder_lock
from fastsmart.machine.distributed import Ranks
from fastsmart.machine.folder_lock import LOCK_FILE, FolderLock
from fastsmart.run.folder import RunFolder

HOLD = """
import sys, time, subprocess
from pathlib import Path
from fastsmart.machine.folder_lock import FolderLock
lock = FolderLock(Path(sys.argv[1]), "training")
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])  # outlives its parent
print(child.pid, flush=True)
time.sleep(60)
"""


def test_a_second_writer_is_refused_by_the_name_of_the_first_and_comes_in_after_it(tmp_path):
    with FolderLock(tmp_path, "training"):
        here = f"process {os.getpid()} on host {socket.gethostname()} is training in {tmp_path}"
        with pytest.raises(UserError) as caught:
            FolderLock(tmp_path, "training", patience_s=30.0)  # alive on this machine: no use in waiting
        assert str(caught.value).startswith(here)
        assert "choose another --out" in str(caught.value)
    assert not list(tmp_path.iterdir())
    with FolderLock(tmp_path, "training"):
        pass


def test_the_lock_of_a_killed_process_is_gone_though_its_children_live(tmp_path):
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        child = int(process.stdout.readline())
        try:
            with pytest.raises(UserError, match=f"process {process.pid} on host .* is training"):
                FolderLock(tmp_path, "training")
            process.send_signal(signal.SIGKILL)
            process.wait()
            os.kill(child, 0)
            assert (tmp_path / LOCK_FILE).exists()  # left behind, and held by nobody
            FolderLock(tmp_path, "training").release()
        finally:
            os.kill(child, signal.SIGKILL)


def held_by(path: Path, **holder: object) -> int:
    """A lock as another machine holds it."""
    handle = os.open(path / LOCK_FILE, os.O_RDWR | os.O_CREAT)
    fcntl.flock(handle, fcntl.LOCK_EX)
    os.write(handle, json.dumps(holder).encode())
    return handle


def test_a_holder_on_another_machine_is_waited_for_as_long_as_a_dead_ones_lock_can_last(tmp_path, capsys):
    handle = held_by(tmp_path, host="elsewhere", pid=7, doing="training")
    begun = time.monotonic()
    with pytest.raises(UserError, match="process 7 on host elsewhere is training"):
        FolderLock(tmp_path, "training", patience_s=0.3)
    assert time.monotonic() - begun >= 0.3
    assert "or has died; waiting" in capsys.readouterr().err
    os.close(handle)
    FolderLock(tmp_path, "training", patience_s=0.3).release()


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"pid": "x", "host": 3}', "\0\0"])
def test_a_holder_that_cannot_be_read_is_refused_all_the_same(tmp_path, text):
    handle = held_by(tmp_path)
    (tmp_path / LOCK_FILE).write_text(text)
    with pytest.raises(UserError, match="another process is writing in"):
        FolderLock(tmp_path, "training")
    os.close(handle)


def test_where_a_file_system_knows_no_locks_the_process_is_looked_for(tmp_path, monkeypatch):
    def refuse(*_: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(folder_lock.fcntl, "flock", refuse)
    with FolderLock(tmp_path, "training"), pytest.raises(UserError, match=f"process {os.getpid()} "):
        FolderLock(tmp_path, "training")
    (tmp_path / LOCK_FILE).write_text(json.dumps({"host": socket.gethostname(), "pid": 2**22 + 1}))
    FolderLock(tmp_path, "training").release()


@pytest.mark.parametrize("resume", [False, True])
def test_a_run_folder_has_one_run_and_lets_its_other_ranks_in(tmp_path, resume):
    class Second(Ranks):
        """The second of two ranks, told by the first that there is no checkpoint yet."""

        def broadcast(self, value: int) -> int:
            return 0

    out, config = tmp_path / "run", Config()
    with RunFolder.open(out, config, False, Ranks()):
        with pytest.raises(UserError, match=f"process {os.getpid()} on host .* is training in"):
            RunFolder.open(out, config, resume, Ranks())
        assert RunFolder.open(out, config, resume, Second(rank=1, world=2)).path == out
    assert {p.name for p in out.iterdir()} == {"config.toml"}
    RunFolder.open(out, config, True, Ranks()).close()


def test_a_folder_that_is_refused_is_not_left_locked(tmp_path):
    out = tmp_path / "run"
    RunFolder.open(out, Config(), False, Ranks()).close()
    (out / "metrics.jsonl").write_text('{"step": 0}\n')
    for _ in range(2):
        with pytest.raises(UserError, match="already holds a run"):
            RunFolder.open(out, Config(), False, Ranks())
    with pytest.raises(UserError, match="no run to resume"):
        RunFolder.open(tmp_path / "none", Config(), True, Ranks())
    assert not (tmp_path / "none").exists()
