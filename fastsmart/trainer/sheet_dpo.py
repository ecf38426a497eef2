"""DPO on NotaGen: rounds of pieces in styles, scored as music, paired within their style, and preferred.

NotaGen's log-prob of a piece is a sum over the characters of patches, by a network of two levels, which no batch of
tokens holds; so its steps and checkpoints are of its own. Pairs, loss, rewards and the files of a run are those of
every other run. A checkpoint holds a file of the published form: its folder names the policy.

Shape letters: N pieces of a round, K pairs of it, P patches, C = 16 characters.
"""

from __future__ import annotations

import io
import json
import math
import shutil
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from fastsmart.audio import FluidSynthRenderer, listening_seconds, listening_settings, render_file
from fastsmart.config import Config
from fastsmart.dpo.losses import pair_loss
from fastsmart.dpo.pairs import choose, pairs_of_step, repeated
from fastsmart.errors import UserError
from fastsmart.machine.distributed import Ranks
from fastsmart.machine.files import atomic_folder, make_folder, os_errors_as_user_errors, read_file, write_atomic
from fastsmart.machine.hardware import compute_threads
from fastsmart.machine.signals import StopRequest, stop_signals
from fastsmart.notagen.engine import STYLE_MARK
from fastsmart.notagen.model import NotaGen
from fastsmart.notagen.weights import PUBLISHED, load_notagen, save_published
from fastsmart.notes import NoteBatch
from fastsmart.policy.device import resolved_device
from fastsmart.policy.hf_format import STATE_FILE, save_tensors, step_folders, step_of, weights_hash
from fastsmart.policy.optimizer import forget_moments, scheduled_rate, set_learning_rate, step_if_finite
from fastsmart.run.display import Display, Silent
from fastsmart.run.folder import TABLE_FILE, RunFolder
from fastsmart.run.listening_page import write_page
from fastsmart.run.provenance import machine, statistics_path
from fastsmart.sampling import RandomStream
from fastsmart.trainer.evaluate import before_after, outcome, rests_on, summarise, table_of
from fastsmart.trainer.outcome import MAX_SKIPPED
from fastsmart.trainer.sheets import SheetPlayer, Sheets, prompts_of
from fastsmart.trainer.update import known_mean
from fastsmart.words import counted

WEIGHTS_FILE, OPTIMIZER_FILE = "weights.pth", "optimizer.safetensors"
MOMENTS = ("step", "exp_avg", "exp_avg_sq")
UNREAD = "patch_level_decoder.base.wte.weight"
SUMS = ("loss", "chosen_gain", "rejected_gain", "margin", "accuracy", "penalised")


@dataclass(frozen=True)
class SheetRun:
    """Outcome of a run on NotaGen.

    path      : the run folder
    policy    : the newest checkpoint, which `load_notagen` reads
    step      : the last step
    exit_code : 0, or 128 + signal when it was asked to stop
    """

    path: Path
    policy: Path
    step: int
    exit_code: int


def train_sheets(
    config: Config,
    out: str | Path,
    resume: bool = False,
    display: Display | None = None,
    changes: Mapping[str, Any] | None = None,
) -> SheetRun:
    """Tune NotaGen as the sections dpo, train, reward, audio and sampling say, into the folder `out`.

    policy.source names the weights; prompts.styles the styles, in turn (or one behind an @ of the source);
    for each of sampling.max_tokens four characters are drawn, as the authors draw them. A run that was killed goes on
    to the same numbers on a CPU. `changes` are as of `train`.

    Raises UserError for what the user can mend, among it any other algorithm than "dpo".
    """
    if config.train.algorithm != "dpo":
        raise UserError(
            f"NotaGen is trained by preferences alone, and train.algorithm is {config.train.algorithm!r}; add --set "
            "train.algorithm=dpo, or begin with --preset notagen-dpo"
        )
    for key, value in (("dpo.training_set", config.dpo.training_set), ("train.average", config.train.average)):
        if value:
            raise UserError(
                f"{key} is for policies that write tokens, and {config.policy.source} is NotaGen; leave it out"
            )
    with RunFolder.open(out, config, resume, Ranks(), changes) as folder, stop_signals() as stop:
        return _Run(folder, display or Silent()).train(stop)


@dataclass(frozen=True)
class _Pairs:
    """Pairs of a round.

    chosen, rejected : int64 [K], numbers of pieces
    reference        : float64 [N], log-prob of each piece in a pair under the reference
    about            : what the lines of metrics say of them
    """

    chosen: np.ndarray
    rejected: np.ndarray
    reference: np.ndarray
    about: dict[str, Any]


