"""Policies compared on the same held-out prompts: what they are worth, what their music is like, how diverse it is.

The folder of an evaluation:

config.toml       prompts, sampling, audio and rewards      metrics.csv   every metric of every policy, with intervals
evaluation.json   the same metrics, and where all came from clips.csv     rewards and features of every single output
tokenizer.json    the vocabulary                            outputs/      what each policy played, npz
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastsmart.config import Config, read_config, shortened
from fastsmart.errors import UserError
from fastsmart.machine.files import read_file
from fastsmart.machine.text_table import text_table
from fastsmart.music.bootstrap import LEVEL, Estimate, basis
from fastsmart.music.diversity import RAREFIED, prompt_numbers
from fastsmart.music.features import features
from fastsmart.run.folder import CONFIG_FILE
from fastsmart.study.outputs import Outputs
from fastsmart.tokens.vocabulary import Vocabulary, load_vocabulary
from fastsmart.trainer.evaluate import TABLE_FEATURES

EVALUATION_FILE = "evaluation.json"
OUTPUTS_FOLDER = "outputs"
LONGEST_LABEL = 200  # bytes
FORBIDDEN = set('/\\:*?"<>|')  # in a label, which is also a file name


@dataclass(frozen=True)
class PolicyRecord:
    """A policy that was evaluated.

    label      : its name in tables
    source     : where its weights came from
    sha256     : of its weights
    run        : folder of the run it came out of, "" for none
    soundfont  : sha256 of the soundfont it was trained with, "" where that is not known
    alpha      : of a blend, how far it is on the way from base to tuned weights; None = no blend
    """

    label: str
    source: str
    sha256: str
    run: str = ""
    soundfont: str = ""
    alpha: float | None = None


@dataclass(frozen=True)
class Metric:
    """One metric of all policies.

    group     : "reward", "feature", "diversity" or "share"
    name      : such as "consonance"; the weighted sum of the rewards is "reward"
    soundfont : it was heard on, "" where that does not matter
    values    : by label
    spread    : standard deviation over outputs by label, None where a metric has no value for a single output
    changes   : difference to the first policy by label, without the first
    """

    group: str
    name: str
    soundfont: str
    values: dict[str, Estimate]
    spread: dict[str, float | None]
    changes: dict[str, Estimate]


@dataclass(frozen=True)
class Evaluation:
    """An evaluation on disk; the first policy is the one all others are compared with.

    record   : what evaluation.json holds beside the metrics: prompts, soundfonts, best_of, reweighting, provenance
    """

    path: Path
    config: Config
    vocab: Vocabulary
    policies: list[PolicyRecord]
    metrics: list[Metric]
    record: dict[str, Any]

    @property
    def labels(self) -> list[str]:
        """All that was evaluated, with the best-of-n baseline after the policies."""
        return list(self.metrics[0].values)

    def metric(self, group: str, name: str, soundfont: str | None = None) -> Metric:
        """The first metric of that name (on that soundfont); raises KeyError when there is none."""
        for metric in self.metrics:
            if (metric.group, metric.name) == (group, name) and soundfont in (None, metric.soundfont):
                return metric
        raise KeyError(f"{group} {name}")

    def diversity(self) -> list[Metric]:
        """The metrics of diversity to conclude from: at equal size; else of whole outputs."""
        metrics = [m for m in self.metrics if m.group == "diversity"]
        return [m for m in metrics if m.name in RAREFIED] or metrics

    def outputs(self, label: str) -> Outputs:
        """Outputs of a policy; raises UserError when the file is gone."""
        path = outputs_path(self.path, label)
        found = Outputs.load(path)
        if found is None:
            raise UserError(f"{path} is gone; evaluate again into the same folder")
        return found

    def text(self) -> str:
        """A table for a terminal: every metric, with its interval, and its change where the interval excludes 0."""
        rows = [["", *self.labels]]
        for m in self.metrics:
            row = [f"{m.name} ({m.soundfont})" if m.soundfont and self._fonts > 1 else m.name]
            for label, e in m.values.items():
                change = m.changes.get(label)
                mark = "" if change is None or not change.is_sure else " +" if change.value > 0 else " -"
                row.append(f"{e.value:.3f} [{e.low:.3f}, {e.high:.3f}]{mark}" if np.isfinite(e.value) else "–")
            rows.append(row)
        marks = f"+ and -: above and below {self.labels[0]}, the {100 * LEVEL:.0f} % interval of the change excludes 0"
        return "\n".join([text_table(rows), marks, self.basis])

    @property
    def basis(self) -> str:
        """Number of outputs and openings that the metrics rest on, in words."""
        return "of each policy " + basis(self.record["prompts"], self.record["distinct_prompts"])

    @property
    def _fonts(self) -> int:
        return len({m.soundfont for m in self.metrics if m.soundfont})

    @staticmethod
    def open(path: str | Path) -> Evaluation:
        """Raises UserError when the folder holds no complete evaluation."""
        path = Path(path)
        try:
            tree = json.loads(read_file(path / EVALUATION_FILE).decode("utf-8"))
            policies = [PolicyRecord(**p) for p in tree.pop("policies")]
            metrics = [
                Metric(
                    **{key: m[key] for key in ("group", "name", "soundfont", "spread")},
                    values={label: estimate(e) for label, e in m["values"].items()},
                    changes={label: estimate(e) for label, e in m["changes"].items()},
                )
                for m in tree.pop("metrics")
            ]
            for label in (p.label for p in policies):
                if not isinstance(label, str) or not is_label(label):
                    raise ValueError(f"{shortened(repr(label))} cannot name a policy")
            if not policies or not isinstance(tree, dict):
                raise ValueError("it has no policies")
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(f"{path} is not an evaluation ({error}); make one with: fastsmart evaluate") from error
        return Evaluation(path, read_config(path / CONFIG_FILE), load_vocabulary(path), policies, metrics, tree)


def is_label(text: str) -> bool:
    """Whether it can name a policy, and the files of what the policy plays."""
    usual = text.isprintable() and not set(text) & FORBIDDEN and not text.startswith((".", "best of "))
    return usual and 0 < len(text.encode()) <= LONGEST_LABEL


def outputs_path(out: Path, label: str) -> Path:
    """File in which an evaluation keeps what a policy played."""
    return out / OUTPUTS_FOLDER / f"{label}.npz"


def metrics_csv(metrics: Sequence[Metric]) -> str:
    """One row for each metric of each policy."""
    sink = io.StringIO()
    writer = csv.writer(sink, lineterminator="\n")
    writer.writerow(
        ["group", "metric", "soundfont", "policy", "value", "low", "high", "std", "change", "change_low", "change_high"]
    )
    for m in metrics:
        for label, e in m.values.items():
            change = m.changes.get(label, Estimate(*[float("nan")] * 3))
            numbers = (e.value, e.low, e.high, m.spread[label], change.value, change.low, change.high)
            writer.writerow([m.group, m.name, m.soundfont, label, *map(_cell, numbers)])
    return sink.getvalue()


def clips_csv(played: Mapping[str, Outputs], vocab: Vocabulary, config: Config) -> str:
    """One row an output: what anyone's own statistics would start from."""
    sink = io.StringIO()
    writer = csv.writer(sink, lineterminator="\n")
    for at, (label, outputs) in enumerate(played.items()):
        measured = features(outputs.notes(vocab, config.audio.max_seconds))
        columns: dict[str, np.ndarray] = {}
        for font, scores in outputs.scores.items():
            columns[f"reward on {font}"] = scores.total
            columns |= {f"{name} on {font}": values for name, values in scores.terms.items()}
        columns |= {name: measured[name] for name in TABLE_FEATURES}
        if at == 0:
            writer.writerow(["policy", "prompt", "opening", *columns])
        openings = prompt_numbers(outputs.prompts)
        for i in range(len(outputs)):
            writer.writerow([label, i, openings[i], *(_cell(float(values[i])) for values in columns.values())])
    return sink.getvalue()


def _cell(value: float | None) -> str:
    return "" if value is None or not np.isfinite(value) else f"{value:.6g}"


def estimate(tree: Mapping[str, float | None]) -> Estimate:
    """An estimate as evaluation.json has it, where null stands for NaN."""
    return Estimate(*(float("nan") if (x := tree[key]) is None else x for key in ("value", "low", "high")))
