"""Everything a person listens to, held against its notes: files that commands and runs write, and clips in pages."""

from __future__ import annotations

import base64
import io
import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import mido
import numpy as np
import pytest
import soundfile

from fastsmart import load_policy, prompts, sample
from fastsmart.audio.faults import LOSSLESS, LOSSY, Hearing, audible_faults
from fastsmart.cli import main
from fastsmart.notes import NoteBatch, read_midi
from fastsmart.study.listening import PEAK_DB, ListeningSettings, make_test
from fastsmart.study.report import write_report
from fastsmart.study.sound import mp3
from fastsmart.trainer.evaluate import write_listening

TICKS_PER_S = 960  # mido's 480 a beat at 120 beats a minute


def faults(sound: Path | bytes, notes: NoteBatch, i: int, hearing: Hearing, end_s: float | None = None) -> list[str]:
    samples, rate = soundfile.read(sound if isinstance(sound, Path) else io.BytesIO(sound), dtype="float32")
    assert (rate, samples.shape[1]) == (48000, 2)
    onsets = notes.onset_s[notes.rows(i)]
    until = float(notes.end_s[i]) if end_s is None else end_s
    return audible_faults(samples, rate, onsets[onsets < until], until, hearing)


def write_crowd(path: Path, notes: int, pedal: bool) -> None:
    """Two seconds of rest, then many notes in a second; with `pedal`, it is put down and never lifted."""
    random = np.random.default_rng(notes)
    events = [(1.9, mido.Message("control_change", control=64, value=127))] if pedal else []
    for onset, key in zip(random.uniform(2.0, 3.0, notes), random.integers(36, 96, notes), strict=True):
        events.append((onset, mido.Message("note_on", note=int(key), velocity=80)))
        events.append((onset + 0.2, mido.Message("note_off", note=int(key))))
    track, now = mido.MidiTrack(), 0
    for at_s, message in sorted(events, key=lambda event: event[0]):
        tick = round(at_s * TICKS_PER_S)
        track.append(message.copy(time=tick - now))
        now = tick
    mido.MidiFile(tracks=[track], ticks_per_beat=480).save(path)


def test_files_of_render(tmp_path: Path) -> None:
    for name, notes, pedal in (("sparse", 3, False), ("dense", 300, False), ("pedal", 40, True)):
        write_crowd(tmp_path / f"{name}.mid", notes, pedal)
    for options in ([], ["--flac"], ["--reverb"]):
        assert main(["render", str(tmp_path), "--workers", "1", *options]) == 0
        written = sorted(tmp_path.glob("*.flac" if "--flac" in options else "*.wav"))
        assert len(written) == 3
        for path in written:
            found = faults(path, read_midi(path.with_suffix(".mid")), 0, LOSSLESS)
            assert not found, (path.name, options, found)


def test_files_of_sample(tmp_path: Path) -> None:
    assert main(["sample", "--out", str(tmp_path), "-n", "2", "--max-tokens", "100", "--wav"]) == 0
    assert len(list(tmp_path.glob("*.wav"))) == 2
    for path in tmp_path.glob("*.wav"):
        assert not faults(path, read_midi(path.with_suffix(".mid")), 0, LOSSLESS)


def test_files_a_run_leaves(evaluation, tmp_path: Path) -> None:
    policy = load_policy("pop909-tiny")
    rollout = sample(policy, prompts.procedural(policy.vocab, 2, seed=1), 1, 100, 1.0, 1)
    config = replace(evaluation.config, train=replace(evaluation.config.train, listen=2))
    worker = SimpleNamespace(config=config, vocab=policy.vocab, pool=True)
    write_listening(worker, [SimpleNamespace(rollout=rollout)], tmp_path, "before")  # type: ignore[arg-type,list-item]
    assert len(list(tmp_path.glob("*.wav"))) == 2
    for path in tmp_path.glob("*.wav"):
        assert not faults(path, read_midi(path.with_suffix(".mid")), 0, LOSSLESS)