class _Run:
    """The rest of a run, from where its folder is."""

    def __init__(self, folder: RunFolder, display: Display) -> None:
        config = folder.config
        self.folder, self.config, self.dpo, self.settings = folder, config, config.dpo, config.train
        self.show = display
        name, mark, style = config.policy.source.partition(STYLE_MARK)
        known = PUBLISHED[name].styled if name in PUBLISHED else True
        self.prompts = prompts_of([style] if mark else config.prompts.styles, known)
        self.statistics = statistics_path(config)
        device = resolved_device(config.policy)
        self.place = folder.path / "checkpoints"
        checkpoints = step_folders(self.place)
        torch.set_num_threads(self.settings.threads or (compute_threads() if device.type == "cpu" else 1))
        self.model = load_notagen(checkpoints[-1] if checkpoints else name, torch.float32, device)
        self.base = load_notagen(name, torch.float32, device) if self.dpo.reference == "base" else None
        rate, betas, decay = self.settings.learning_rate, self.settings.betas, self.settings.weight_decay
        self.optimizer = torch.optim.AdamW(self._learning().values(), rate, betas, weight_decay=decay, fused=True)
        self.steps_done = step_of(checkpoints[-1]) if checkpoints else 0
        if checkpoints:
            self._recall(checkpoints[-1])
        self.saved, self.skipped = self.steps_done, 0
        self._held: tuple[int, Sheets, _Pairs] | None = None

    def train(self, stop: StopRequest) -> SheetRun:
        """Take the steps that are left, and write what a person opens."""
        settings, folder = self.settings, self.folder
        folder.write_provenance(self._provenance())
        folder.metrics.forget_after(self.steps_done)
        with self.show, SheetPlayer(self.config, self.prompts, self.statistics) as player:
            self.show.start(self.config, folder.path, self.steps_done)
            if not self.steps_done and not folder.metrics.lines():
                self._line({"step": 0, "eval": self._evaluate(player, "before")})
            while self.steps_done < settings.steps and not stop:
                line = self._step(player)
                last, every = self.steps_done == settings.steps, settings.eval_every
                if last or (every and self.steps_done % every == 0):
                    line["eval"] = self._evaluate(player, "after" if last else "")
                self._line(line)
                self._give_up_after(line["skipped"])
                round_ends = self.steps_done % self.dpo.round_steps == 0
                if round_ends or (settings.save_every and self.steps_done % settings.save_every == 0):
                    self._save()
            if self.steps_done > self.saved or not self.saved:
                self._save()
        self._finish()
        if stop and self.steps_done < settings.steps:
            self.show.message(
                f"{signal.Signals(stop.signal_number).name}: saved at step {self.steps_done}; go on with: fastsmart "
                f"train --out {folder.path} --resume"
            )
        code = stop.exit_code if self.steps_done < settings.steps else 0
        return SheetRun(folder.path, step_folders(self.place)[-1], self.steps_done, code)

    def _give_up_after(self, skipped: bool) -> None:
        """Raise UserError where the gradient has not been finite several steps in a row; the weights still are."""
        self.skipped = self.skipped + 1 if skipped else 0
        if self.skipped >= MAX_SKIPPED:
            self._save()
            raise UserError(
                f"the gradient was not finite {MAX_SKIPPED} steps in a row, so nothing has been learnt since step "
                f"{self.steps_done - MAX_SKIPPED}; start again with a lower train.learning_rate"
            )

    def _step(self, player: SheetPlayer) -> dict[str, Any]:
        """Take a step on its pairs; the line of metrics."""
        began, (number, step) = time.perf_counter(), divmod(self.steps_done, self.dpo.round_steps)
        drawn = 0
        if self._held is None or self._held[0] != number:
            sheets, drawn = self._sheets(player, number, step)
            self._held = number, sheets, self._pairs(sheets, number, step)
        _, sheets, pairs = self._held
        if step == 0:
            forget_moments(self.optimizer)  # of the round before
        taken = pairs_of_step(len(pairs.chosen), self.dpo.pairs, step, (self.settings.seed, RandomStream.ROUND, number))
        means, norm, rate = self._learn(sheets, pairs, taken)
        self.steps_done += 1
        spent = time.perf_counter() - began
        scores, used = sheets.scores, np.union1d(pairs.chosen, pairs.rejected)
        characters = sheets.characters
        return {
            "step": self.steps_done,
            "reward": known_mean(scores.total),
            "terms": {name: known_mean(values) for name, values in scores.terms.items()},
            "notes": float(sheets.notes.mean()),
            "empty": int((sheets.notes == 0).sum()),
            "unscored": int(np.isnan(scores.total).sum()),
            "idle_completions": len(sheets) - len(used),
            "completion_tokens": float(characters.mean()),
            "staleness": step,
            "skipped": not math.isfinite(norm),
            "grad_norm": norm,
            "learning_rate": rate,
            **means,
            "round": {"number": number, **pairs.about},
            "time": {
                "step": spent,
                "tokens_per_s": float(characters.sum()) / spent if drawn else 0.0,
                "clips_per_s": drawn / spent,
            },
        }

    def _sheets(self, player: SheetPlayer, number: int, step: int) -> tuple[Sheets, int]:
        """The pieces of a round, and how many of them were drawn just now."""
        path = self.folder.path / "rounds" / f"sheets-{number:04d}.npz"
        weights = weights_hash(self.model) if step == 0 else ""
        if kept := Sheets.load(path, weights):
            return kept, 0
        if step:
            raise UserError(f"{path} is missing, and step {step} of its round needs it; copy it back, or remove the "
                            "run's checkpoints of that round")  # fmt: skip
        seed = self.settings.seed, RandomStream.ROUND, number
        sheets, _ = player.play(self.model, self.dpo.prompts, self.config.sampling.group, seed, self.show.stage)
        sheets.save(path, weights)
        return sheets, len(sheets)

    def _pairs(self, sheets: Sheets, number: int, step: int) -> _Pairs:
        """The pairs of a round, and what the reference says of their pieces."""
        reasons = {
            "empty": lambda: sheets.notes < self.dpo.fewest_notes,
            "duplicate": lambda: repeated(sheets.patches, sheets.pool),
            "cut-off": lambda: ~sheets.complete,
        }
        refused = {name: reasons[name]() for name in self.dpo.refuse}
        never, total = np.logical_or.reduce([np.zeros(len(sheets), bool), *refused.values()]), sheets.scores.total
        chosen, rejected = choose(total, sheets.pool, never, self.dpo.keep)
        about = {
            "pairs": len(chosen),
            "chosen_reward": known_mean(total[np.unique(chosen)]),
            "rejected_reward": known_mean(total[np.unique(rejected)]),
            "refused": {name: int(values.sum()) for name, values in refused.items()},
        }
        return _Pairs(chosen, rejected, self._reference(sheets, np.union1d(chosen, rejected), number, step), about)

    def _reference(self, sheets: Sheets, needed: np.ndarray, number: int, step: int) -> np.ndarray:
        """Log-prob of these pieces under the reference, float64 [N], computed once a round and kept."""
        path, found = self.folder.path / "rounds" / f"reference-{number:04d}.npy", np.zeros(len(sheets))
        if step and self.base is None:
            try:
                return np.load(path, allow_pickle=False)
            except (OSError, ValueError) as error:
                raise UserError(f"{path} cannot be read ({error}); copy it back") from error
        model = self.base or self.model
        with torch.no_grad():
            for done, i in enumerate(needed.tolist(), 1):
                found[i] = float(piece_logprob(model, sheets.patches[i], int(sheets.begins[i])))
                self.show.stage("reference", done, len(needed))
        content = io.BytesIO()
        np.save(content, found)
        write_atomic(path, content.getvalue())
        return found

    def _learn(self, sheets: Sheets, pairs: _Pairs, taken: np.ndarray) -> tuple[dict[str, float], float, float]:
        """Take an optimizer step on these pairs; gives the means of `SUMS`, gradient norm and learning rate."""
        settings, lengths = self.settings, sheets.characters
        course = settings.learning_rate, settings.schedule, settings.warmup
        rate = scheduled_rate(self.steps_done, settings.steps, *course)
        if not len(taken):  # nothing was better than anything else, so there is nothing to learn
            return dict.fromkeys(SUMS, float("nan")) | {"pairs": 0.0, "tokens": 0.0}, 0.0, rate
        total, dpo = np.zeros(len(SUMS)), self.dpo
        for number in taken.tolist():
            values: list[Tensor] = []
            for i in (int(pairs.chosen[number]), int(pairs.rejected[number])):
                scale = 1 / int(lengths[i]) if dpo.length_normalised else 1.0
                ours = piece_logprob(self.model, sheets.patches[i], int(sheets.begins[i]))
                values += [scale * ours[None], scale * torch.tensor([pairs.reference[i]], device=ours.device)]
            made = pair_loss(values[0], values[2], values[1], values[3], dpo.beta, dpo.penalty)
            (made.loss.sum() / len(taken)).backward()
            parts = (made.loss.detach(), made.chosen, made.rejected, made.margin)
            total += [*(float(part) for part in parts), float(made.chosen > made.rejected), float(made.chosen < 0)]
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), settings.max_grad_norm)
        set_learning_rate(self.optimizer, rate)
        step_if_finite(self.optimizer, norm)
        self.optimizer.zero_grad(set_to_none=True)
        means = dict(zip(SUMS, (total / len(taken)).tolist(), strict=True))
        return means | {"pairs": float(len(taken))}, float(norm), rate

    def _evaluate(self, player: SheetPlayer, label: str) -> dict[str, Any]:
        """Play train.eval_prompts pieces, the same random numbers each time; the summary. With a label some are kept
        to be heard."""
        count = self.settings.eval_prompts
        sheets, notes = player.play(self.model, count, 1, (self.settings.seed, RandomStream.EVALUATE), self.show.stage)
        some = [i for i in range(len(notes)) if notes.counts[i]][: self.settings.listen]
        if some and label:
            self._write_pieces(notes, some, label, player.pool is not None)
        return summarise(table_of(sheets.scores, notes))

    def _write_pieces(self, notes: NoteBatch, chosen: Sequence[int], label: str, heard: bool) -> None:
        """Pieces to listen to, MIDI and, where rewards listen, WAV."""
        folder, kept = make_folder(self.folder.listen), notes.select(chosen)
        for i in range(len(kept)):
            kept.to_midi(i, folder / f"{i + 1:02d}-{label}.mid")
        if heard:
            with FluidSynthRenderer(listening_settings(self.config.audio, listening_seconds(kept))) as renderer:
                for i in range(len(kept)):
                    render_file(kept, i, folder / f"{i + 1:02d}-{label}.wav", renderer=renderer)

    def _line(self, line: dict[str, Any]) -> None:
        self.folder.metrics.append(line)
        self.show.line(line)

    def _save(self) -> None:
        """Write a checkpoint, and remove the oldest beyond train.keep."""
        path = self.place / f"step-{self.steps_done:06d}"
        state = {
            f"{name}.{moment}": value.detach().cpu()
            for name, parameter in self._learning().items()
            for moment, value in self.optimizer.state.get(parameter, {}).items()
        }
        with atomic_folder(path) as part, os_errors_as_user_errors(path):
            save_published(self.model, part / WEIGHTS_FILE, step=self.steps_done)
            save_tensors(state, part / OPTIMIZER_FILE)
            (part / STATE_FILE).write_text(json.dumps({"step": self.steps_done}) + "\n", encoding="utf-8")
        self.saved = self.steps_done
        for old in step_folders(self.place)[: -self.settings.keep]:
            shutil.rmtree(old)

    def _recall(self, checkpoint: Path) -> None:
        """Take over the optimizer's state; raises UserError where it is damaged."""
        path = checkpoint / OPTIMIZER_FILE
        try:
            if json.loads(read_file(checkpoint / STATE_FILE))["step"] != self.steps_done:
                raise ValueError("it is of another step than its folder says")
            tensors = load_file(path)
            for name, parameter in self._learning().items() if tensors else ():  # none before the first step
                own = {moment: tensors[f"{name}.{moment}"] for moment in MOMENTS}
                if any(own[moment].shape != parameter.shape for moment in MOMENTS[1:]):
                    raise ValueError(f"{name} is of another shape")
                self.optimizer.state[parameter] = {
                    moment: value if moment == "step" else value.to(parameter.device) for moment, value in own.items()
                }
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} is damaged ({error}); remove {checkpoint} to go on from the one before") from error

    def _learning(self) -> dict[str, torch.nn.Parameter]:
        """Parameters by name, but for the one that nothing reads."""
        return {name: parameter for name, parameter in self.model.named_parameters() if name != UNREAD}

    def _finish(self) -> None:
        """After the last step, write the table of before and after, and the page to hear it by."""
        evaluations = {line["step"]: line["eval"] for line in self.folder.metrics.lines() if "eval" in line}
        before, after = evaluations.get(0), evaluations.get(self.settings.steps)
        if before and after and self.steps_done >= self.settings.steps:
            self.folder.write(TABLE_FILE, before_after(before, after, self.steps_done))
            title = f"{self.config.policy.source} before and after {counted(self.steps_done, 'step')}"
            write_page(self.folder.listen, title, outcome(before, after, None), rests_on(before))

    def _provenance(self) -> dict[str, Any]:
        name = self.config.policy.source
        base = self.base or (self.model if not self.steps_done else None)
        known = {} if base is None else {"policy": {"path": name, "sha256": weights_hash(base)}}
        return {"inputs": known, **machine()}


def piece_logprob(model: NotaGen, patches: np.ndarray, begin: int) -> Tensor:
    """Log-prob of a piece after its first `begin` patches, a float64 scalar: the sum over its characters.

    patches : uint8 [P, C]
    """
    device = next(model.parameters()).device
    whole = torch.from_numpy(patches.astype(np.int64)).to(device)[None]
    return model(whole)[0, begin - 1 :].double().sum()
