"""The folder of a run on disk: what a person opens, and what resume needs.

config.toml      the resolved configuration            checkpoints/step-000040/   policy, optimizer and state
run.json         what it ran with: versions, machine   listen/                    before and after, MIDI and WAV
metrics.jsonl    one line a step                       before_after.md            features and rewards
curves.png       the metrics as curves                 trace.json                 who did what when, for ui.perfetto.dev
live.json        while it runs: for `fastsmart top`    failed/                    clips and batches worth a look
held-out/        every clip of before and after, CSV   .lock                      while it runs: who writes here
rounds/          what rounds of clips were learnt      merged/run-1/              with [merge]: each run's own policy

The folder of a profile is marked by its profile.json: it looks like a run's, but nothing can go on from it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastsmart.config import Config, read_config, to_toml
from fastsmart.errors import UserError
from fastsmart.limits import require_kind
from fastsmart.machine.distributed import Ranks
from fastsmart.machine.files import JsonLines, make_folder, write_atomic
from fastsmart.machine.folder_lock import LEASE_S, FolderLock
from fastsmart.policy.checkpoints import Checkpoints
from fastsmart.run.line_check import whole_metrics
from fastsmart.run.resumed_config import changes_in_words, resumed_config

CONFIG_FILE = "config.toml"
METRICS_FILE = "metrics.jsonl"
PROVENANCE_FILE = "run.json"
TRACE_FILE = "trace.json"
LIVE_FILE = "live.json"
PROFILE_FILE = "profile.json"
TABLE_FILE = "before_after.md"


class RunFolder:
    """A run's files: `metrics` and `checkpoints` of a run with this `config`. As a context manager it ends with
    `close`."""

    def __init__(self, path: Path, config: Config, lock: FolderLock | None = None) -> None:
        self.path, self.config, self._lock = path, config, lock
        self._changed: list[str] = []  # what has another value than before, in words
        self.listen = path / "listen"
        self.metrics = JsonLines(path / METRICS_FILE, whole_metrics)
        self.checkpoints = Checkpoints(path / "checkpoints", config.train.keep, config.diversity.floor)

    @staticmethod
    def begun(path: str | Path) -> bool:
        """Whether a run in this folder has got so far that there is something to lose."""
        path = Path(path)
        metrics = JsonLines(path / METRICS_FILE, whole_metrics)
        return bool(metrics.lines() or metrics.damaged or Checkpoints(path / "checkpoints").all())

    @staticmethod
    def open(
        path: str | Path, config: Config, resume: bool, ranks: Ranks, changes: Mapping[str, Any] | None = None
    ) -> RunFolder:
        """`create` or `reopen`, by rank 0, which keeps other runs out of the folder until `close`; the other ranks find
        what it has left. The file system is one they share."""
        require_kind(config, Config, "config", "a Config, such as fastsmart.presets.demo()")
        require_kind(path, (str, Path), "out", "the name of a folder")
        if ranks.leader:
            folder = RunFolder._locked(Path(path), config, resume, changes or {})
        try:
            step = ranks.broadcast(folder.checkpoints.step if ranks.leader else 0)
            folder = folder if ranks.leader else RunFolder.reopen(path)
            if folder.checkpoints.step != step:
                raise UserError(
                    f"rank {ranks.rank} finds other checkpoints in {path} than rank 0; put it on a shared disk"
                )
        except BaseException:
            if ranks.leader:
                folder.close()
            raise
        return folder

    @staticmethod
    def _locked(path: Path, config: Config, resume: bool, changes: Mapping[str, Any]) -> RunFolder:
        """`create` or `reopen`, with nobody else in the folder."""
        _refuse_profile(path)
        if resume and not (path / CONFIG_FILE).exists():
            raise _no_run(path)
        make_folder(path)
        lock = FolderLock(path, "training", LEASE_S)
        try:
            folder = RunFolder.reopen(path, changes) if resume else RunFolder.create(path, config)
        except BaseException:
            lock.release()
            raise
        folder._lock = lock
        return folder

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Let other runs into the folder."""
        if self._lock:
            self._lock.release()

    @staticmethod
    def create(path: str | Path, config: Config) -> RunFolder:
        """A new run; raises UserError when the folder cannot be written or already holds one."""
        path = Path(path)
        _refuse_profile(path)
        if RunFolder.begun(path):
            raise UserError(f"{path} already holds a run; add --resume to go on with it, or choose another --out")
        make_folder(path)
        write_atomic(path / CONFIG_FILE, to_toml(config))
        return RunFolder(path, config)

    @staticmethod
    def reopen(path: str | Path, changes: Mapping[str, Any] | None = None) -> RunFolder:
        """A run to go on with, its config.toml written anew where there are `changes` (see `resumed_config`).

        Raises UserError when there is none, a key may not change, or the folder cannot be written.
        """
        path = Path(path)
        own = RunFolder.read(path)
        make_folder(path)
        if not changes:
            return own
        config = resumed_config(own.config, changes, path, own.checkpoints.step)
        write_atomic(path / CONFIG_FILE, to_toml(config))
        folder = RunFolder(path, config)
        folder._changed = changes_in_words(own.config, config)
        return folder

    @staticmethod
    def read(path: str | Path) -> RunFolder:
        """A run to look at, which may be read-only; raises UserError when there is none."""
        path = Path(path)
        _refuse_profile(path)
        if not (path / CONFIG_FILE).exists():
            raise _no_run(path)
        return RunFolder(path, read_config(path / CONFIG_FILE))

    @property
    def concluded(self) -> bool:
        """Whether the run has done its last step, been evaluated after it, and written its table."""
        steps, table = self.config.train.steps, self.path / TABLE_FILE
        lines = self.metrics.lines()
        if not lines or lines[-1]["step"] != steps or "eval" not in lines[-1] or self.checkpoints.step != steps:
            return False
        try:
            return table.read_text(encoding="utf-8").startswith(table_heading(steps))
        except (OSError, UnicodeDecodeError):
            return False

    @staticmethod
    def for_profile(path: str | Path, config: Config) -> RunFolder:
        """For a profile, in place of one that was there; raises UserError where there is anything else."""
        path = Path(path)
        if not (path / PROFILE_FILE).exists() and path.is_dir() and any(path.iterdir()):
            raise UserError(f"{path} holds something else than a profile; choose another --out")
        make_folder(path)
        write_atomic(path / PROFILE_FILE, "{}\n")  # the mark; the figures come when they have been taken
        write_atomic(path / CONFIG_FILE, to_toml(config))
        write_atomic(path / METRICS_FILE, "")
        return RunFolder(path, config)

    def write_provenance(self, record: dict) -> None:
        """Write run.json, or hold what is there against it: a run goes on only with the inputs it began with.

        Raises UserError naming the input that is another one now.
        """
        path = self.path / PROVENANCE_FILE
        if path.exists() and self.metrics.lines():
            before = _inputs(path)
            for name, now in record["inputs"].items():
                if before.get(name) != now:
                    raise UserError(
                        f"{self.path} was begun with another {name} ({_named(before.get(name))}) than is there now "
                        f"({_named(now)}); resume with the same"
                    )
            return
        write_atomic(path, json.dumps(record, indent=1) + "\n")

    def odd(self) -> list[str]:
        """Report of what could not be read or was changed when the run went on, a sentence each."""
        metrics = [f"{self.metrics.told}; kept in {self.metrics.aside.name}"] if self.metrics.told else []
        passed_over = [f"passed over {path.name}: {why}" for path, why in self.checkpoints.passed_over.items()]
        return metrics + passed_over + self._changed

    def held_out(self, label: str) -> Path:
        """File of the numbers of the held-out clips, of "before" or "after"."""
        return self.path / "held-out" / f"{label}.csv"

    def write(self, name: str, text: str) -> None:
        write_atomic(self.path / name, text)


def table_heading(steps: int) -> str:
    """First words of the table of a run of so many steps."""
    return f"# Before and after {steps} steps: "


def _refuse_profile(path: Path) -> None:
    if (path / PROFILE_FILE).exists():
        raise UserError(f"{path} holds a profile, not a run; choose another folder")


def _inputs(path: Path) -> dict[str, dict[str, str]]:
    """The inputs that a run began with, by its run.json."""
    try:
        inputs = json.loads(path.read_text(encoding="utf-8"))["inputs"]
        return {name: {key: str(value[key]) for key in ("path", "sha256")} for name, value in inputs.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{path} is damaged ({type(error).__name__}: {error}); put back a copy of it, or remove it to go on with "
            "the policy, soundfont and statistics that are there now"
        ) from error


def _no_run(path: Path) -> UserError:
    return UserError(f"no run to resume in {path}; leave out --resume to start one")


def _named(value: dict | None) -> str:
    return "none" if value is None else f"{value['path']}, sha256 {value['sha256'][:12]}"
