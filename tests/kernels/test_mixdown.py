"""The GPU's mixdown equals the CPU's; without a GPU the kernel runs in Triton's interpreter."""

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_soundfont import write_soundfont

from fastsmart.audio import RenderSettings
from fastsmart.audio.bank_renderer import BankRenderer
from fastsmart.audio.events import piece_arrays
from fastsmart.audio.gpu_mixdown import DeviceMixer
from fastsmart.errors import UserError
from fastsmart.notes import NoteBatch, Pedals

pytest.importorskip("fluidsynth", reason="FluidSynth is not installed", exc_type=ImportError)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RenderSettings:
    monkeypatch.setenv("FASTSMART_CACHE", str(tmp_path / "cache"))
    return RenderSettings(str(write_soundfont(tmp_path / "tiny.sf2")), max_seconds=0.5)


@pytest.fixture
def notes() -> NoteBatch:
    """Clips that end inside a tile and at its border, an empty one, notes before 0 and past the end."""
    rng = np.random.default_rng(0)
    counts = np.array([12, 0, 1, 30])
    m = counts.sum()
    none = NoteBatch.empty(4)
    onset_s = rng.uniform(-0.01, 0.4, m)
    at = np.array([0.1, 0.3])
    return NoteBatch(
        **{name: getattr(none, name) for name in none.__dataclass_fields__}
        | {
            "onset_s": onset_s,
            "duration_s": rng.uniform(0.0, 0.3, m),
            "pitch": rng.choice([40, 41, 60, 90], m).astype(np.uint8),
            "velocity": rng.integers(1, 128, m).astype(np.uint8),
            "offsets": np.concatenate([[0], np.cumsum(counts)]),
            "end_s": np.array([0.45, 0.0, 0.512, 0.384]),
            "pedals": Pedals(np.zeros(2, np.int32), at, np.array([True, False]), np.array([0, 0, 0, 0, 2])),
        }
    )


@pytest.mark.parametrize("kernel", ["torch", pytest.param("triton", marks=[pytest.mark.filterwarnings("ignore")])])
@pytest.mark.parametrize("normalize", ["none", "peak"])
def test_the_mixdown_is_the_cpus(kernel: str, normalize: str, settings: RenderSettings, notes: NoteBatch) -> None:
    if kernel == "triton":
        pytest.importorskip("triton", reason="Triton is not installed")
    settings = RenderSettings(settings.soundfont, max_seconds=0.5, normalize=normalize, empty="nan")
    with BankRenderer(settings) as cpu, DeviceMixer(settings, DEVICE, kernel) as gpu:
        clips, lengths = gpu.render(notes)
        again, _ = gpu.render(notes)
        out = np.empty(settings.max_samples, np.float32)
        for i in range(len(notes)):
            assert cpu.render_into(out, piece_arrays(notes, i)) == lengths[i]
            np.testing.assert_allclose(clips[i].cpu().numpy(), out, rtol=0, atol=1e-5 * max(np.abs(out).max(), 1e-9))
    np.testing.assert_array_equal(clips.cpu().numpy(), again.cpu().numpy())


def test_what_only_the_cpu_does_is_refused(settings: RenderSettings) -> None:
    with pytest.raises(UserError, match=r"audio\.tail"):
        DeviceMixer(RenderSettings(settings.soundfont, tail="release"), "cpu")