def test_players_of_the_report(evaluation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastsmart.study.report.drawn_figures", lambda evaluation: [])  # they take longer than all else
    page = write_report(evaluation, tmp_path / "report.html", 2).read_text(encoding="utf-8")
    clips = [base64.b64decode(text) for text in re.findall(r'src="data:audio/mpeg;base64,([^"]+)"', page)]
    labels = [p.label for p in evaluation.policies]
    assert len(clips) == 2 * len(labels)
    for k, clip in enumerate(clips):
        notes = evaluation.outputs(labels[k % len(labels)]).notes(evaluation.vocab)
        assert not faults(clip, notes, k // len(labels), LOSSY)


def test_clips_of_a_listening_test(evaluation, tmp_path: Path) -> None:
    seconds = 5.0
    page, key = make_test(evaluation, tmp_path / "t", ListeningSettings(prompts=3, seconds=seconds))
    data = json.loads(re.search(r'id="notes">(.*?)</script>', page.read_text(encoding="utf-8")).group(1))
    told = json.loads(key.read_text())
    # the linear fade of half a second has come down to 2 % where the last 10 ms begin
    asked = replace(LOSSY, peak=(0.0, 10 ** ((PEAK_DB + 0.5) / 20)), lufs=told["loudness_lufs"], quiet=0.02)
    assert told["clips"]
    for name, origin in told["clips"].items():
        clip = base64.b64decode(data["clips"][name].split(",", 1)[1])
        notes = evaluation.outputs(origin["policy"]).notes(evaluation.vocab, seconds)
        assert not faults(clip, notes, origin["prompt"], asked, seconds)


# The check itself: each fault is found


def music(rate: int = 48000) -> np.ndarray:
    """A second of rest, a tone of a second that swells and falls, and its end."""
    at = np.arange(rate) / rate
    tone = np.sin(2 * np.pi * 440 * at) * np.sin(np.pi * at) ** 2
    clip = np.concatenate([np.zeros(rate), tone / np.abs(tone).max(), np.zeros(rate // 2)])
    return np.stack([clip, 0.5 * clip], axis=1).astype(np.float32)


def heard(samples: np.ndarray, hearing: Hearing = LOSSLESS) -> str:
    return " and ".join(audible_faults(samples, 48000, np.array([1.0, 1.5]), 2.0, hearing))


def test_sound_music_has_no_faults() -> None:
    assert heard(music()) == ""
    assert heard(music()[:, 0]) == ""
    assert audible_faults(np.zeros((100, 2)), 48000, np.zeros(0), 0.0) == []


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (
            lambda x: np.concatenate([x[:1000] + 1e-3, x[1000:]]),
            r"0\.0010 at 0\.000 s, before the first note at 1\.000",
        ),
        (lambda x: np.clip(3 * x, -1, 1), "clipped"),
        (lambda x: 2 * x, r"clipped: its peak is 2\.0"),
        (lambda x: 0.5 * x, r"peak is 0\.5000, and 0\.999 to 1 was asked for"),
        (lambda x: x[:90000], r"lasts 1\.875 s, and its notes 2\.000 s and it breaks off at -1. dB"),
        (lambda x: np.concatenate([x, np.full((4800, 2), 2e-4, np.float32)]), "breaks off at -74 dB"),
        (lambda x: np.concatenate([0 * x[:48000], x]), "loudest sample is at 2.* outside the music"),
        (lambda x: 0 * x, "all is silent, of 2 notes"),
        (lambda x: x * np.nan, "not finite"),
        (lambda x: x[:0], "no samples"),
    ],
    ids=["burst", "clipped", "beyond full scale", "quiet", "cut", "trimmed", "late", "silent", "nan", "empty"],
)
def test_each_fault_is_found(spoil, words: str) -> None:
    assert re.search(words, heard(spoil(music())))


def test_loudness_is_held_to_what_was_asked() -> None:
    from pyloudnorm import Meter

    loudness = Meter(48000).integrated_loudness(music().astype(np.float64))
    assert heard(music(), replace(LOSSLESS, lufs=loudness)) == ""
    assert "LUFS" in heard(music(), replace(LOSSLESS, lufs=loudness + 1.0))


def test_sound_where_there_are_no_notes_is_found() -> None:
    assert audible_faults(music(), 48000, np.zeros(0), 0.0) == ["there are no notes, but a sample of 1.0000"]


@pytest.mark.parametrize("constant", [False, True])
def test_encoded_clips_leave_room_for_decoders(constant: bool) -> None:
    """MP3 changes levels a little; what is at full scale before would be clipped by whoever plays it."""
    for seed in range(3):
        random = np.random.default_rng(seed)
        at, clip = np.arange(2 * 48000) / 48000, np.zeros(2 * 48000)
        for onset_s, hz in zip(random.uniform(0, 1.5, 30), random.uniform(60, 2000, 30), strict=True):
            since = np.maximum(at - onset_s, 0)
            clip += np.sin(2 * np.pi * hz * since) * np.exp(-6 * since)
        full = np.stack([clip, clip], axis=1).astype(np.float32) / np.float32(np.abs(clip).max())
        heard = soundfile.read(io.BytesIO(mp3(full, constant)))[0]
        assert 10 ** (-0.8 / 20) < np.abs(heard).max() < 10 ** (-0.3 / 20)
