"""Held-out evaluation: the same prompts and the same random numbers before, during and after training."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastsmart.audio import FluidSynthRenderer, listening_seconds, listening_settings, render_file
from fastsmart.errors import UserError
from fastsmart.machine.distributed import Ranks
from fastsmart.machine.files import make_folder, write_atomic
from fastsmart.music.bootstrap import basis, effect_draws, resample_weights
from fastsmart.music.diversity import prompt_numbers
from fastsmart.music.features import features
from fastsmart.music.histograms import BINS, histograms, spread
from fastsmart.music.rarefied import NOTES, TOKENS, rarefied_diversity
from fastsmart.notes import NoteBatch
from fastsmart.reward import Scores
from fastsmart.reward.constraints import Constraint, share_met
from fastsmart.run.folder import table_heading
from fastsmart.run.listening_page import Outcome
from fastsmart.run.recorder import Recorder
from fastsmart.sampling import RandomStream, Rollout
from fastsmart.sampling.rollout import pad
from fastsmart.tokens.decode import decode
from fastsmart.tokens.prompts import make_prompts
from fastsmart.tokens.token_batch import TokenBatch
from fastsmart.tokens.vocabulary import Vocabulary
from fastsmart.trainer.rollout_pipeline import ScoredRollout
from fastsmart.trainer.rollout_worker import RolloutWorker
from fastsmart.words import counted

TABLE_FEATURES = (
    "notes",
    "notes_per_beat",
    "polyphony",
    "polyphony_rate",
    "empty_beat_rate",
    "scale_consistency",
    "pitch_range",
    "pitch_class_entropy",
    "mean_pitch",
    "mean_velocity",
    "velocity_range",
    "mean_duration_beats",
)


@dataclass(frozen=True)
class HeldOut:
    """The N clips of an evaluation, of all ranks.

    opening : int64 [N], equal for clips of equal prompts
    table   : see `table_of`
    """

    opening: np.ndarray
    table: dict[str, np.ndarray]

    def save(self, path: Path) -> None:
        """Write a CSV of one row a clip; raises UserError when the disk is full."""
        make_folder(path.parent)
        sink = io.StringIO()
        writer = csv.writer(sink, lineterminator="\n")
        writer.writerow(["opening", *self.table])
        for opening, *values in zip(self.opening.tolist(), *(v.tolist() for v in self.table.values()), strict=True):
            writer.writerow([opening, *("" if np.isnan(x) else repr(x) for x in values)])
        write_atomic(path, sink.getvalue())

    @staticmethod
    def load(path: Path) -> HeldOut | None:
        """Read what was saved; None where there is no such file. Raises UserError when it is damaged."""
        if not path.is_file():
            return None
        try:
            with open(path, encoding="utf-8", newline="") as source:
                names, *rows = csv.reader(source)
            columns = np.array([[float(x) if x else np.nan for x in row] for row in rows], np.float64).T
            table = dict(zip(names, columns, strict=True))
            return HeldOut(table.pop("opening").astype(np.int64), table)
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"{path} is damaged ({error}); delete it: the table will be without intervals") from error


def evaluate(
    worker: RolloutWorker, progress: Callable[[str, int, int], None] | None = None
) -> tuple[list[ScoredRollout], HeldOut, dict[str, Any]]:
    """Play the held-out prompts, one completion each.

    Every rank plays its share; the rollouts are this rank's, the clips and the summary those of all.
    """
    config, ranks, clips = worker.config, worker.ranks, worker.config.train.eval_prompts
    scored_rollouts = list(worker.generate_split("selection", clips, 1, RandomStream.EVALUATE, progress))
    table = clip_table(scored_rollouts)
    rows = ranks.gather(np.stack(list(table.values()), axis=1), clips)
    prompts_of_all = make_prompts(config.prompts, worker.vocab, "selection", 0, clips)
    opening = prompt_numbers(prompts_of_all)
    found = HeldOut(opening, dict(zip(table, rows.T, strict=True)))
    summary = summarise(found.table) | {"openings": int(opening.max()) + 1}
    played = histograms(NoteBatch.concat([p.notes for p in scored_rollouts]))
    together = {name: ranks.gather(rows, clips) for name, rows in played.items()}
    completions = gather_completions([p.rollout for p in scored_rollouts], ranks, clips)
    equal_size = at_equal_size(prompts_of_all, completions, worker.vocab, config.audio.max_seconds)
    return scored_rollouts, found, summary | {"diversity": spread(together) | equal_size}


def gather_completions(rollouts: Sequence[Rollout], ranks: Ranks, total: int) -> TokenBatch:
    """The completions of all ranks in order, `total` of them, from this rank's."""
    own = [r.ids[i, :length] for r in rollouts for i, length in enumerate(r.lengths)]
    table, lengths = pad(own, np.int32)
    wide = np.zeros((len(own), ranks.max(table.shape[1])), np.int32)
    wide[:, : table.shape[1]] = table
    rows = ranks.gather(np.column_stack([lengths, wide]).astype(np.float64), total).astype(np.int32)
    return TokenBatch.pack([row[1 : 1 + row[0]] for row in rows])


