"""Counts what a reader follows through one training step of the demo.

    NUMBA_DISABLE_JIT=1 .venv/bin/python tests/helpers/step_path.py

Prints, file by file, the functions that a step runs and their lines, from `def` to the last one, docstrings counted. A
step is what the loop does between two calls of `Trainer.step`, on a CPU, with one reward that listens; a render worker
runs in a thread here, and functions of numba run as Python, so that both are seen. Left out are `HELPERS`, which say
what they do in their names, and the filling of the note bank: the step plays its batch once before it is counted.
"""

from __future__ import annotations

import ast
import json
import mmap
import os
import sys
import tempfile
import threading
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from types import CodeType, FrameType, SimpleNamespace
from typing import Any

from tiny_soundfont import write_soundfont

from fastsmart.audio import pool, worker
from fastsmart.config import merged
from fastsmart.presets import demo
from fastsmart.trainer import loop, trainer

ROOT = Path(__file__).resolve().parents[2]
HELPERS = (
    *("limits.py", "notes.py", "settings.py", "token_batch.py", "vocabulary.py"),
    *("fastsmart/machine/", "fastsmart/audio/batch.py", "fastsmart/run/trace.py", "fastsmart/run/display.py"),
    "kernels/jit.py",
)
SMALL = {
    "audio": {"workers": 1, "max_seconds": 2.0},
    "reward": {"terms": {"consonance": 1.0}},
    "sampling": {"group": 2, "max_tokens": 70},  # more than a block of the cache
    "train": {"prompts": 2, "steps": 3, "eval_prompts": 1, "eval_every": 0, "save_every": 0, "listen": 0, "threads": 1},
}


def functions_of_a_step(folder: Path) -> set[CodeType]:
    """Code of all functions that the second step of a small demo runs, in all threads."""
    seen: set[CodeType] = set()
    counting, whole_step = threading.Event(), trainer.Trainer.step

    def watch(frame: FrameType, event: str, _: Any) -> None:
        if event == "call" and counting.is_set():
            seen.add(frame.f_code)

    def step(self: trainer.Trainer, *given: Any) -> Any:
        counting.clear()
        if self.steps_done == 1:
            counting.set()
            seen.update({whole_step.__code__, sys._getframe(1).f_code, worker.serve.__code__})  # which run already
            self.sync_weights()
            counting.clear()
            self.worker.generate_step(1)
            counting.set()
        return whole_step(self, *given)

    config = merged(
        demo(), SMALL | {"audio": SMALL["audio"] | {"soundfont": str(write_soundfont(folder / "tiny.sf2"))}}
    )
    os.environ["FASTSMART_CACHE"] = str(folder / "cache")
    pool.start_worker, trainer.Trainer.step = _worker_in_a_thread, step  # type: ignore[method-assign]
    threading.setprofile(watch)
    sys.setprofile(watch)
    try:
        loop.train(config, folder / "run")
    finally:
        sys.setprofile(None)
    return seen


def _worker_in_a_thread(module: str, pipe: int, memory: int) -> Any:
    ours = Connection(os.dup(pipe)), mmap.mmap(memory, 0)
    threading.Thread(target=worker.serve, args=ours, daemon=True).start()
    return SimpleNamespace(pid=0, returncode=0, kill=lambda: None, wait=lambda: None)


def lines_by_file(seen: set[CodeType]) -> dict[str, dict[str, int]]:
    """Lines of each of these functions of ours, by file and name; those within another are part of it."""
    begun: dict[Path, set[int]] = {}
    for code in seen:
        begun.setdefault(Path(code.co_filename).resolve(), set()).add(code.co_firstlineno)
    found: dict[str, dict[str, int]] = {}
    for path, lines in sorted(begun.items()):
        if not any(path.is_relative_to(ROOT / room) for room in ("fastsmart", "kernels")) or path.suffix != ".py":
            continue
        name = str(path.relative_to(ROOT))
        if not name.startswith(HELPERS) and not name.endswith(HELPERS):
            for title, function in _outermost(ast.parse(path.read_text(encoding="utf-8"))):
                first = min([function.lineno, *(d.lineno for d in function.decorator_list)])
                if any(first <= line <= (function.end_lineno or 0) for line in lines):
                    found.setdefault(name, {})[title] = (function.end_lineno or 0) - function.lineno + 1
    return found


def _outermost(tree: ast.AST, owner: str = "") -> Iterator[tuple[str, ast.FunctionDef]]:
    """Functions that stand in no other one, under their names; those of a class after its name."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef):
            yield owner + node.name, node
        else:
            yield from _outermost(node, f"{node.name}." if isinstance(node, ast.ClassDef) else owner)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        table = lines_by_file(functions_of_a_step(Path(temporary)))
    for name, functions in table.items():
        print(f"{sum(functions.values()):5}  {name}: {', '.join(f'{n} {count}' for n, count in functions.items())}")
    print(json.dumps({"lines": sum(sum(f.values()) for f in table.values()), "files": len(table)}))
