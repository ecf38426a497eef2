"""The picture of a run: what is written on it can be read."""

from fastsmart.music.rarefied import RAREFIED
from fastsmart.run.curves import curves


def lines() -> list[dict]:
    moments = {"mean": 0.5, "std": 0.1}
    held_out = {
        "reward": moments,
        "terms": {"typicality": moments, "consonance": moments},
        "features": {"notes": moments},
        "diversity": dict.fromkeys(RAREFIED, 0.4),
        "openings": 308,
    }
    time = dict.fromkeys(("sample", "decode", "render", "score", "update", "sync"), 0.1)
    step = {"reward": 0.5, "notes": 60.0, "kl": 0.01, "kl_per_completion": 2.0, "entropy": 2.0, "time": time}
    return [{"step": i, **step, "eval": held_out} for i in range(4)]


def test_legends_and_labels_lie_within_their_axes() -> None:
    figure = curves(lines())
    assert figure is not None
    figure.draw_without_rendering()
    assert len(figure.axes[5].lines) > 3
    for axes in figure.axes:
        frame = axes.get_window_extent()
        label = axes.yaxis.label.get_window_extent()
        assert label.height <= frame.height, axes.get_title()
        assert axes.title.get_window_extent().width <= axes.get_tightbbox().width
        if legend := axes.get_legend():
            extent = legend.get_window_extent()
            assert frame.x0 <= extent.x0, axes.get_title()
            assert extent.x1 <= frame.x1, axes.get_title()
