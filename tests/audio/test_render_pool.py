"""The pool gives what one renderer gives, whatever happens to its processes, and leaves nothing behind."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile  # its libsndfile must not reach the workers: see fastsmart.audio.fluidsynth

from fastsmart.audio import AudioBatch, RenderPool, RenderSettings, find_soundfont, render
from fastsmart.errors import UserError
from fastsmart.notes import NoteBatch, read_midi

Pieces = Callable[..., NoteBatch]
SETTINGS = RenderSettings(backend="fluidsynth", max_seconds=4.0, workers=2)
LONG = RenderSettings(backend="fluidsynth", max_seconds=200.0, workers=1, clip_timeout_s=1.0)
DEADLINE_S = 60.0


@pytest.fixture(scope="module")
def pieces(random_pieces: Pieces) -> NoteBatch:
    return random_pieces(12, seed=11)


@pytest.fixture(scope="module")
def undisturbed(pieces: NoteBatch) -> AudioBatch:
    return render(pieces, backend="fluidsynth", max_seconds=4.0, workers=1)


@pytest.fixture(scope="module")
def endless(pieces_of: Pieces) -> NoteBatch:
    """Keeps a worker busy for several seconds: 400 voices for 200 s, in a task that fills its pipe alone."""
    rng = np.random.default_rng(0)
    onsets = np.sort(rng.uniform(0.0, 190.0, 8_000))
    return pieces_of([(float(onset), 10.0, int(rng.integers(21, 80)), 100) for onset in onsets])


def submit_all(pool: RenderPool, pieces: NoteBatch) -> None:
    for i in range(len(pieces)):
        pool.submit(i, pieces, i)


def assert_equal(batch: AudioBatch, other: AudioBatch) -> None:
    np.testing.assert_array_equal(batch.samples, other.samples)
    np.testing.assert_array_equal(batch.lengths, other.lengths)
    assert batch.sample_rate == other.sample_rate


def runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def until(condition: Callable[[], bool]) -> None:
    end_s = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < end_s, "it did not happen"
        time.sleep(0.01)


def test_clips_are_the_same_from_any_worker_in_any_order(pieces: NoteBatch, undisturbed: AudioBatch) -> None:
    told: list[int] = []
    with RenderPool(SETTINGS, len(pieces) + 3) as pool:
        for i in reversed(range(len(pieces))):
            pool.submit(i, pieces, i)
        assert_equal(pool.wait(told.append), undisturbed)
        for i in range(len(pieces)):  # empty again, usable again, with other clips in every row
            pool.submit(i, pieces, (i + 1) % len(pieces))
        again = pool.wait()
        order = np.roll(np.arange(len(pieces)), -1)
        assert_equal(
            again, replace(undisturbed, samples=undisturbed.samples[order], lengths=undisturbed.lengths[order])
        )
        assert len(pool.wait()) == 0
        assert (pool.replaced, pool.failed) == (0, 0)
    assert told == sorted(set(told))
    assert told[-1] == len(pieces)
    assert undisturbed.samples.dtype == np.float32
    for i, length in enumerate(undisturbed.lengths):
        assert length == round(min(pieces.end_s[i], 4.0) * 16000)
        assert np.abs(undisturbed.samples[i, :length]).max() == pytest.approx(1.0, abs=1e-4)
        assert not undisturbed.samples[i, length:].any()


def test_clips_are_those_of_a_renderer_in_a_process_of_its_own(pieces: NoteBatch, undisturbed: AudioBatch) -> None:
    """With the system's libsndfile under FluidSynth, although this process has loaded another."""
    rows = pieces.rows(0)
    script = f"""
import sys, numpy as np
from fastsmart.audio.events import Piece
from fastsmart.audio.fluidsynth import FluidSynthRenderer
from fastsmart.audio.settings import RenderSettings
settings = RenderSettings(max_seconds=4.0)
out = np.empty(settings.max_samples, np.float32)
arrays = np.frombuffer(sys.stdin.buffer.read()).reshape(4, -1)
piece = Piece(*arrays[:2], *arrays[2:].astype(np.uint8), {float(pieces.end_s[0])!r})
length = FluidSynthRenderer(settings).render_into(out, piece)
sys.stdout.buffer.write(out[:length].tobytes())
"""
    columns = (pieces.onset_s, pieces.duration_s, pieces.pitch, pieces.velocity)
    arrays = np.stack([column[rows].astype(np.float64) for column in columns])
    made = subprocess.run([sys.executable, "-c", script], input=arrays.tobytes(), capture_output=True, check=True)
    np.testing.assert_array_equal(np.frombuffer(made.stdout, np.float32), undisturbed.clip(0))


