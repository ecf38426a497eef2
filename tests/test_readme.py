"""The README's commands run in the order in which they are printed, each made small."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from token_sources import write_piece

from fastsmart.cli import main

README = Path(__file__).parents[1] / "README.md"
SETS = [
    *("sampling.max_tokens=60", "sampling.group=2", "train.steps=2", "train.prompts=2", "train.eval_prompts=2"),
    *("train.eval_every=0", "train.save_every=1", "train.listen=1", "train.threads=2", "audio.workers=1"),
]
SMALL_RUN = [word for text in SETS for word in ("--set", text)]
SHORT = ["--steps", "1", "--warmup", "0"]
SMALLER = {
    "pretrain": [
        *("--layers", "1", "--hidden", "32", "--ffn", "64", "--heads", "2", "--length", "64", "--steps", "4"),
        *("--eval-every", "2", "--threads", "2"),
    ],
    "train": SMALL_RUN,
    "bench": [*SMALL_RUN, *SHORT, "--rounds", "1"],
    "profile": [*SMALL_RUN, *SHORT],
    "sample": ["-n", "2", "--max-tokens", "120"],
    "bank": ["--clips", "1", "--max-seconds", "3"],
    "report": ["-n", "2", "--players", "1", "--best-of", "0"],
    "evaluate": ["-n", "2", "--best-of", "0", *SMALL_RUN],
    "listen": ["--prompts", "1", "--seconds", "5", "--checks", "1", "--repeats", "0"],
    "sweep": ["--dry-run"],
}
NEED_MORE = ("audiobox", "listen")  # weights that are not here; clips of five seconds, which small outputs may lack

SERVE = ("live",)  # until they are told to stop: tests/live/test_page.py


def commands() -> list[list[str]]:
    text = README.read_text().partition("## What it does")[2].partition("`--dry-run`")[0]
    return [shlex.split(line, comments=True)[1:] for line in re.findall(r"^ {4}(fastsmart .*)$", text, flags=re.M)]


def test_the_block_of_commands_is_found():
    names = {words[0] for words in commands()}
    assert names >= {
        "doctor",
        "selfcheck",
        "pretrain",
        "train",
        "sample",
        "score",
        "report",
        "evaluate",
        "listen",
        "sweep",
    }


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_commands_of_readme_work_one_after_the_other(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "DIR").mkdir()
    for seed in range(20):
        write_piece(tmp_path / "DIR" / f"{seed}.mid", seed, bars=24)
    write_piece(tmp_path / "my.mid", 0)
    (tmp_path / "docs").symlink_to(README.parent / "docs")
    for words in (words for words in commands() if words[0] not in SERVE):
        words = [word.replace("runs/demo", "runs/mine") for word in words]
        small = [] if "--resume" in words or words[0] == "selfcheck" else SMALLER.get(words[0], [])
        code = main([*words, *small])
        said = capsys.readouterr().err
        if code == 2 and any(name in words for name in NEED_MORE):
            assert said.count("fastsmart: ") == 1
            continue
        assert code == 0, (words, said)
    assert (tmp_path / "runs" / "mine" / "report.html").is_file()
    assert len(list((tmp_path / "more").glob("*.mid"))) == 2
