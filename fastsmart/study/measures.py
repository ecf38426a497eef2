"""The metrics of what policies played, each with its interval: rewards, features, diversity, and what went wrong."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from fastsmart.config import Config
from fastsmart.music.bootstrap import Draws, mean_draws, resample_weights
from fastsmart.music.diversity import diversity, prompt_numbers
from fastsmart.music.features import features
from fastsmart.music.rarefied import SIZES, Sizes
from fastsmart.music.training_set import TrainingSet
from fastsmart.notes import NoteBatch
from fastsmart.policy.transformer import Policy
from fastsmart.reward.constraints import Constraint
from fastsmart.study.by_style import by_style, known_moments
from fastsmart.study.clamp_measures import ClampMeasures
from fastsmart.study.embedding import Embedding, excerpt_states
from fastsmart.study.evaluation import Metric
from fastsmart.study.heard import Judges, heard
from fastsmart.study.outputs import Outputs, Progress
from fastsmart.tokens.prompts import asked_styles
from fastsmart.tokens.vocabulary import Vocabulary
from fastsmart.trainer.evaluate import TABLE_FEATURES

BOOTSTRAP_SEED = 0
Key = tuple[str, str, str]  # group, name, soundfont


@dataclass(frozen=True)
class Ruler:
    """Measures of the outputs of every policy of an evaluation; fitted on those of the first.

    weights   : of `resample_weights`
    good_from : reward on the first soundfont from which an output counts as good: the median of the first policy's
    training  : the pieces it was trained on, None = not given
    base      : the first policy, the embedding fitted on its outputs, and their similarities; None = embeddings are not
                measured
    judges    : of styles; none where none is asked for
    sizes     : how much of each output is compared
    clamp     : an encoder of music to measure with, None = not given
    first     : the outputs it was fitted on
    measured  : what has been measured, so that nothing is twice
    """

    weights: np.ndarray
    good_from: float
    training: TrainingSet | None = None
    base: tuple[Policy, Embedding, list[np.ndarray]] | None = None
    judges: Judges = field(default_factory=dict)
    sizes: Sizes = SIZES
    clamp: ClampMeasures | None = None
    first: Outputs | None = None
    measured: list[tuple[Outputs, dict[str, Draws]]] = field(default_factory=list)

    @staticmethod
    def fit(
        outputs: Outputs,
        training: TrainingSet | None = None,
        base: Policy | None = None,
        clamp: ClampMeasures | None = None,
        judges: Judges | None = None,
    ) -> Ruler:
        """Fit to the outputs of the first policy; `base` is that policy."""
        reward = next(iter(outputs.scores.values())).total
        known = reward[np.isfinite(reward)]
        good_from = float(np.median(known)) if len(known) else float("inf")
        weights = resample_weights(prompt_numbers(outputs.prompts), BOOTSTRAP_SEED)
        ruler = Ruler(weights, good_from, training, judges=judges or {}, clamp=clamp, first=outputs)
        if base is None:
            return ruler
        states = _states(base, outputs, ruler.sizes)
        embedding = Embedding.fit(states)
        return replace(ruler, base=(base, embedding, embedding.similarities(states)))

    def diversity(self, outputs: Outputs, notes: NoteBatch) -> dict[str, Draws]:
        """Every metric of `DIVERSITY` of outputs with these notes."""
        for known, results in self.measured:
            if known is outputs:
                return results
        reward = next(iter(outputs.scores.values())).total
        embedded = None
        if self.base is not None:
            policy, embedding, own = self.base
            embedded = own
            if outputs is not self.first:
                embedded = embedding.similarities(_states(policy, outputs, self.sizes))
        results = diversity(
            notes,
            outputs.completions,
            prompt_numbers(outputs.prompts),
            self.weights,
            self.training,
            BOOTSTRAP_SEED,
            good=np.nan_to_num(reward, nan=-np.inf) >= self.good_from,
            embedded=embedded,
            sizes=self.sizes,
        )
        self.measured.append((outputs, results))
        return results


def measure(
    played: Mapping[str, Outputs], vocab: Vocabulary, config: Config, ruler: Ruler, progress: Progress
) -> list[Metric]:
    """Every metric of every policy on the same resamples of the openings; changes are against the first policy."""
    tables: dict[str, dict[Key, tuple[Draws, float | None]]] = {}
    for label, outputs in played.items():
        tables[label] = _draws(outputs, vocab, config, ruler)
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


def _draws(outputs: Outputs, vocab: Vocabulary, config: Config, ruler: Ruler) -> dict[Key, tuple[Draws, float | None]]:
    """(group, name, soundfont) -> the metric on all resamples, and its standard deviation over outputs."""
    notes = outputs.notes(vocab, config.audio.max_seconds)
    table: dict[Key, tuple[Draws, float | None]] = {}

    def add(group: str, name: str, font: str, values: np.ndarray) -> None:
        values = np.asarray(values, np.float64)
        known = values[np.isfinite(values)]
        table[group, name, font] = (
            mean_draws(values, ruler.weights),
            float(known.std(ddof=1)) if len(known) > 1 else None,
        )

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
    first = next(iter(outputs.scores.values())).terms
    if Constraint.name in first:
        add("share", "outputs that meet every constraint", "", first[Constraint.name] == 1.0)
    sizes = ruler.sizes
    add("share", f"outputs of fewer than {sizes.notes} notes", "", notes.counts < sizes.notes)
    add("share", f"outputs of fewer than {sizes.tokens} tokens", "", outputs.completions.lengths < sizes.tokens)
    measured_diversity = ruler.diversity(outputs, notes)
    if ruler.clamp:
        measured_diversity = measured_diversity | ruler.clamp.draws(outputs.prompts, notes, vocab)
    for name, draws in measured_diversity.items():
        table["diversity", name, ""] = draws, None
    if config.prompts.styles:
        asked, reward = asked_styles(outputs.prompts, vocab), next(iter(outputs.scores.values())).total
        real = known_moments(ruler.judges.get("judge"))
        for name, draws in by_style(notes, asked, reward, ruler.weights, real, sizes).items():
            table["style", name, ""] = draws, None
    for name, found in heard(outputs, vocab, config.audio.max_seconds, ruler.judges).items():
        table["style", f"bits between asked and heard, {name}", ""] = found.information, None
        table["style", f"heard as asked, {name}", ""] = found.balanced, None
        for style, recall in found.recall.items():
            table["style", f"{style} heard as asked, {name}", ""] = recall, None
    return table


def best_of_point(k: int, outputs: Outputs, vocab: Vocabulary, config: Config, ruler: Ruler) -> dict[str, Any]:
    """A point of the best-of-n curve; its divergence from the base is at most log k - (k - 1) / k nats an output
    (Beirami et al. 2024, "Theoretical guarantees on the best-of-n alignment policy")."""
    reward = mean_draws(next(iter(outputs.scores.values())).total, ruler.weights)
    notes = outputs.notes(vocab, config.audio.max_seconds)
    measured = ruler.diversity(outputs, notes)
    return {
        "n": k,
        "kl_nats_at_most": float(np.log(k) - (k - 1) / k),
        "reward": asdict(reward.estimate()),
        "notes": asdict(mean_draws(notes.counts, ruler.weights).estimate()),
        "diversity": {name: asdict(draws.estimate()) for name, draws in measured.items()},
    }


def against(played: Mapping[str, Outputs], other: Outputs) -> dict[str, dict[str, float]]:
    """Reward of the outputs above that of the `other` ones by label, on the first soundfont."""
    weights = resample_weights(prompt_numbers(other.prompts), BOOTSTRAP_SEED)

    def draws(outputs: Outputs) -> Draws:
        return mean_draws(next(iter(outputs.scores.values())).total, weights)

    return {label: asdict(draws(outputs).minus(draws(other)).estimate()) for label, outputs in played.items()}


def _states(policy: Policy, outputs: Outputs, sizes: Sizes) -> np.ndarray:
    """Hidden states of `excerpt_states` over the outputs' token excerpts."""
    excerpts = sizes.token_excerpts(outputs.completions)
    return excerpt_states(policy, outputs.prompts, outputs.completions, excerpts)
