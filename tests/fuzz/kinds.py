"""What is made hostile: for each kind, a function from a seeded generator to one `Case`."""

from __future__ import annotations

import os
import random
import tomllib
from collections.abc import Callable
from functools import cache
from pathlib import Path

from nasty import changed_bytes, changed_json, changed_words, value
from stand import Case

from fastsmart.config import Config, to_toml

NOTES_REWARDS = (
    "--reward",
    "scale_consistency",
    "--reward",
    "polyphony_rate",
    "--reward",
    "variety",
    "--reward",
    "typicality",
)
TINY = ("tiny/config.json", "tiny/tokenizer.json", "tiny/model.safetensors")
RUN = ("config.toml", "metrics.jsonl", "run.json", "live.json")
CHECKPOINT = ("config.json", "tokenizer.json", "model.safetensors", "optimizer.safetensors", "state.json")
# Commands that end before they do heavy work: what they name is not there, or is small
COMMANDS = (
    ["train", "--preset", "demo", "--set", "train.steps=3", "--out", "out", "--dry-run"],
    ["train", "--config", "../base/config.toml", "--engine", "native", "--async", "off", "--dry-run"],
    ["train", "--out", "../base/run", "--resume", "--set", "train.steps=9", "--dry-run"],
    ["train", "--out", "none", "--resume", "--preset", "demo"],
    ["bench", "--set", "reward.terms={}", "--out", "out", "--steps", "1", "--warmup", "0", "--rounds", "1"],
    ["profile", "--set", "reward.terms={}", "--out", "out", "--steps", "1", "--warmup", "0"],
    ["pretrain", "--midi", "none", "--out", "out", "--steps", "1", "--layers", "1", "--hidden", "8", "--seed", "3"],
    [
        "sample",
        "--policy",
        "none",
        "--out",
        "out",
        "-n",
        "1",
        "--max-tokens",
        "4",
        "--tempo",
        "60",
        "90",
        "--seed",
        "1",
    ],
    ["sample", "--policy", "none", "--prompt", "../base/piece.mid", "--bars", "2", "--top-k", "3", "--top-p", "0.9"],
    ["render", "none.mid", "--out", "out", "--flac", "--workers", "1", "--soundfont", "../base/font.sf2"],
    ["score", "none.mid", "--reward", "variety", "--max-seconds", "3", "--device", "cpu", "--out", "out.jsonl"],
    ["score", "../base/piece.mid", "--reward", "variety", "--max-seconds", "3", "--dtype", "float32"],
    ["top", "../base/run", "--once"],
    ["bank", "info"],
    ["bank", "verify", "none.mid", "--clips", "1", "--max-seconds", "1", "--program", "0", "--sample-rate", "16000"],
    ["evaluate", "--policy", "a=none", "--policy", "b=none", "--out", "out", "-n", "2", "--best-of", "0"],
    ["report", "none", "--players", "0", "-n", "2", "--best-of", "0", "--out", "out.html"],
    ["listen", "make", "none", "--out", "out", "--design", "ab", "--prompts", "2", "--seconds", "5", "--checks", "1"],
    ["listen", "analyse", "none.json", "--key", "none.json", "--out", "out.json"],
    ["listen", "power", "--effect", "0.3", "--sd", "1", "--clip-sd", "0.4", "--taste-sd", "0.4", "--prompts", "15"],
    ["sweep", "../base/sweep.toml", "--out", "out", "--index", "0", "--dry-run"],
    ["sweep", "none.toml", "--out", "out", "--training-set", "none"],
    ["--version"],
    ["doctor", "extra"],
)


@cache
def keys() -> list[str]:
    """All keys of a configuration, and a few that do not exist."""
    found = []

    def walk(tree: dict, where: str) -> None:
        for key, inner in tree.items():
            if isinstance(inner, dict) and inner:
                walk(inner, f"{where}{key}.")
            else:
                found.append(f"{where}{key}")

    walk(tomllib.loads(to_toml(Config())), "")
    return [*found, "reward.terms.consonance", "reward.terms.variety", "train", "train.stepz", "x.y", "grpo.beta.gamma"]


