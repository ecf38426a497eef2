"""The page as a musician meets it, in headless Chromium, from a server that is killed in the middle."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest
from browsing import until
from made_notes import made, melody

from fastsmart.live.session import Session
from fastsmart.live.settings import LiveSettings
from fastsmart.taste import read_choices, standing

PATIENCE_MS = 120_000  # a machine that others compute on is slow
LESSON_MS = 1_200_000  # of the least priority
READY = "state && state.pair && state.pair.every((clip) => clip.whole)"


@dataclass
class Served:
    """`fastsmart live` in a process of its own, on a port that stays."""

    out: Path
    port: int
    options: tuple[str, ...] = ("--no-training", "--max-tokens", "60")
    process: subprocess.Popen[str] | None = None
    address: str = field(init=False, default="")

    def start(self) -> None:
        command = [sys.executable, "-m", "fastsmart", "live", "--out", str(self.out), "--port", str(self.port)]
        self.process = subprocess.Popen([*command, *self.options], stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.address = self.process.stdout.readline().split()[1]

    def kill(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGKILL)
        self._ended()

    def stop(self) -> int:
        assert self.process is not None
        self.process.send_signal(signal.SIGINT)
        return self._ended()

    def _ended(self) -> int:
        assert self.process is not None
        with self.process as process:
            return process.wait(60)

    def choices(self) -> list[tuple[str, str, str]]:
        written = standing(read_choices(self.out / "choices.jsonl").choices)
        return [(c.left, c.right, c.choice) for c in written]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def served(tmp_path_factory, clips) -> Iterator[Served]:
    """One server for all tests, which has clips to play when it starts; what is asked of it is asked from there on."""
    server = Served(tmp_path_factory.mktemp("served") / "taste", free_port())
    Session(server.out, LiveSettings()).add(clips)
    server.start()
    yield server
    if server.process is not None and server.process.poll() is None:
        server.kill()


@pytest.fixture
def tab(browser, served) -> Iterator[Any]:
    """A tab with the page, that fails the test where the browser has something to complain of, or asks elsewhere."""
    context = browser.new_context(viewport={"width": 1100, "height": 900})
    complaints: list[str] = []
    asked: list[str] = []
    context.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
    context.on("weberror", lambda error: complaints.append(str(error.error)))
    context.on("request", lambda request: asked.append(request.url))
    context.set_default_timeout(PATIENCE_MS)
    page = context.new_page()
    page.goto(served.address)
    waits(page, READY)
    yield page
    context.close()
    local = f"http://127.0.0.1:{served.port}/"
    assert not [url for url in asked if not url.startswith((local, "blob:", "data:"))]
    # the browser's own words for a server that is gone, or refuses
    own = ("ERR_CONNECTION_REFUSED", "ERR_INCOMPLETE_CHUNKED_ENCODING", "status of 422")
    assert not [text for text in complaints if not any(words in text for words in own)]


def waits(page: Any, condition: str, most_ms: int = PATIENCE_MS) -> None:
    """`until`, with the patience that a slow machine needs."""
    for _ in range(most_ms // 10_000):
        try:
            until(page, condition)
            return
        except AssertionError:
            continue
    until(page, condition)


def pair_of(page: Any) -> tuple[str, str]:
    left, right = page.evaluate("state.pair.map((clip) => clip.id)")
    return left, right


def press(page: Any, key: str) -> tuple[str, str]:
    """Answer the present pair by a key, and wait for the next; the pair that was answered."""
    before = pair_of(page)
    page.keyboard.press(key)
    waits(page, f"{READY} && state.pair[0].id !== '{before[0]}' && !busy")
    return before


def test_choices_by_key_button_and_touch_survive_reloads_tabs_and_a_kill(served, tab):
    given = served.choices()
    given += [(*press(tab, "ArrowLeft"), "left"), (*press(tab, "ArrowUp"), "equal")]

    before = pair_of(tab)
    tab.click("[data-choice=right]")
    waits(tab, f"{READY} && state.pair[0].id !== '{before[0]}'")
    given.append((*before, "right"))
    assert served.choices() == given

    tab.reload()
    waits(tab, READY)
    assert tab.inner_text("#count") == f"{len(given)} choices so far"

    other = tab.context.new_page()
    other.goto(served.address)
    waits(other, READY)
    assert pair_of(other) == pair_of(tab)
    given.append((*press(other, "ArrowDown"), "both_bad"))
    waits(tab, f"state.choices === {len(given)} && state.pair[0].id === '{pair_of(other)[0]}'")
    other.close()

    now = pair_of(tab)
    served.kill()
    assert served.choices() == given
    waits(tab, "!$('trouble').hidden")
    tab.keyboard.press("ArrowLeft")
    waits(tab, "!busy")
    address = served.address
    served.start()
    assert served.address == address
    waits(tab, "$('trouble').hidden")
    assert pair_of(tab) == now
    given.append((*press(tab, "ArrowLeft"), "left"))
    assert served.choices() == given

    tab.keyboard.press("u")
    waits(tab, f"state.pair[0].id === '{now[0]}' && state.choices === {len(given) - 1}")
    assert served.choices() == given[:-1]


def test_a_clip_sounds_and_its_roll_follows(served, tab):
    tab.keyboard.press("1")
    waits(tab, "sound.playing && sound.playing.began !== null")
    began = tab.evaluate("[sound.context.currentTime, sound.position, cards.left.roll.now]")
    tab.wait_for_timeout(700)
    later = tab.evaluate("[sound.context.currentTime, sound.position, cards.left.roll.now]")
    assert all(b > a for a, b in zip(began, later, strict=True))
    length, loudest = tab.evaluate(
        """sound.clip(state.pair[0].id).then((buffer) =>
        [buffer.duration, buffer.getChannelData(0).reduce((most, x) => Math.max(most, Math.abs(x)), 0)])"""
    )
    assert length >= tab.evaluate("state.pair[0].seconds")
    assert 0.01 < loudest < 1
    assert tab.inner_text("#left .word") == "Stop left"
    tab.keyboard.press("2")
    waits(tab, "sound.playing && sound.playing.id === state.pair[1].id && sound.playing.began !== null")
    tab.wait_for_timeout(500)
    tab.keyboard.press(" ")
    assert tab.evaluate("sound.playing") is None
    stopped = tab.evaluate("rest.at")
    assert stopped > 0.1
    tab.keyboard.press(".")
    assert tab.evaluate("[rest.at, cards.right.roll.now]") == pytest.approx([stopped + 2] * 2)
    tab.keyboard.press(" ")  # goes on there, with the same one
    waits(tab, "sound.playing && sound.playing.began !== null")
    assert tab.evaluate("sound.playing.id === state.pair[1].id")
    assert tab.evaluate("sound.playing.offset") == pytest.approx(stopped + 2)
    tab.keyboard.press(",")
    waits(tab, "sound.playing && sound.playing.began !== null")
    assert tab.evaluate("sound.playing.offset") < stopped + 1.5
    before = pair_of(tab)
    tab.click("#skip")
    waits(tab, f"{READY} && state.pair[0].id !== '{before[0]}'")


def test_a_dropped_file_is_answered_note_by_note(served, tab, tmp_path):
    made([melody(3, 8)]).to_midi(0, tmp_path / "mine.mid")
    tab.evaluate("sound.open() && null")
    tab.set_input_files("#file", str(tmp_path / "mine.mid"))
    waits(tab, "$('first-note').dataset.ms !== undefined")
    waits(tab, f"{READY} && state.answering")
    assert "mine.mid" in tab.inner_text("#phrase-say")
    own, all_notes = tab.evaluate("[state.phrase.notes, state.pair[0].notes]")
    assert all_notes[: len(own)] == own
    assert len(all_notes) > len(own)
    answered = press(tab, "ArrowRight")
    assert served.choices()[-1] == (*answered, "right")
    tab.click("#drop-phrase")
    waits(tab, f"{READY} && !state.answering")


def test_a_file_that_is_no_midi_is_said_in_one_sentence(served, tab, tmp_path):
    (tmp_path / "bad.mid").write_bytes(b"this is not music")
    tab.set_input_files("#file", str(tmp_path / "bad.mid"))
    waits(tab, "!$('trouble').hidden")
    said = tab.inner_text("#trouble")
    assert "bad.mid" in said
    assert said.endswith(".")
    assert tab.evaluate("state.answering") is False


def test_ctrl_c_ends_it_in_order(served):
    assert served.stop() == 128 + signal.SIGINT
    served.start()


MIDI = """
window.input = { name: "Test piano", onmidimessage: null };
navigator.requestMIDIAccess = async () => ({ inputs: new Map([["1", input]]), onstatechange: null });
window.strike = (data) => input.onmidimessage({ data, timeStamp: performance.now() });
"""


def test_a_phrase_from_a_midi_keyboard_is_answered(browser, served):
    context = browser.new_context()
    context.set_default_timeout(PATIENCE_MS)
    page = context.new_page()
    page.add_init_script(MIDI)
    page.goto(served.address)
    waits(page, READY)
    page.click("#midi")
    waits(page, "input.onmidimessage !== null")
    assert "Test piano" in page.inner_text("#midi-say")
    for pitch in (60, 64, 67):
        page.evaluate(f"strike([0x90, {pitch}, 90])")
        page.wait_for_timeout(150)
        page.evaluate(f"strike([0x80, {pitch}, 0])")
    waits(page, f"{READY} && state.answering")
    assert page.evaluate("state.phrase.notes.map((note) => note[2])") == [60, 64, 67]
    page.click("#drop-phrase")
    waits(page, f"{READY} && !state.answering")
    context.close()


def test_every_control_is_reached_and_named_by_the_keyboard_alone(served, tab):
    reached = []
    for _ in range(40):
        tab.keyboard.press("Tab")
        reached.append(tab.evaluate("document.activeElement.id || document.activeElement.dataset.choice"))
    wanted = {"left", "right", "equal", "both_bad", "auto", "file", "bars", "boldness", "listener", "reset"}
    assert wanted <= set(reached)
    unnamed = tab.evaluate(
        """[...document.querySelectorAll("button, input, select, a, canvas")].filter((it) => !it.closest("[hidden]") &&
        !(it.textContent.trim() || it.getAttribute("aria-label") || it.labels?.[0]?.textContent.trim() || it.title))
        .map((it) => it.outerHTML)"""
    )
    assert unnamed == []


@pytest.mark.parametrize(("width", "scheme"), [(390, "light"), (390, "dark"), (1200, "light"), (1200, "dark")])
def test_nothing_is_wider_than_the_window(browser, served, width, scheme, tmp_path):
    context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)
    context.set_default_timeout(PATIENCE_MS)
    page = context.new_page()
    page.goto(served.address)
    waits(page, READY)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    picture = page.screenshot(full_page=True)
    assert len(picture) > 10_000
    if folder := os.environ.get("FASTSMART_SCREENSHOTS"):
        Path(folder, f"live-{width}-{scheme}.png").write_bytes(picture)
    context.close()


@pytest.mark.slow
def test_thirty_choices_with_training_and_a_kill_in_the_middle(browser, tmp_path):
    """A listener who likes fast pieces; a policy is trained meanwhile, and plays."""
    server = Served(tmp_path / "taste", free_port(), ("--max-tokens", "60"))
    server.start()
    try:
        context = browser.new_context()
        context.set_default_timeout(PATIENCE_MS)
        page = context.new_page()
        page.goto(server.address)
        waits(page, READY)
        for number in range(30):
            faster = "state.pair[0].notes.length > state.pair[1].notes.length"
            press(page, "ArrowLeft" if page.evaluate(faster) else "ArrowRight")
            assert len(server.choices()) == number + 1
            if number == 15:
                server.kill()
                server.start()
                page.reload()
                waits(page, READY)
        waits(page, "state.policies.length > 1", LESSON_MS)
        waits(page, "state.policies.at(-1).now")
        learnt = page.evaluate("state.learnt")
        assert learnt["guessed"] == 10
        assert learnt["right"] >= 6
        assert learnt["followed"] > 0
        assert "ractice follows it" in page.text_content("#guesses")
        page.select_option("#policies", "0")
        page.click("#back")
        waits(page, "state.policies[0].now && state.policies.length === 1 && state.paused")
        exported = urlopen(f"{server.address}choices.jsonl").read().decode().splitlines()
        assert len([json.loads(line) for line in exported]) == 30
    finally:
        server.kill()
