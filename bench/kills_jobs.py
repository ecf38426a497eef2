"""The commands that `bench/kills.py` kills, their input, and what of each must come out the same."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastsmart.machine.files import JsonLines
from fastsmart.policy.hf_format import save_policy

SMALL = [
    *("sampling.group=4", "sampling.max_tokens=40", "reward.terms={variety=1, filled_beats=1}", "train.steps=6"),
    *("prompts.source=procedural", "train.prompts=2", "train.eval_prompts=4", "train.eval_every=2"),
    *("train.save_every=1", "train.listen=0", "train.threads=1", "audio.workers=1"),
]
PIPELINES = ("off", "overlap", "one-step-off")


@dataclass(frozen=True)
class Job:
    """A command, and what of its folder must come out the same.

    command : arguments to begin in a folder, or to go on there
    result  : what is compared, once it has ended
    """

    command: Callable[[Path], list[str]]
    result: Callable[[Path], Any]


def jobs(base: Path) -> dict[str, Job]:
    """Every command that writes; `base` holds their input."""
    tiny, songs = str(base / "tiny"), str(base / "songs")
    sets = [word for text in [*SMALL, f"policy.source={tiny}"] for word in ("--set", text)]
    found = {
        f"train {mode}": Job(
            lambda out, mode=mode: ["train", *sets, "--async", mode, "--out", str(out), "--resume=auto"], _metrics
        )
        for mode in PIPELINES
    }
    few = ["-n", "6", "--best-of", "2"]
    policies = ["--policy", tiny, "--policy", f"b={base / 'other'}"]
    rewards = ["--reward", "variety", "--reward", "typicality"]
    test = [str(base / "evaluation"), "--prompts", "2", "--seconds", "5"]
    sounds = ["--soundfont", str(base / "font.sf2"), "--workers", "1"]
    return found | {
        "pretrain": Job(lambda out: _pretraining(songs, out), lambda out: _hashed(out / "policy/model.safetensors")),
        "evaluate": Job(
            lambda out: ["evaluate", *policies, *sets, *few, "--out", str(out)],
            lambda out: [(out / name).read_text() for name in ("metrics.csv", "clips.csv")],
        ),
        "sweep": Job(
            lambda out: ["sweep", str(base / "sweep.toml"), "--out", str(out)],
            lambda out: (out / "evaluation" / "metrics.csv").read_text(),
        ),
        "score": Job(
            lambda out: ["score", songs, *rewards, "--resume", "--out", str(out / "scores.jsonl")],
            lambda out: sorted((out / "scores.jsonl").read_text().splitlines()),
        ),
        "render": Job(lambda out: ["render", songs, *sounds, "--out", str(out)], lambda out: _files(out, "*.wav")),
        "sample": Job(
            lambda out: ["sample", "--policy", tiny, "-n", "6", "--max-tokens", "60", "--out", str(out)],
            lambda out: _files(out, "*.mid"),
        ),
        "bank build": Job(lambda out: ["bank", "build", *sounds, "--max-seconds", "0.5"], _bank_holds),
        "listen make": Job(lambda out: ["listen", "make", *test, "--out", str(out)], _test_holds),
    }


def _pretraining(songs: str, out: Path) -> list[str]:
    sizes = ["--layers", "1", "--hidden", "16", "--ffn", "32", "--heads", "2", "--length", "64", "--batch", "4"]
    words = ["pretrain", "--midi", songs, "--out", str(out), *sizes, "--steps", "12", "--eval-every", "3"]
    words += ["--threads", "1"]
    return [*words, "--resume"] if any(out.glob("checkpoints/step-*")) else words


def _files(out: Path, pattern: str) -> dict[str, str]:
    """Hash of every file by its name, those that a reader would not see as whole included."""
    return {path.name: _hashed(path) for path in out.glob(pattern)}


def _test_holds(out: Path) -> tuple[int, int]:
    """Clips and trials of a listening test, whose names are random; its page is there."""
    key = json.loads((out / "key.json").read_text())
    assert all(clip in (out / "page" / "listen.html").read_text() for clip in key["clips"])
    return len(key["clips"]), len(key["trials"])


def _bank_holds(out: Path) -> list[list[str]]:
    """The notes that the index holds, each once, whatever their order."""
    (index,) = out.glob("bank/*/index.jsonl")
    lines = [json.loads(line) for line in index.read_text().splitlines() if line.strip()]
    return sorted([str(line["key"]), str(line["velocities"]), str(line["length"])] for line in lines)


def _metrics(run: Path) -> list[dict]:
    lines = JsonLines(run / "metrics.jsonl").lines()
    return [{key: value for key, value in line.items() if key not in ("time", "health")} for line in lines]


def _hashed(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def prepare(base: Path) -> None:
    """Small policies, songs, a soundfont, a sweep and an evaluation."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "helpers"))
    from tiny_policy import make_policy
    from tiny_soundfont import write_soundfont
    from token_sources import write_piece

    from fastsmart.tokens.vocabulary import load_vocabulary

    vocab = load_vocabulary("smart")
    small = {"hidden_size": 16, "intermediate_size": 32, "num_layers": 1}
    for seed, name in enumerate(("tiny", "other")):
        save_policy(make_policy(vocab, seed, **small), base / name)
    (base / "songs").mkdir()
    for seed in range(24):
        write_piece(base / "songs" / f"{seed:02d}.mid", seed)
    write_soundfont(base / "font.sf2")
    sets = [*SMALL, f"policy.source={base / 'tiny'}", "train.steps=2"]
    (base / "sweep.toml").write_text(
        f"prompts = 4\nbest_of = 0\nset = {json.dumps(sets)}\n[grid]\n'grpo.beta' = [0, 0.5]\n"
    )
