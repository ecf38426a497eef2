"""Whole files of every kind a command reads, small, for the mutations to start from."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from pathlib import Path

import numpy as np
import soundfile
from tiny_policy import make_policy
from tiny_soundfont import write_soundfont
from token_sources import write_piece

from fastsmart.cli import main
from fastsmart.config import to_toml
from fastsmart.policy.hf_format import save_policy, shipped_file
from fastsmart.presets import demo
from fastsmart.study.listening import ListeningSettings, trials_of
from fastsmart.tokens.vocabulary import load_vocabulary

OLD_RUN = Path(__file__).parents[1] / "run" / "old_run" / "run"
EVALUATE = [
    *("-n", "2", "--best-of", "0", "--set", "sampling.max_tokens=30", "--set", "reward.terms={variety=1}"),
    *("--set", "prompts.source=procedural"),
]
SWEEP = """\
preset = "demo"
set = ["train.prompts=4"]
prompts = 20
best_of = 4
[grid]
"grpo.beta" = [0.0, 0.04]
"policy.source" = ["pop909-tiny", "runs/a"]
"sampling.cuda_graph" = [true, false]
[[runs]]
name = "varied"
set = ["reward.terms.variety=4"]
"""
LIVE = {
    **{"pid": 2**22, "host": "elsewhere", "time": 1.0, "steps": 4, "step": 2, "stage": "render", "done": 1, "total": 3},
    "workers": [{"pid": 7, "in_hand": 1, "silent_s": 0.5}],
}
METRICS_EXTRA = {"health": {"rss_mb": 500.0, "shm_mb": 0.0, "files": 9, "workers_replaced": 1, "notes": ["resumed"]}}


def write_whole(base: Path) -> None:
    """Write them all into a folder."""
    write_piece(base / "piece.mid", 3, bars=6)
    soundfile.write(base / "sound.wav", 0.3 * np.sin(np.arange(4000) / 9), 16_000)
    soundfile.write(base / "sound.flac", 0.3 * np.sin(np.arange(4000) / 9), 16_000)
    write_soundfont(base / "font.sf2")
    save_policy(
        make_policy(load_vocabulary("smart"), hidden_size=16, intermediate_size=16, num_layers=1), base / "tiny"
    )
    shutil.copytree(OLD_RUN, base / "run")
    metrics = (base / "run" / "metrics.jsonl").read_text().splitlines()
    lines = [json.dumps(json.loads(line) | METRICS_EXTRA) for line in metrics]
    (base / "run" / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    (base / "run" / "live.json").write_text(json.dumps(LIVE))
    (base / "sweep.toml").write_text(SWEEP)
    (base / "config.toml").write_text(to_toml(demo()))
    shutil.copy(shipped_file("pop909-tiny", "typicality.json"), base / "typicality.json")
    rows = [{"path": f"{i}.mid", "variety": 0.5} for i in range(3)]
    (base / "scores.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for design in ("rating", "ab"):
        _write_test(base, design)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        code = main(["evaluate", "--policy", str(base / "tiny"), "--out", str(base / "evaluation"), *EVALUATE])
    assert code == 0


def _write_test(base: Path, design: str) -> None:
    """The key of a listening test, and one listener's answers to it."""
    settings = ListeningSettings(design, prompts=2, seconds=5.0)  # type: ignore[arg-type]
    music = [f"{policy}-{prompt}" for policy in ("base", "tuned") for prompt in range(2)]
    trials, checks = trials_of([*music, *(f"tones-{i}" for i in range(5))], 2, 2, settings)
    origin = {name: {"policy": name.split("-")[0], "prompt": int(name.split("-")[1])} for name in music}
    key = {
        **{
            "study": "s",
            "design": design,
            "policies": ["base", "tuned"],
            "evaluation": "e",
            "prompts": 2,
            "seconds": 5,
        },
        **{"passed_over": 0, "loudness_lufs": -20.0, "clips": origin, "checks": checks},
        "trials": {t["id"]: {"clips": t["clips"], "repeat": t["repeat"]} for t in trials},
    }
    given = [
        {
            "trial": t["id"],
            "clips": t["clips"],
            "answer": checks.get(t["id"], 3 if design == "rating" else t["clips"][0]),
        }
        for t in trials
    ]
    answers = {
        "study": "s",
        "design": design,
        "listener": "Ann",
        "session": "aa",
        "answers": given,
        "trials": len(trials),
    }
    (base / f"key-{design}.json").write_text(json.dumps(key))
    (base / f"answers-{design}.json").write_text(json.dumps(answers))
