"""What components of an embedding add to a taste: python bench/records/taste-embedding/listeners.py --out JSON

Simulated listeners make 40 choices between clips of the shipped policy, pairs chosen by information, as on the page.
Each taste hears the fifteen named features, and beside them 0, 4 or 12 components of what the policy makes of a clip.
Three listeners have a utility made of named features (`simulated_listeners`), the fourth likes what is typical of real
pieces (the reward `typicality`), for which no feature has a name. Agreement is over pairs that are never played.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fastsmart  # noqa: F401  # isort: skip  # before torch: OpenMP's threads then wait politely

import numpy as np

sys.path.append(str(Path(__file__).parents[2]))
from results import write_result
from simulated_listeners import BAR, HIDDEN, SHARPNESS, TIE, Listener

from fastsmart.notes import NoteBatch
from fastsmart.policy.hf_format import load_policy
from fastsmart.reward import Clips, load_reward
from fastsmart.reward.taste import Taste
from fastsmart.reward.taste_embedding import ClipEmbedding
from fastsmart.reward.taste_features import Standard
from fastsmart.sampling import sample
from fastsmart.taste.choices import ANSWERS, Choice
from fastsmart.taste.pairs import next_pair
from fastsmart.taste.training import taste_config
from fastsmart.tokens.decode import decode
from fastsmart.tokens.prompts import make_prompts

POLICY, TYPICAL = "pop909-tiny", "what is typical of real pieces"
COMPONENTS = (0, 4, 12)
BASE, HELD_OUT, FINISHED, CHOICES = 256, 500, 48, 40


@dataclass(frozen=True)
class Given:
    """A listener whose utility of every clip is given, float64 [N], with the noise of `Listener`."""

    utility: np.ndarray

    def answer(self, left: int, right: int, random: np.random.Generator) -> str:
        return ANSWERS[random.choice(len(ANSWERS), p=self.probabilities(np.array([left]), np.array([right]))[0])]

    def probabilities(self, left: np.ndarray, right: np.ndarray) -> np.ndarray:
        u, v = self.utility[left], self.utility[right]
        logits = np.stack([u, v, TIE + (u + v) / 2, np.full(len(u), BAR * SHARPNESS)], axis=1)
        weights = np.exp(logits - logits.max(axis=1, keepdims=True))
        return weights / weights.sum(axis=1, keepdims=True)


def agreement(listener: Given, expected: np.ndarray, clips: np.ndarray) -> float:
    """Share of decisive answers about pairs of these clips that go to the one with the higher expected utility."""
    left, right = clips[::2], clips[1::2]
    p = listener.probabilities(left, right)
    first = np.where(expected[left] > expected[right], p[:, 0], p[:, 1])
    return float(first.sum() / p[:, :2].sum())


def run(table: np.ndarray, standard: Standard, utility: np.ndarray, seed: int) -> tuple[float, float]:
    """Agreement after 40 choices, and its ceiling."""
    random, listener = np.random.default_rng(seed), Given(utility)
    order = random.permutation(np.arange(BASE, len(table)))
    held_out, waiting = order[:HELD_OUT], [int(i) for i in order[HELD_OUT:]]
    taste, seen, choices = Taste.unknown(standard), set[str](), list[Choice]()
    finished, waiting = waiting[:FINISHED], waiting[FINISHED:]
    while len(choices) < CHOICES:
        pair = next_pair(taste, {str(i): table[i] for i in finished}, seen)
        assert pair is not None
        seen |= set(pair)
        finished = [i for i in finished if str(i) not in pair] + [waiting.pop(), waiting.pop()]
        choices.append(Choice(str(len(choices)), 0.0, "", *pair, listener.answer(int(pair[0]), int(pair[1]), random)))
        taste = Taste.fit(choices, {str(i): table[i] for i in map(int, seen)}, standard, taste)
    return agreement(listener, taste.mean(table), held_out), agreement(listener, utility, held_out)


def played(count: int) -> NoteBatch:
    """Clips of the shipped policy on training openings."""
    policy, config = load_policy(POLICY), taste_config(POLICY)
    prompts = make_prompts(config.prompts, policy.vocab, "train", 0, count)
    rollout = sample(policy, prompts, 1, config.sampling.max_tokens, config.sampling.temperature, 7)
    return decode(rollout.sequences(), policy.vocab, config.audio.max_seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=1200)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", required=True)
    options = parser.parse_args()
    notes = played(options.clips)
    first = notes.select(range(BASE))
    named = Standard.of(first)
    table = named.measure(notes)
    utilities = {hidden: Listener(named, hidden).utility(table) for hidden in HIDDEN if hidden != "at random"}
    typical = load_reward("typicality")(Clips(notes)).astype(np.float64)
    utilities[TYPICAL] = SHARPNESS * (typical - typical[:BASE].mean()) / typical[:BASE].std()
    every = ClipEmbedding.fit(POLICY, first, max(COMPONENTS))
    components = every(notes)
    runs: list[dict[str, Any]] = []
    for count in COMPONENTS:
        embedding = ClipEmbedding(every.policy, every.weights, every.centre, every.axes[:, :count]) if count else None
        whole = np.concatenate([table, components[:, :count]], axis=1)
        standard = Standard.of(whole[:BASE], embedding=embedding)
        for hidden, utility in utilities.items():
            found = [run(whole, standard, utility, seed) for seed in range(options.seeds)]
            values, ceiling = zip(*found, strict=True)
            row = {"listener": hidden, "components": count, "agreement": values, "ceiling": float(np.mean(ceiling))}
            runs.append(row)
            print(f"{hidden}, {count}: {np.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})", flush=True)
            write_result(options.out, {"clips": options.clips, "choices": CHOICES, "runs": runs})


if __name__ == "__main__":
    main()