def a_set(chance: random.Random, base: Path) -> Case:
    words = ["train", "--dry-run", *(["--preset", "demo"] if chance.random() < 0.5 else [])]
    for _ in range(1 if chance.random() < 0.8 else 3):
        words += ["--set", f"{chance.choice(keys())}={value(chance)}"]
    return Case("set", words)


def a_toml(chance: random.Random, base: Path) -> Case:
    if chance.random() < 0.4:
        text = changed_bytes(_read(base / "config.toml"), chance)
    else:
        section, _, key = chance.choice(keys()).rpartition(".")
        text = f"[{section or 'train'}]\n{key} = {value(chance)}\n".encode("utf-8", "surrogatepass")
    return Case("toml", ["train", "--dry-run", "--config", "c.toml"], {"c.toml": text})


def a_command(chance: random.Random, base: Path) -> Case:
    whole = chance.choice(COMMANDS)
    words = changed_words(whole, chance)
    heavy = {"train": "--dry-run", "sweep": "--dry-run"}
    goes_on = "--resume" in words and "none" in words  # what is not there
    if words[:1] and words[0] in heavy and not goes_on:
        words.append(heavy[words[0]])  # or it might really train
    if words[:2] == ["bank", "build"] or words[:1] in (["doctor"], ["selfcheck"]):
        words.append("extra")  # or it would do its work of a minute
    return Case("arguments", words, many=True)


def a_midi(chance: random.Random, base: Path) -> Case:
    files = {"a.mid": changed_bytes(_read(base / "piece.mid"), chance)}
    return Case("midi", ["score", "a.mid", *NOTES_REWARDS], files)


def a_phrase(chance: random.Random, base: Path) -> Case:
    files = {"a.mid": changed_bytes(_read(base / "piece.mid"), chance)}
    words = ["sample", "--policy", "../base/tiny", "--prompt", "a.mid", "-n", "1", "--max-tokens", "2", "--out", "out"]
    return Case("phrase", words + (["--bars", "2"] if chance.random() < 0.5 else []), files)


def a_rendering(chance: random.Random, base: Path) -> Case:
    files = {"a.mid": changed_bytes(_read(base / "piece.mid"), chance)}
    words = ["render", "a.mid", "--soundfont", "../base/font.sf2", "--out", "out", "--workers", "1"]
    return Case("rendering", words, files)


def a_soundfont(chance: random.Random, base: Path) -> Case:
    files = {"f.sf2": changed_bytes(_read(base / "font.sf2"), chance, 3)}
    words = ["render", "../base/piece.mid", "--soundfont", "f.sf2", "--out", "out", "--workers", "1"]
    return Case("soundfont", words, files)


def a_sound(chance: random.Random, base: Path) -> Case:
    name = chance.choice(("sound.wav", "sound.flac"))
    files = {name: changed_bytes(_read(base / name), chance)}
    return Case("sound", ["score", name, "--reward", "brightness", "--reward", "loudness_range"], files)


def a_policy(chance: random.Random, base: Path) -> Case:
    files = {name: _read(base / name) for name in TINY}
    name = chance.choice(TINY)
    files[name] = _changed(name, files[name], chance)
    words = ["sample", "--policy", "tiny", "-n", "1", "--max-tokens", "2", "--out", "out"]
    return Case("policy", words, files)


def a_run(chance: random.Random, base: Path) -> Case:
    files = {f"run/{name}": _read(base / "run" / name) for name in RUN}
    name = f"run/{chance.choice(RUN)}"
    files[name] = _changed(name, files[name], chance)
    return Case("run", ["top", "run", "--once"], files)


def a_resumption(chance: random.Random, base: Path) -> Case:
    files = {f"run/{name}": _read(base / "run" / name) for name in RUN}
    newest = sorted((base / "run" / "checkpoints").iterdir())[-1]
    for name in CHECKPOINT:
        if (newest / name).is_file() and not name.endswith("tensors"):
            files[f"run/checkpoints/{newest.name}/{name}"] = _read(newest / name)
    name = chance.choice(sorted(files))
    files[name] = _changed(name, files[name], chance)
    return Case("resumption", ["train", "--out", "run", "--resume", "--dry-run", "--set", "train.keep=2"], files)


