"""What a held-out evaluation within a run says of diversity is what `fastsmart evaluate` says of the same clips."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch

from fastsmart import load_policy, presets
from fastsmart.config import Config, merged
from fastsmart.machine.distributed import Ranks
from fastsmart.music.rarefied import RAREFIED
from fastsmart.reward import Scores
from fastsmart.run.curves import curves
from fastsmart.sampling import Rollout
from fastsmart.sampling.rollout import pad
from fastsmart.study.measures import Ruler
from fastsmart.study.outputs import Outputs
from fastsmart.tokens.token_batch import TokenBatch
from fastsmart.trainer.evaluate import at_equal_size, before_after, evaluate, gather_completions
from fastsmart.trainer.rollout_worker import RolloutWorker

CLIPS = 10
NEEDS_MORE = {
    "rarefied_effective_good_outputs",
    "rarefied_effective_embeddings",
    "rarefied_effective_embeddings_order_2",
    "rarefied_new_ngrams",
    "rarefied_training_distance",
}


def completions_of(rollouts: list[Rollout]) -> TokenBatch:
    return TokenBatch.pack([r.ids[i, :n] for r in rollouts for i, n in enumerate(r.lengths)])


def prompts_of(rollouts: list[Rollout]) -> TokenBatch:
    return TokenBatch.pack([r.prompt_ids[i, :n] for r in rollouts for i, n in enumerate(r.prompt_lengths)])


@pytest.fixture(scope="module")
def evaluated():
    """The shipped policy on ten held-out openings, four at a time."""
    policy = load_policy("pop909-tiny")
    change = {
        "reward": {"terms": {"variety": 1.0}},
        "train": {"eval_prompts": CLIPS, "prompts": 1},
        "sampling": {"group": 4, "max_tokens": 200},
    }
    config: Config = merged(replace(presets.demo(), reward=Config().reward), change)
    with RolloutWorker(config, policy, "", torch.float32) as worker:
        scored, clips, summary = evaluate(worker)
    return policy, config, [s.rollout for s in scored], clips, summary


def test_a_run_measures_diversity_as_an_evaluation_of_the_same_clips_does(evaluated):
    policy, config, rollouts, clips, summary = evaluated
    unscored = Scores({}, np.zeros(CLIPS, np.float32))
    outputs = Outputs(prompts_of(rollouts), completions_of(rollouts), {"notes": unscored})
    wanted = Ruler.fit(outputs).diversity(outputs, outputs.notes(policy.vocab, config.audio.max_seconds))
    across = {name for name in RAREFIED if not name.endswith("_within")}  # no two clips are of one opening
    found = {name: value for name, value in summary["diversity"].items() if name.startswith("rarefied_")}
    assert found.keys() == across - NEEDS_MORE
    assert summary["openings"] == CLIPS
    assert found == pytest.approx({name: wanted[name].value for name in found})
    assert 1.5 < found["rarefied_effective_outputs"] < CLIPS
    assert summary["short"] == (clips.table["notes"] < 32).sum()


def test_what_was_measured_of_whole_clips_stays_beside_it(evaluated):
    *_, summary = evaluated
    names = [f"{name}_distance" for name in ("pitch_class", "onset", "move", "register", "dynamics")]
    assert [name for name in summary["diversity"] if not name.startswith("rarefied_")] == names


def test_two_clips_of_one_opening_are_compared_within_it(evaluated):
    policy, _, rollouts, _, _ = evaluated
    prompts, completions = prompts_of(rollouts), completions_of(rollouts)
    twice = [TokenBatch.pack([*batch, *batch]) for batch in (prompts, completions)]
    found = at_equal_size(*twice, policy.vocab, 10.0)
    assert found["rarefied_pitch_class_distance_within"] < found["rarefied_pitch_class_distance_across"]


def test_the_table_and_the_curves_show_diversity_at_equal_size(evaluated):
    *_, summary = evaluated
    table = before_after(summary, {**summary, "diversity": {}}, 1)
    value = summary["diversity"]["rarefied_self_bleu"]
    assert f"| diversity: rarefied self bleu | {value:.3f} | – | |" in table
    assert "Rarefied: of excerpts of 32 notes (128 tokens)" in table
    step = {"step": 1, "reward": 0.0, "notes": 1.0, "time": {"sample": 1.0}, "eval": summary}
    lines = [{"step": 0, "eval": summary}, step]
    for measured, wanted in ((summary["diversity"], 6), ({"pitch_class_distance": 0.5, "onset_distance": 0.5}, 2)):
        lines[0]["eval"] = {**summary, "diversity": measured}
        (panel,) = [axes for axes in curves(lines).axes if axes.get_title() == "diversity, held-out"]
        assert len(panel.lines) == wanted


@dataclass(frozen=True)
class Half(Ranks):
    """One of two ranks, whose rows meet in `rows`."""

    longest: int = 0
    rows: list[np.ndarray] = field(default_factory=list)

    def max(self, value: int) -> int:
        return max(value, self.longest)

    def gather(self, rows: np.ndarray, total: int) -> np.ndarray:
        self.rows.append(rows)
        return np.concatenate(self.rows)


def test_completions_of_two_ranks_come_together_in_order():
    pieces = [np.arange(1, n, dtype=np.int32) for n in (4, 1, 9, 3, 6)]

    def rollout(part: list[np.ndarray]) -> Rollout:
        (ids, lengths), nothing = pad(part, np.int32), np.zeros((len(part), 1), np.int32)
        return Rollout(nothing, nothing[:, 0], ids, lengths, ids.astype(np.float32), nothing[:, 0], 0)

    second = Half(1, 2, longest=8, rows=[])
    gather_completions([rollout(pieces[:1]), rollout(pieces[1:2])], replace(second, rank=0), 5)
    together = gather_completions([rollout(pieces[2:])], second, 5)
    assert [row.tolist() for row in together] == [piece.tolist() for piece in pieces]