def at_equal_size(
    prompts: TokenBatch, completions: TokenBatch, vocab: Vocabulary, max_seconds: float
) -> dict[str, float]:
    """The metrics of `fastsmart.music.rarefied` that need no more than the N clips; those without an answer left out.

    prompts, completions : of N clips, which are decoded up to `max_seconds`
    """
    whole = TokenBatch.pack([np.concatenate(pair) for pair in zip(prompts, completions, strict=True)])
    opening, itself = prompt_numbers(prompts), np.ones((1, len(prompts)), np.float32)  # no resamples
    found = rarefied_diversity(decode(whole, vocab, max_seconds), completions, opening, itself)
    return {name: draws.value for name, draws in found.items() if np.isfinite(draws.value)}


def evaluate_held_out(worker: RolloutWorker, recorder: Recorder, label: str) -> dict[str, Any]:
    """Evaluate the engine's weights; gives `eval` and `time` for a line of metrics.

    With a label, the numbers of all clips are kept under it, and this rank's clips to listen to.
    """
    with worker.trace.excluding("evaluate"):
        scored_rollouts, clips, summary = evaluate(worker, recorder.stage)
        if label and worker.ranks.leader:
            try:
                clips.save(recorder.folder.held_out(label))
            except UserError as error:  # a full disk ends no run
                recorder.note(f"before_after.md will be without intervals: {error}")
            write_listening(worker, scored_rollouts, recorder.folder.listen, label)
    return {"eval": summary, "time": {"evaluate": worker.trace.pop_excluded_s()}}


def held_out_distance(diversity: Mapping[str, float]) -> float | None:
    """Mean distance (0..1) of two held-out clips at equal size, over the histograms of `BINS`: of clips of different
    prompts, or of one where there is no other; None in a summary without it.

    diversity : of a summary of `evaluate`
    """
    for pairs in ("across", "within"):
        parts = [diversity.get(f"rarefied_{name}_distance_{pairs}") for name in BINS]
        if (known := [part for part in parts if part is not None]) and len(known) == len(parts):
            return float(np.mean(known))
    return None


def clip_table(scored_rollouts: Sequence[ScoredRollout]) -> dict[str, np.ndarray]:
    """`table_of` the clips of all."""
    scores = Scores.concat([p.scores for p in scored_rollouts])
    return table_of(scores, NoteBatch.concat([p.notes for p in scored_rollouts]))


def table_of(scores: Scores, notes: NoteBatch) -> dict[str, np.ndarray]:
    """`reward`, `term <name>` for each of its terms and every feature of the N clips, float64 [N] each."""
    table = {"reward": scores.total} | {f"term {name}": values for name, values in scores.terms.items()}
    measured = features(notes)
    table |= {name: measured[name] for name in TABLE_FEATURES}
    return {name: np.asarray(values, np.float64) for name, values in table.items()}