def a_sweep(chance: random.Random, base: Path) -> Case:
    text = _read(base / "sweep.toml")
    if chance.random() < 0.5:
        text = changed_bytes(text, chance)
    else:
        lines = text.decode().splitlines()
        at = chance.randrange(len(lines))
        lines[at] = f"{lines[at].partition(' = ')[0]} = {value(chance)}"
        text = "\n".join(lines).encode("utf-8", "surrogatepass")
    return Case("sweep", ["sweep", "s.toml", "--out", "out", "--dry-run"], {"s.toml": text})


def an_answer(chance: random.Random, base: Path) -> Case:
    design = chance.choice(("rating", "ab"))
    files = {name: _read(base / f"{name.removesuffix('.json')}-{design}.json") for name in ("key.json", "answers.json")}
    name = chance.choice(sorted(files))
    files[name] = changed_json(files[name], chance)
    return Case("answers", ["listen", "analyse", "answers.json", "--key", "key.json"], files)


def a_score(chance: random.Random, base: Path) -> Case:
    files = {"s.jsonl": changed_lines(_read(base / "scores.jsonl"), chance)}
    return Case("scores", ["score", "../base/piece.mid", "--reward", "variety", "--out", "s.jsonl", "--resume"], files)


def statistics(chance: random.Random, base: Path) -> Case:
    files = {"t.json": changed_json(_read(base / "typicality.json"), chance)}
    return Case("statistics", ["score", "../base/piece.mid", *NOTES_REWARDS, "--statistics", "t.json"], files)


def an_evaluation(chance: random.Random, base: Path) -> Case:
    names = ("evaluation.json", "config.toml", "tokenizer.json", "outputs/tiny.npz")
    files = {f"e/{name}": _read(base / "evaluation" / name) for name in names}
    name = chance.choice(sorted(files))
    files[name] = _changed(name, files[name], chance)
    words = ["listen", "make", "e", "--out", "out", "--policy", "tiny", "--policy", "tiny2"]
    return Case("evaluation", words if chance.random() < 0.5 else words[:-4], files)


def _changed(name: str, content: bytes, chance: random.Random) -> bytes:
    """The content changed as befits a file of that name."""
    by_ending = {"json": changed_json, "jsonl": changed_lines}
    return by_ending.get(name.rpartition(".")[2], changed_bytes)(content, chance)


def changed_lines(content: bytes, chance: random.Random) -> bytes:
    """JSON lines of which one is changed."""
    lines = content.splitlines(keepends=True)
    at = chance.randrange(len(lines))
    lines[at] = changed_json(lines[at], chance) + (b"\n" if chance.random() < 0.8 else b"")
    return b"".join(lines)


@cache
def _read(path: Path) -> bytes:
    return Path(os.fspath(path)).read_bytes()


# of each kind, how to make a case, and its share of a thousand inputs
KINDS: dict[str, tuple[Callable[[random.Random, Path], Case], int]] = {
    "set": (a_set, 330),
    "toml": (a_toml, 170),
    "arguments": (a_command, 200),
    "midi": (a_midi, 90),
    "run": (a_run, 70),
    "sweep": (a_sweep, 50),
    "answers": (an_answer, 30),
    "scores": (a_score, 15),
    "resumption": (a_resumption, 15),
    "statistics": (statistics, 8),
    "policy": (a_policy, 8),
    "sound": (a_sound, 6),
    "evaluation": (an_evaluation, 4),
    "rendering": (a_rendering, 2),
    "phrase": (a_phrase, 1),
    "soundfont": (a_soundfont, 1),
}


def make(kind: str, seed: int, number: int, base: Path) -> Case:
    """The case of a kind with this number; the same for the same seed."""
    return KINDS[kind][0](random.Random(f"{seed} {kind} {number}"), base)
