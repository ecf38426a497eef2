"""The page to hear a run by."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path

import pytest

from fastsmart.run.listening_page import PAGE_FILE, Outcome, write_page


@pytest.mark.parametrize(
    ("outcome", "said"),
    [
        (Outcome(1.234, (1.1, 1.4), 0.957), "Better by 1.23 standard deviations [1.10, 1.40], 96% as varied as before"),
        (Outcome(-0.5, (-0.7, 0.1), 1.02), "Worse by 0.50 standard deviations [-0.10, 0.70], 102% as varied as before"),
        (Outcome(0.0, (-0.1, 0.2), None), "Better by 0.00 standard deviations [-0.10, 0.20]"),
        (Outcome(0.3, None, None), "Better by 0.30 standard deviations"),
        (Outcome(None, None, 1.0), "Nothing could be scored, so nothing is known of the reward"),
    ],
)
def test_both_numbers_are_said(outcome: Outcome, said: str) -> None:
    assert outcome.sentence() == said


class Seen(HTMLParser):
    """What a browser would show and load."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.links: list[str] = []
        self.words: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.loaded += [str(found["src"])] if "src" in found else []
        self.links += [str(found["href"])] if "href" in found else []

    def handle_data(self, data: str) -> None:
        self.words.append(data.strip())


@pytest.fixture
def listen(tmp_path: Path) -> Path:
    """Clips of two openings on both sides, the first of them rendered, and one of a third that has no other side."""
    for name in ("01-before", "01-after", "02-before", "02-after", "03-before"):
        (tmp_path / f"{name}.mid").write_bytes(b"MThd")
    for name in ("01-before", "01-after", "03-before"):
        (tmp_path / f"{name}.wav").write_bytes(b"RIFF")
    return tmp_path


def test_every_clip_with_both_sides_is_on_the_page(listen: Path) -> None:
    page = write_page(listen, "tiny <before>", Outcome(1.0, None, 0.9), "4 outputs on 4 held-out openings.")
    assert page == listen / PAGE_FILE
    seen = Seen(page.read_text(encoding="utf-8"))
    assert seen.loaded == ["01-before.wav", "01-after.wav"]
    assert seen.links == ["01-before.mid", "01-after.mid", "02-before.mid", "02-after.mid"]
    assert "tiny <before>" in seen.words
    assert "Better by 1.00 standard deviations, 90% as varied as before" in seen.words
    assert any(words.startswith("2 openings, each as the policy went on from it") for words in seen.words)


def test_without_clips_there_is_no_page(tmp_path: Path) -> None:
    assert write_page(tmp_path, "tiny", Outcome(1.0, None, 0.9), "") is None
    assert not (tmp_path / PAGE_FILE).exists()
