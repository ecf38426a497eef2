"""Features against MusPy: real clips of POP909 where it is at hand, seeded synthetic ones where it is not."""

import os
import tarfile
from pathlib import Path

import muspy
import numpy as np
import pytest

from fastsmart.music.features import features
from fastsmart.music.windows import cut_windows
from fastsmart.notes import NoteBatch, read_midi

CLIPS = 200
POP909 = Path(os.environ.get("FASTSMART_POP909", Path(__file__).parents[3] / "shared/data/pop909.tar.xz"))
MUSPY = {
    "polyphony": muspy.polyphony,
    "polyphony_rate": muspy.polyphony_rate,
    "empty_beat_rate": muspy.empty_beat_rate,
    "scale_consistency": muspy.scale_consistency,
    "pitch_class_entropy": muspy.pitch_class_entropy,
    "pitch_range": muspy.pitch_range,
}


def batch(clips: list[np.ndarray], ticks_per_beat: int) -> NoteBatch:
    """A batch from tables of onset tick, duration ticks, pitch, velocity; a tick is 10 ms."""
    table = np.concatenate(clips)
    nothing = np.zeros(len(clips) + 1, np.int64)
    return NoteBatch(
        table[:, 0] / 100,
        table[:, 1] / 100,
        table[:, 2].astype(np.uint8),
        table[:, 3].astype(np.uint8),
        np.cumsum([0, *map(len, clips)]),
        np.array([(c[:, 0] + c[:, 1]).max(initial=0) / 100 for c in clips]),
        table[:, 0].astype(np.int32),
        table[:, 1].astype(np.int32),
        ticks_per_beat,
        *(np.zeros(0, np.int32), np.zeros(0), nothing),
        *(np.zeros(0, np.int32), np.zeros((0, 2), np.int32), nothing),
    )


def synthetic(count: int, seed: int) -> NoteBatch:
    """Clips with everything that is awkward: unsorted notes, re-struck keys, notes of no length, long silences."""
    rng = np.random.default_rng(seed)

    def clip() -> np.ndarray:
        m, span = int(rng.integers(1, 80)), int(rng.integers(1, 300))
        keys = rng.integers(21, 109, int(rng.integers(1, 20)))
        return np.stack(
            [rng.integers(0, span, m), rng.integers(0, 49, m), rng.choice(keys, m), rng.integers(1, 128, m)], axis=1
        )

    return batch([clip() for _ in range(count)], ticks_per_beat=12)


def pop909(tmp_path: Path) -> NoteBatch:
    """Ten-second windows of every 36th piece."""
    with tarfile.open(POP909) as archive:
        members = sorted((m for m in archive.getmembers() if m.name.endswith(".mid")), key=lambda m: m.name)[::36]
        archive.extractall(tmp_path, members=members, filter="data")
    pieces = [read_midi(tmp_path / m.name) for m in members]
    clips = [cut_windows(piece) for piece in pieces if piece.ticks_per_beat == 480]
    return NoteBatch.concat([c.select(range(0, len(c), 3)) for c in clips])


def expected(notes: NoteBatch, i: int) -> dict[str, float]:
    rows = notes.rows(i)
    columns = (notes.onset_tick, notes.duration_tick, notes.pitch, notes.velocity)
    quads = zip(*(column[rows].tolist() for column in columns), strict=True)
    track = muspy.Track(notes=[muspy.Note(time=t, pitch=p, duration=d, velocity=v) for t, d, p, v in quads])
    music = muspy.Music(resolution=notes.ticks_per_beat, tracks=[track])
    return {name: function(music) for name, function in MUSPY.items()}


def assert_equals_muspy(notes: NoteBatch, clips: int) -> None:
    ours = features(notes)
    for i in range(clips):
        for name, value in expected(notes, i).items():
            np.testing.assert_allclose(ours[name][i], value, rtol=1e-12, err_msg=f"{name} of clip {i}")


def test_features_agree_with_muspy_on_200_clips(tmp_path: Path) -> None:
    notes = pop909(tmp_path) if POP909.exists() else synthetic(CLIPS, seed=0)
    assert len(notes) >= CLIPS
    assert_equals_muspy(notes, CLIPS)


def test_features_agree_with_muspy_on_awkward_clips() -> None:
    assert_equals_muspy(synthetic(CLIPS, seed=1), CLIPS)


@pytest.mark.parametrize("clip", [[], [[0, 0, 60, 80]], [[0, 1, 60, 80]], [[5, 0, 60, 80], [0, 2, 60, 80]]])
def test_features_agree_with_muspy_where_there_is_next_to_nothing(clip: list[list[int]]) -> None:
    assert_equals_muspy(batch([np.array(clip, np.int64).reshape(-1, 4)], ticks_per_beat=12), 1)