def test_a_worker_loads_only_what_it_needs() -> None:
    script = """
import sys, fastsmart.audio.worker
print([name for name in ("torch", "numba", "scipy", "soundfile", "mido") if name in sys.modules])
"""
    said = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert said.strip() == "[]"


def test_finished_clips_can_be_had_while_others_render(pieces: NoteBatch, undisturbed: AudioBatch) -> None:
    seen: list[int] = []
    with RenderPool(SETTINGS, len(pieces)) as pool:
        submit_all(pool, pieces)
        while len(seen) < len(pieces):
            new = pool.poll()
            seen += new
            for i in new:
                np.testing.assert_array_equal(pool.gather([i]).clip(0), undisturbed.clip(i))
        assert sorted(seen) == list(range(len(pieces)))
        assert_equal(pool.wait(), undisturbed)


def test_kill_minus_9_of_a_worker_loses_nothing(pieces: NoteBatch, undisturbed: AudioBatch) -> None:
    with RenderPool(SETTINGS, len(pieces)) as pool:
        submit_all(pool, pieces)
        pool.wait()  # both workers have started
        for victim in pool.pids:
            os.kill(victim, signal.SIGSTOP)  # so that it certainly has clips in hand when it dies
        submit_all(pool, pieces)
        for victim in pool.pids:
            os.kill(victim, signal.SIGKILL)
        assert_equal(pool.wait(), undisturbed)
        assert (pool.replaced, pool.failed) == (2, 0)


def test_ctrl_c_is_not_the_workers_business(pieces: NoteBatch, undisturbed: AudioBatch) -> None:
    with RenderPool(SETTINGS, len(pieces)) as pool:
        for pid in pool.pids:
            os.kill(pid, signal.SIGINT)  # while it starts
        submit_all(pool, pieces)
        pool.wait()
        submit_all(pool, pieces)
        for pid in pool.pids:
            os.kill(pid, signal.SIGINT)  # while it is at work
        assert_equal(pool.wait(), undisturbed)
        assert pool.replaced == 0


def test_a_worker_that_dies_idle_is_replaced(pieces: NoteBatch, undisturbed: AudioBatch) -> None:
    with RenderPool(SETTINGS, len(pieces)) as pool:
        submit_all(pool, pieces)
        pool.wait()
        os.kill(pool.pids[0], signal.SIGKILL)
        submit_all(pool, pieces)
        assert_equal(pool.wait(), undisturbed)
        assert pool.failed == 0


@pytest.mark.parametrize("way", ["hangs", "dies"])
def test_a_clip_that_ends_two_workers_becomes_nan_and_its_midi_is_kept(
    way: str, pieces: NoteBatch, undisturbed: AudioBatch, endless: NoteBatch, tmp_path: Path
) -> None:
    with RenderPool(LONG, 3, quarantine=tmp_path / "quarantine") as pool:
        pool.submit(0, pieces, 0)
        pool.submit(1, endless)
        pool.submit(2, pieces, 2)
        while way == "dies" and pool.failed == 0:
            worker = pool._workers[0]  # a death while it still loads would not be the clip's fault
            if worker.ready and worker.in_hand and worker.in_hand[0][0] == 1:
                os.kill(worker.process.pid, signal.SIGKILL)
                until(lambda pid=worker.process.pid: not runs(pid))  # type: ignore[misc]
            pool.poll()
        batch = pool.wait()
        assert pool.failed == 1
        assert pool.replaced >= 2
        pool.submit(0, pieces, 5)  # and the pool goes on
        np.testing.assert_array_equal(pool.wait().clip(0), undisturbed.clip(5))
    assert np.isnan(batch.samples[1]).all()
    assert batch.lengths[1] == 16000
    for i in (0, 2):
        np.testing.assert_array_equal(batch.clip(i), undisturbed.clip(i))
    (kept,) = (tmp_path / "quarantine").iterdir()
    assert len(read_midi(kept).pitch) > 7_000  # the piece itself; what overlaps in MIDI is paired anew


def test_a_worker_that_cannot_render_says_why(tmp_path: Path, pieces: NoteBatch) -> None:
    path = tmp_path / "piano.sf2"
    path.write_bytes(b"RIFF" + (4).to_bytes(4, "little") + b"sfbk")
    with pytest.raises(UserError, match="cannot load"):
        render(pieces, soundfont=path)


