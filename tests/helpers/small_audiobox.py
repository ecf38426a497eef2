"""A small Audiobox, which upstream's package then takes for the published one."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastsmart.reward.audiobox import make_random_weights
from fastsmart.reward.audiobox.architecture import Size

SMALL = Size(channels=16, width=32, ffn=64, heads=4, layers=2, pos_taps=16, pos_groups=4, head_layers=3)


def write_small_audiobox(path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint of it; upstream builds networks of its size until the test ends."""
    from audiobox_aesthetics.model import aes

    change = {
        "encoder_layers": SMALL.layers,
        "encoder_embed_dim": SMALL.width,
        "encoder_ffn_embed_dim": SMALL.ffn,
        "encoder_attention_heads": SMALL.heads,
        "conv_feature_layers": "[(16,10,5)] + [(16,3,2)] * 4 + [(16,2,2)] * 2",
        "conv_pos": SMALL.pos_taps,
        "conv_pos_groups": SMALL.pos_groups,
    }
    monkeypatch.setattr(aes, "DEFAULT_AUDIO_CFG", aes.WavLMConfig(vars(aes.DEFAULT_AUDIO_CFG) | change))
    return make_random_weights(path, size=SMALL)
