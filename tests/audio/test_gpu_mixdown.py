"""Clips mixed where the scorer is: the same as the pool's, whatever is stored, whoever is ready first."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_soundfont import write_soundfont

from fastsmart.audio import AudioBatch, RenderPool, RenderSettings
from fastsmart.audio.batch import DeviceAudio
from fastsmart.audio.gpu_mixdown import DeviceRenderer
from fastsmart.errors import UserError
from fastsmart.notes import NoteBatch

pytest.importorskip("fluidsynth", reason="FluidSynth is not installed", exc_type=ImportError)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
Pieces = Callable[..., NoteBatch]


@pytest.fixture
def pieces(pieces_of: Pieces) -> NoteBatch:
    """Three pieces of few notes, and an empty one."""
    rng = np.random.default_rng(1)
    made = [[(rng.uniform(0, 0.3), 0.2, int(rng.integers(40, 44)), 30), (0.1, 0.25, 60 + i, 90)] for i in range(3)]
    return pieces_of(made[0], [], *made[1:])


@pytest.fixture(params=[False, True], ids=["stored", "on demand"])
def settings(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RenderSettings:
    monkeypatch.setenv("FASTSMART_CACHE", str(tmp_path / "cache"))
    font = write_soundfont(tmp_path / "tiny.sf2", moving_filter=request.param)
    return RenderSettings(str(font), max_seconds=0.5, workers=2)


def rendered(renderer: RenderPool | DeviceRenderer, pieces: NoteBatch, order: Sequence[int]) -> AudioBatch:
    for i in order:
        renderer.submit(i, pieces.select([i]))
    done: set[int] = set()
    while len(done) < len(pieces):
        done.update(renderer.poll(1.0))
    batch = renderer.gather(range(len(pieces)))
    renderer.clear()
    return batch


def test_clips_are_the_pools(settings: RenderSettings, pieces: NoteBatch) -> None:
    with RenderPool(settings, 4) as pool:
        renderer = DeviceRenderer(pool, DEVICE)
        empty_bank = rendered(renderer, pieces, [3, 1, 0, 2])
        by_pool = rendered(pool, pieces, range(4))
        full_bank = rendered(renderer, pieces, range(4))
        on_demand = renderer.mixer.bank.ensure(pieces.pitch, pieces.velocity).any()
        assert renderer.mixed == (2 if on_demand else 8)  # the piece without notes is always mixed here
        renderer.close()
    assert isinstance(full_bank, DeviceAudio)
    assert full_bank.on_device.device.type == DEVICE
    np.testing.assert_array_equal(full_bank.lengths, by_pool.lengths)
    np.testing.assert_allclose(full_bank.samples, by_pool.samples, rtol=0, atol=1e-5)
    assert np.abs(by_pool.samples).max() > 0.9
    np.testing.assert_array_equal(empty_bank.samples, full_bank.samples)


def test_a_clip_that_the_pool_gives_up_is_lost_here_too(settings: RenderSettings, pieces: NoteBatch) -> None:
    with RenderPool(settings, 4) as pool:
        renderer = DeviceRenderer(pool, DEVICE)
        for i in range(4):
            renderer.submit(i, pieces.select([i]))
        done: set[int] = set()
        while len(done) < 4:
            done.update(renderer.poll(1.0))
        pool._block[2] = np.nan  # as it gives up a clip
        clips = renderer.gather([2, 0])
        renderer.close()
    assert np.isnan(clips.clip(0)).all()
    assert np.isfinite(clips.clip(1)).all()


def test_settings_that_a_gpu_cannot_do_are_refused() -> None:
    for change in ({"tail": "release"}, {"bank": "exact"}, {"normalize": "loudness"}, {"backend": "fluidsynth"}):
        assert not RenderSettings(**change).mixes_on_gpu  # type: ignore[arg-type]
        with pytest.raises(UserError, match=r"audio\.mixdown = 'gpu' needs"):
            RenderSettings(**change, mixdown="gpu")  # type: ignore[arg-type]