def test_workers_that_die_at_once_end_in_one_sentence(pieces: NoteBatch, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(UserError, match=r"render workers die while loading .* lower audio\.workers"):
        render(pieces)


def test_wrong_use_is_refused(pieces: NoteBatch) -> None:
    with RenderPool(SETTINGS, 4) as pool:
        with pytest.raises(ValueError, match="does not fit"):
            pool.submit(4, pieces, 0)
        pool.submit(2, pieces, 0)
        with pytest.raises(ValueError, match="before"):
            pool.submit(2, pieces, 1)
        with pytest.raises(ValueError, match=r"\[0, 1\] are not finished"):
            pool.wait()
    with pytest.raises(RuntimeError, match="closed"):
        pool.submit(0, pieces, 0)


def test_render_takes_every_setting(pieces_of: Pieces) -> None:
    notes = pieces_of([(0.0, 1.0, 60, 100)], [])
    batch = render(notes, soundfont=find_soundfont(), sample_rate=24000, max_seconds=0.5, workers=2, empty="nan")
    assert batch.sample_rate == 24000
    assert batch.lengths.tolist() == [12000, 12000]
    assert np.isnan(batch.samples[1]).all()
    assert batch.clip(0).any()
    assert len(render(NoteBatch.empty(0))) == 0
    with pytest.raises(UserError, match=r"audio\.tail"):
        render(notes, tail="fade")


def test_a_batch_can_be_written_as_wav(undisturbed: AudioBatch, tmp_path: Path) -> None:
    undisturbed.to_wav(1, tmp_path / "clip.wav")
    samples, rate = soundfile.read(tmp_path / "clip.wav")
    assert rate == 16000
    np.testing.assert_allclose(samples, undisturbed.clip(1), rtol=0.0, atol=2.0**-15)


OWNER = """
import signal, sys, time
import numpy as np
from fastsmart.audio import RenderPool, RenderSettings
from fastsmart.notes import NoteBatch
from dataclasses import replace

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job is started deaf to it
    m, none = 16_000, NoteBatch.empty(1)
    onset = np.linspace(0, 190, m)
    notes = replace(none, onset_s=onset, duration_s=np.full(m, 10.0), pitch=np.arange(m, dtype=np.uint8) % 60 + 21,
                    velocity=np.full(m, 100, np.uint8), offsets=np.array([0, m]), end_s=np.array([200.0]))
    {opening}
        for i in range(4):
            pool.submit(i, notes)
        while not all(worker.ready for worker in pool._workers):
            pool.poll()
        print(*pool.pids, flush=True)
        {then}
"""


def start_owner(opening: str, then: str) -> tuple[subprocess.Popen[str], list[int]]:
    """A process group with a pool of two workers that are at work on clips without end."""
    settings = "RenderSettings(backend='fluidsynth', max_seconds=200.0, workers=2)"
    script = OWNER.format(opening=opening.format(settings=settings), then=then)
    owner = subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert owner.stdout
    return owner, [int(pid) for pid in owner.stdout.readline().split()]


def shared_memory() -> set[str]:
    return set(os.listdir("/dev/shm"))


def ownerless(names: set[str]) -> set[str]:
    """Those of the names in /dev/shm that no living process has in its memory; a test beside this one has some too."""
    for maps in Path("/proc").glob("[0-9]*/maps") if names else ():
        with suppress(OSError):
            text = maps.read_text(errors="replace")
            names = {name for name in names if f"/dev/shm/{name}" not in text}
    return names & shared_memory()


@pytest.mark.parametrize("end", ["kill -9", "Ctrl-C", "exit without close"])
def test_nothing_is_left_however_the_owner_ends(end: str) -> None:
    before = shared_memory()
    with_pool, then = "with RenderPool({settings}, 4) as pool:", "pool.wait()"
    if end == "exit without close":
        with_pool, then = "pool = RenderPool({settings}, 4)\n    if True:", "sys.exit(7)"
    owner, pids = start_owner(with_pool, then)
    assert len(pids) == 2
    if end == "kill -9":
        owner.kill()
    elif end == "Ctrl-C":
        assert all(runs(pid) for pid in pids)
        os.killpg(owner.pid, signal.SIGINT)
    until(lambda: owner.poll() is not None)
    until(lambda: not any(runs(pid) for pid in pids))
    _, said = owner.communicate()
    assert owner.returncode == {"kill -9": -signal.SIGKILL, "Ctrl-C": -signal.SIGINT, "exit without close": 7}[end]
    assert said.count("Traceback") == (1 if end == "Ctrl-C" else 0)
    assert "resource_tracker" not in said
    until(lambda: not ownerless(shared_memory() - before))


def test_close_reaps_the_workers_and_frees_the_memory(pieces: NoteBatch) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        with RenderPool(SETTINGS, 4) as pool:
            pool.submit(0, pieces, 0)
            pids = pool.pids
        assert not any(Path(f"/proc/{pid}").exists() for pid in pids)  # not even zombies
    assert len(os.listdir("/proc/self/fd")) == before
