"""Finding, checking and naming the soundfont: the file that decides how every note sounds."""

from __future__ import annotations

import os
from fnmatch import fnmatch
from pathlib import Path

from fastsmart.errors import UserError

ENVIRONMENT = "FASTSMART_SOUNDFONT"
INSTALL = "apt-get install fluidr3mono-gm-soundfont"

# Debian and Ubuntu; Fedora and Arch; built from source; Homebrew; macOS; the user's own
FOLDERS = (
    "/usr/share/sounds/sf3",
    "/usr/share/sounds/sf2",
    "/usr/share/soundfonts",
    "/usr/local/share/sounds/sf3",
    "/usr/local/share/sounds/sf2",
    "/usr/local/share/soundfonts",
    "/opt/homebrew/share/soundfonts",
    "/Library/Audio/Sounds/Banks",
    "~/Library/Audio/Sounds/Banks",
    "~/.local/share/soundfonts",
    "~/.local/share/sounds/sf2",
)
# smallest permissive one first, so that two machines with the same packages choose the same font
PREFERENCE = ("FluidR3Mono_GM.sf3", "FluidR3_GM.sf2", "MuseScore_General*", "TimGM6mb*")
_ARCHIVES = {
    b"PK\x03\x04": "a zip archive",
    b"7z\xbc\xaf": "a 7z archive",
    b"Rar!": "a rar archive",
    b"\x1f\x8b": "gzipped",
}


def find_soundfont(path: str | Path = "") -> Path:
    """The checked soundfont to use: `path`, else the environment variable FASTSMART_SOUNDFONT, else an installed one.

    Raises UserError when the chosen file is not a complete soundfont, or none is installed.
    """
    chosen = str(path) or os.environ.get(ENVIRONMENT, "")
    if chosen:
        return check_soundfont(Path(chosen).expanduser())
    installed = list_soundfonts()
    if not installed:
        raise UserError(
            f"no soundfont found: run `{INSTALL}`, or set audio.soundfont (or {ENVIRONMENT}) to an SF2 or SF3 file"
        )
    return check_soundfont(installed[0])


def list_soundfonts() -> list[Path]:
    """The soundfonts in this system's usual folders, the preferred one first; links to one file are listed once."""
    found: dict[Path, Path] = {}
    for folder in FOLDERS:
        for path in sorted(Path(folder).expanduser().glob("*.[sS][fF][23]")):
            real = path.resolve()
            if real.is_file() and (real not in found or _rank(path) < _rank(found[real])):
                found[real] = path
    return sorted(found.values(), key=_rank)


def check_soundfont(path: Path) -> Path:
    """`path` itself when its header is a soundfont's and none of it is missing; raises UserError otherwise."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(12)
    except OSError as error:
        raise UserError(
            f"cannot read the soundfont {path}: {error.strerror}; set audio.soundfont to an SF2 or SF3 file"
        ) from error
    if size == 0:
        raise UserError(f"the soundfont {path} is empty (0 bytes): download or install it again")
    for magic, kind in _ARCHIVES.items():
        if head.startswith(magic):
            raise UserError(f"the soundfont {path} is {kind}: unpack it and name the SF2 or SF3 file inside")
    if head[:4] != b"RIFF" or (len(head) == 12 and head[8:] != b"sfbk"):
        raise UserError(
            f"{path} is not a soundfont (it starts with {head!r}): set audio.soundfont to an SF2 or SF3 file"
        )
    declared = int.from_bytes(head[4:8], "little") + 8
    if size + 1 < declared or len(head) < 12:  # + 1: some writers count a padding byte that they leave out
        raise UserError(f"the soundfont {path} is cut short ({size} of {declared} bytes): download or install it again")
    return path


def _rank(path: Path) -> tuple[int, str, str]:
    preference = next((i for i, name in enumerate(PREFERENCE) if fnmatch(path.name, name)), len(PREFERENCE))
    return preference, path.name, str(path)
