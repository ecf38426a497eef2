"""Notes to audio. Names are imported when first used, so that a pool's worker loads only the renderer."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastsmart.audio.batch import AudioBatch, write_wav
    from fastsmart.audio.fluidsynth import FluidSynthRenderer, load_library
    from fastsmart.audio.pool import RenderPool
    from fastsmart.audio.rendering import listening_seconds, listening_settings, render, render_file, render_files
    from fastsmart.audio.settings import RenderSettings
    from fastsmart.audio.soundfont import find_soundfont, list_soundfonts

_HOMES = {
    "AudioBatch": "batch",
    "FluidSynthRenderer": "fluidsynth",
    "RenderPool": "pool",
    "RenderSettings": "settings",
    "find_soundfont": "soundfont",
    "list_soundfonts": "soundfont",
    "load_library": "fluidsynth",
    "listening_seconds": "rendering",
    "listening_settings": "rendering",
    "render": "rendering",
    "render_file": "rendering",
    "render_files": "rendering",
    "write_wav": "batch",
}
__all__ = [
    "AudioBatch",
    "FluidSynthRenderer",
    "RenderPool",
    "RenderSettings",
    "find_soundfont",
    "list_soundfonts",
    "listening_seconds",
    "listening_settings",
    "load_library",
    "render",
    "render_file",
    "render_files",
    "write_wav",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
