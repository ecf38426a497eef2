"""Settings that cannot work are refused where they are made, by the key a person wrote."""

import pytest

from fastsmart.audio import RenderSettings
from fastsmart.errors import UserError


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("backend", "bank2"),
        ("bank", "half"),
        ("tail", "fade"),
        ("normalize", "rms"),
        ("empty", "zero"),
        ("sample_rate", 100),
        ("sample_rate", 16000.5),
        ("sample_rate", True),
        ("max_seconds", 0.0),
        ("max_seconds", float("nan")),
        ("max_seconds", "ten"),
        ("release_s", -1.0),
        ("program", 128),
        ("workers", -1),
        ("clip_timeout_s", 0),
        ("reverb", 1),
    ],
)
def test_a_bad_value_is_refused_by_its_key(key: str, value: object) -> None:
    with pytest.raises(UserError, match=rf"audio\.{key} = .*{value}"):
        RenderSettings(**{key: value})  # type: ignore[arg-type]


def test_the_default_is_the_papers_but_for_the_rate_of_the_reward() -> None:
    settings = RenderSettings()
    assert (settings.max_seconds, settings.tail, settings.normalize, settings.empty) == (10.0, "cut", "peak", "silence")
    assert settings.max_samples == 160_000
    assert settings.worker_count >= 1