def summarise(table: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Mean and standard deviation over clips of the reward, each of its terms and each feature; NaN left out.

    With the reward `constraint` also the share of clips that meet all of it. Then counts: all clips, those that could
    not be scored, those without a note, and those too short to be compared at equal size.
    """
    terms = {name.removeprefix("term "): values for name, values in table.items() if name.startswith("term ")}
    met = terms.get(Constraint.name)
    return {
        "reward": _moments(table["reward"]),
        "terms": {name: _moments(values) for name, values in terms.items()},
        **({} if met is None or not len(met) else {"constraints_met": share_met(met)}),
        "features": {name: _moments(table[name]) for name in TABLE_FEATURES},
        "clips": len(table["reward"]),
        "unscored": int(np.isnan(table["reward"]).sum()),
        "empty": int((table["notes"] == 0).sum()),
        "short": int((table["notes"] < NOTES).sum()),
    }


def write_listening(worker: RolloutWorker, scored_rollouts: Sequence[ScoredRollout], folder: Path, label: str) -> None:
    """Write this rank's first held-out clips, whole, as MIDI and 48 kHz stereo WAV: `NN-<label>.mid` and `.wav`."""
    config = worker.config
    if not config.train.listen:
        return
    make_folder(folder)
    sequences = [sequence for p in scored_rollouts for sequence in p.rollout.sequences()][: config.train.listen]
    whole = decode(sequences, worker.vocab)
    for i in range(len(whole)):
        whole.to_midi(i, folder / f"{i + 1:02d}-{label}.mid")
    if worker.pool:
        with FluidSynthRenderer(listening_settings(config.audio, listening_seconds(whole))) as renderer:
            for i in range(len(whole)):
                render_file(whole, i, folder / f"{i + 1:02d}-{label}.wav", renderer=renderer)


def before_after(before: dict, after: dict, steps: int, clips: tuple[HeldOut, HeldOut] | None = None) -> str:
    """A Markdown table of two summaries: mean ± standard deviation, and the change in standard deviations of before.

    clips : of before and after, for the intervals of the changes; None leaves them out
    """
    rows = [("reward", "reward", before["reward"], after["reward"])]
    rows += [(f"reward: {n}", f"term {n}", before["terms"][n], after["terms"][n]) for n in before["terms"]]
    rows += [(n.replace("_", " "), n, before["features"][n], after["features"][n]) for n in before["features"]]
    openings = before.get("openings")
    lines = [
        f"{table_heading(steps)}{rests_on(before).rstrip('.')}",
        "",
        f"| | before | after | change, in standard deviations of before{' [interval]' if clips else ''} |",
        "|---|---|---|---|",
    ]
    weights = resample_weights(clips[0].opening, 0) if clips else None
    for name, column, old, new in rows:
        known = old["std"] and new["mean"] is not None
        change = f"{(new['mean'] - old['mean']) / old['std']:+.2f}" if known else "–"
        if known and clips and weights is not None:
            e = effect_draws(clips[0].table[column], clips[1].table[column], weights).estimate()
            change += f" [{e.low:+.2f}, {e.high:+.2f}]" if np.isfinite(e.low) else ""
        lines.append(f"| {name} | {_cell(old)} | {_cell(new)} | {change} |")
    if "constraints_met" in before and "constraints_met" in after:
        met = before["constraints_met"], after["constraints_met"]
        lines.append(f"| clips that meet every constraint | {met[0]:.1%} | {met[1]:.1%} | |")
    lines += [
        f"| diversity: {name.replace('_', ' ')} | {_number(value)} | {_number(after['diversity'].get(name))} | |"
        for name, value in before.get("diversity", {}).items()
    ]
    if "short" in before:
        lines.append(f"| clips of fewer than {NOTES} notes | {before['short']} | {after['short']} | |")
    lines += [
        f"| empty clips | {before['empty']} | {after['empty']} | |",
        f"| clips that could not be scored | {before['unscored']} | {after['unscored']} | |",
    ]
    if clips and openings:
        lines += ["", f"Mean ± standard deviation over outputs. {basis(before['clips'], openings)}."]
    if any(name.startswith("rarefied_") for name in before.get("diversity", {})):
        lines += [
            "",
            f"Rarefied: of excerpts of {NOTES} notes ({TOKENS} tokens); other distances also depend on how many notes "
            "clips have.",
        ]
    return "\n".join(lines) + "\n"


def rests_on(before: dict) -> str:
    """A sentence that says how many outputs, on how many openings, a summary is of."""
    openings = before.get("openings")
    on = f"{openings} held-out openings" if openings else "held-out openings"
    return f"{counted(before['clips'], 'output')} on {on}."


def outcome(before: dict, after: dict, clips: tuple[HeldOut, HeldOut] | None) -> Outcome:
    """What two summaries say of reward and diversity; `clips`, of before and after, give the interval."""
    old, new, better, interval = before["reward"], after["reward"], None, None
    if old["std"] and new["mean"] is not None:
        better = (new["mean"] - old["mean"]) / old["std"]
        if clips:
            weights = resample_weights(clips[0].opening, 0)
            e = effect_draws(clips[0].table["reward"], clips[1].table["reward"], weights).estimate()
            interval = (e.low, e.high) if np.isfinite(e.low) else None
    apart = [held_out_distance(summary.get("diversity", {})) for summary in (before, after)]
    varied = apart[1] / apart[0] if apart[0] and apart[1] is not None else None
    return Outcome(better, interval, varied)


def _moments(values: np.ndarray) -> dict[str, float]:
    values = np.asarray(values, np.float64)
    values = values[np.isfinite(values)]
    if not len(values):
        return {"mean": float("nan"), "std": float("nan")}
    return {"mean": float(values.mean()), "std": float(values.std(ddof=1)) if len(values) > 1 else 0.0}


def _cell(moments: dict[str, float]) -> str:
    return f"{moments['mean']:.3f} ± {moments['std']:.3f}" if moments["mean"] is not None else "–"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"
