"""The metrics of what policies played, each with its interval: rewards, features, diversity, and what went wrong."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np

from fastsmart.config import Config
from fastsmart.music.bootstrap import Draws, mean_draws, resample_weights
from fastsmart.music.diversity import TrainingSet, diversity, prompt_numbers
from fastsmart.music.features import features
from fastsmart.study.evaluation import Metric
from fastsmart.study.outputs import Outputs, Progress
from fastsmart.tokens.vocabulary import Vocabulary
from fastsmart.trainer.evaluate import TABLE_FEATURES

BOOTSTRAP_SEED = 0
Key = tuple[str, str, str]  # group, name, soundfont


def measure(
    played: Mapping[str, Outputs], vocab: Vocabulary, config: Config, training: TrainingSet | None, progress: Progress
) -> list[Metric]:
    """Every metric of every policy on the same resamples of the prompts; changes are against the first policy."""
    weights = resample_weights(len(next(iter(played.values()))), BOOTSTRAP_SEED)
    tables: dict[str, dict[Key, tuple[Draws, float | None]]] = {}
    for label, outputs in played.items():
        tables[label] = _draws(outputs, vocab, config, weights, training)
        progress("measuring", len(tables), len(played))
    first, *others = tables
    metrics = []
    for key in tables[first]:
        draws = {label: table[key][0] for label, table in tables.items()}
        metrics.append(
            Metric(
                *key,
                values={label: d.estimate() for label, d in draws.items()},
                spread={label: table[key][1] for label, table in tables.items()},
                changes={label: draws[label].minus(draws[first]).estimate() for label in others},
            )
        )
    return metrics


def _draws(
    outputs: Outputs, vocab: Vocabulary, config: Config, weights: np.ndarray, training: TrainingSet | None
) -> dict[Key, tuple[Draws, float | None]]:
    """(group, name, soundfont) -> the metric on all resamples, and its standard deviation over outputs."""
    notes = outputs.notes(vocab, config.audio.max_seconds)
    table: dict[Key, tuple[Draws, float | None]] = {}

    def add(group: str, name: str, font: str, values: np.ndarray) -> None:
        values = np.asarray(values, np.float64)
        known = values[np.isfinite(values)]
        table[group, name, font] = mean_draws(values, weights), float(known.std(ddof=1)) if len(known) > 1 else None

    for font, scores in outputs.scores.items():
        add("reward", "reward", font, scores.total)
        add("reward", "reward of outputs with notes", font, np.where(notes.counts > 0, scores.total, np.nan))
        for name, values in scores.terms.items():
            add("reward", name, font, values)
    measured = features(notes)
    for name in TABLE_FEATURES:
        add("feature", name, "", measured[name])
    add("share", "empty outputs", "", notes.counts == 0)
    unscored = [np.isnan(scores.total) for scores in outputs.scores.values()]
    add("share", "outputs that could not be scored", "", np.any(unscored, axis=0))
    prompt = prompt_numbers(outputs.prompts)
    for name, draws in diversity(notes, outputs.completions, prompt, weights, training, BOOTSTRAP_SEED).items():
        table["diversity", name, ""] = draws, None
    return table


def best_of_point(k: int, outputs: Outputs, vocab: Vocabulary, config: Config) -> dict[str, Any]:
    """A point of the best-of-n curve; its divergence from the base is at most log k - (k - 1) / k nats an output
    (Beirami et al. 2024, "Theoretical guarantees on the best-of-n alignment policy")."""
    weights = resample_weights(len(outputs), BOOTSTRAP_SEED)
    reward = mean_draws(next(iter(outputs.scores.values())).total, weights)
    notes = outputs.notes(vocab, config.audio.max_seconds)
    measured = diversity(notes, outputs.completions, prompt_numbers(outputs.prompts), weights)
    return {
        "n": k,
        "kl_nats_at_most": float(np.log(k) - (k - 1) / k),
        "reward": asdict(reward.estimate()),
        "diversity": {name: asdict(draws.estimate()) for name, draws in measured.items()},
    }


def against(played: Mapping[str, Outputs], other: Outputs) -> dict[str, dict[str, float]]:
    """By label, how much more reward the outputs have than the `other` ones, on the first soundfont."""
    weights = resample_weights(len(other), BOOTSTRAP_SEED)

    def draws(outputs: Outputs) -> Draws:
        return mean_draws(next(iter(outputs.scores.values())).total, weights)

    return {label: asdict(draws(outputs).minus(draws(other)).estimate()) for label, outputs in played.items()}
