"""The job behind `fastsmart evaluate`: play, score, measure, write."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from fastsmart.config import Config, to_toml
from fastsmart.errors import UserError
from fastsmart.machine.files import file_hash, make_folder, without_nan, write_atomic
from fastsmart.music.bootstrap import LEVEL, RESAMPLES
from fastsmart.music.diversity import prompt_numbers
from fastsmart.music.rarefied import NOTES, TOKENS
from fastsmart.music.training_set import TrainingSet, require_training_set
from fastsmart.notagen.engine import STYLE_MARK, SheetPolicy
from fastsmart.notagen.weights import is_notagen
from fastsmart.policy.blend import blend_alpha
from fastsmart.policy.device import resolved_device
from fastsmart.policy.hf_format import load_policy, weights_hash
from fastsmart.reward import RewardSettings
from fastsmart.run.folder import CONFIG_FILE, PROVENANCE_FILE
from fastsmart.run.provenance import machine
from fastsmart.study.choosing import reweighting
from fastsmart.study.clamp_measures import ClampMeasures, named_files
from fastsmart.study.evaluation import (
    EVALUATION_FILE,
    OUTPUTS_FOLDER,
    Evaluation,
    Metric,
    PolicyRecord,
    clips_csv,
    is_label,
    metrics_csv,
    outputs_path,
)
from fastsmart.study.heard import as_tree, heard, judges_of
from fastsmart.study.measures import Ruler, against, best_of_point, measure
from fastsmart.study.outputs import Outputs, Playable, Player, Progress, best_of_counts, named_soundfonts
from fastsmart.tokens.vocabulary import Vocabulary, load_vocabulary


def evaluate(
    sources: Sequence[str],
    out: str | Path,
    config: Config,
    prompts: int = 1000,
    best_of: int = 8,
    soundfonts: Sequence[str] = (),
    training_set: str | Path = "",
    progress: Progress = lambda stage, done, total: None,
    *,
    clamp: str = "",
    clamp_styles: str = "",
) -> Evaluation:
    """Have every policy play the same held-out prompts, measure, and write the folder `out`.

    sources      : shipped names, checkpoint or run folders, or hub ids, each perhaps as `LABEL=SOURCE`; the others are
                   compared with the first
    config       : its prompts, sampling, audio and reward sections are what is used, and its train.seed
    best_of      : outputs of the first policy the best-of-n baseline chooses from; below 2 there is none
    soundfonts   : to score on beside the one of `config.audio`
    training_set : folder of MIDI files or of an encoded dataset, to look for copies in; "" = none
    clamp        : weights of an encoder of music to measure with, as of `reward.clamp_checkpoint`; "" = none
    clamp_styles : real music it compares with, a file of `fastsmart style-stats`; "" = none

    What is already in `out` from the same policy and settings is not played again. Raises UserError for whatever the
    user can mend.
    """
    pairs = labelled(sources)
    require_training_set(training_set, "--training-set")
    named_files(clamp, clamp_styles)
    store = OutputStore(out, config, prompts, soundfonts)
    records, base, played, best = _played(pairs, store, best_of, progress)
    vocab, first = base.vocab, played[pairs[0][0]]
    training = store.training_set(training_set, vocab, progress) if training_set else None
    progress("fitting on the first policy", 0, 1)
    measures = ClampMeasures.of(clamp, clamp_styles, vocab, store.device) if clamp else None
    judges = judges_of(config, records[0].source)
    embedder = None if isinstance(base, SheetPolicy) else base
    ruler = Ruler.fit(first, training, embedder, measures, judges)
    curve = [best_of_point(k, outputs, vocab, config, ruler) for k, outputs in best.items()]
    margin = against(played, best[best_of]) if best else {}
    progress("re-weighting the first policy's outputs", 0, 1)
    weighted = reweighting(first, first.notes(vocab, config.audio.max_seconds), ruler.base and ruler.base[2])
    if best:
        played[best_of_label(best_of)] = best[best_of]
    metrics = measure(played, vocab, config, ruler, progress)
    tree = _about(store, first, ruler, training_set) | {
        "best_of": curve,
        "reweighting": weighted,
        "against_best_of": margin,
        "policies": [asdict(r) for r in records],
        "metrics": [asdict(m) for m in metrics],
    }
    if measures:
        tree["clamp"] = measures.about(config.reward)
    if judges:
        seconds = config.audio.max_seconds
        tree["styles"] = {label: as_tree(heard(o, vocab, seconds, judges)) for label, o in played.items()}
    store.write(tree, metrics, played, vocab)
    return Evaluation.open(store.out)


def _played(
    pairs: Sequence[tuple[str, str]], store: OutputStore, best_of: int, progress: Progress
) -> tuple[list[PolicyRecord], Playable, dict[str, Outputs], dict[int, Outputs]]:
    """Have every policy play: what is known of each, the first of them, outputs by label, and the best of the first's
    outputs by how many they were chosen from. Raises UserError where two have no common vocabulary."""
    records: list[PolicyRecord] = []
    policies: list[Playable] = []
    played: dict[str, Outputs] = {}
    best: dict[int, Outputs] = {}
    for label, source in pairs:
        record, policy, played[label] = store.play(label, source, progress)
        if policies and policies[0].vocab.tokens != policy.vocab.tokens:
            raise UserError(f"{source} has another vocabulary than {records[0].source}; they share no prompts")
        if not records and best_of > 1:
            best = store.best_of(record, policy, best_of, progress)
        records.append(record)
        policies = policies or [policy]
    return records, policies[0], played, best


ABOUT_STYLES = ("styles", "style_judge")  # keys of the config


class OutputStore:
    """Folder of what policies played: each plays once, and its outputs are found there the next time.

    Arguments as of `evaluate`. Raises UserError when the folder cannot be written, or a soundfont or reward cannot be
    used.
    """

    def __init__(self, out: str | Path, config: Config, prompts: int, soundfonts: Sequence[str] = ()) -> None:
        if prompts < 2:
            raise UserError(f"{prompts} prompts cannot be compared; evaluate at least 2")
        self.out = make_folder(out)
        make_folder(self.out / OUTPUTS_FOLDER)
        self.config, self.prompts = config, prompts
        self.device = str(resolved_device(config.policy))
        self.player = Player(config, named_soundfonts([config.audio.soundfont, *soundfonts]), self.device)

    def play(self, label: str, source: str, progress: Progress) -> tuple[PolicyRecord, Playable, Outputs]:
        """Have a policy play the held-out prompts; raises UserError when it cannot be loaded."""
        policy = self._loaded(source)
        record = _record(label, source, policy)
        path, mark = outputs_path(self.out, label), self._mark(record)
        outputs = Outputs.load(path, mark)
        if outputs is None:
            outputs = self.player.play(policy, self.prompts, _under(label, progress))
            outputs.save(path, mark)
        return record, policy, outputs

    def _loaded(self, source: str) -> Playable:
        vocabulary = self.config.policy.vocabulary
        if is_notagen(source.partition(STYLE_MARK)[0]):
            return SheetPolicy(source, load_vocabulary(vocabulary or "smart"), self.device)
        return load_policy(source, device=self.device, vocabulary=vocabulary)

    def best_of(self, record: PolicyRecord, policy: Playable, n: int, progress: Progress) -> dict[int, Outputs]:
        """The best of the first 2, 4 ... n of n outputs a prompt, by the reward on the first soundfont."""
        mark = self._mark(record) + f" best of {n}"
        paths = {k: outputs_path(self.out, best_of_label(k)) for k in best_of_counts(n)}
        kept = {k: Outputs.load(path, mark) for k, path in paths.items()}
        found = {k: outputs for k, outputs in kept.items() if outputs is not None}
        if len(found) < len(paths):
            found = self.player.best_of(policy, self.prompts, n, _under(best_of_label(n), progress))
            for k, outputs in found.items():
                outputs.save(paths[k], mark)
        return found

    @property
    def soundfonts(self) -> dict[str, dict[str, str]]:
        """Path and SHA-256 of every soundfont that outputs are scored on, by name; none where no reward listens."""
        fonts = self.player.soundfonts.items() if self.player.needs_audio else ()
        return {name: {"path": str(path), "sha256": file_hash(path)} for name, path in fonts}

    def training_set(self, source: str | Path, vocab: Vocabulary, progress: Progress) -> TrainingSet:
        """The pieces that copies are looked for in; MIDI files are encoded into `out` once."""
        return TrainingSet.open(source, self.out / "training-set", vocab, partial(progress, "reading MIDI files"))

    def write(
        self, tree: dict[str, Any], metrics: Sequence[Metric], played: Mapping[str, Outputs], vocab: Vocabulary
    ) -> None:
        """Write the files of the evaluation, the one that makes it whole last."""
        write_atomic(self.out / CONFIG_FILE, to_toml(self.config))
        vocab.save(self.out)
        write_atomic(self.out / "metrics.csv", metrics_csv(metrics))
        write_atomic(self.out / "clips.csv", clips_csv(played, vocab, self.config))
        write_atomic(self.out / EVALUATION_FILE, json.dumps(without_nan(tree), indent=1) + "\n")

    def _mark(self, record: PolicyRecord) -> str:
        """Hash of all that the outputs of a policy and their scores depend on."""
        audio, fonts = replace(self.config.audio, soundfont="", workers=0), self.player.soundfonts
        sections = (self.config.prompts, self.config.sampling, audio)
        tree = [
            [*(_given(section) for section in sections), _reward_mark(self.config.reward)],
            [self.config.train.seed, self.prompts, record.sha256, *_asked_style(record)],
            [[name, file_hash(path) if path.is_file() else ""] for name, path in fonts.items()],
        ]
        return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()


def _given(section: Any) -> dict[str, Any]:
    """A section of the config; without what has to do with styles where nothing is said of it, as in evaluations that
    are older than them."""
    return {key: value for key, value in asdict(section).items() if key not in ABOUT_STYLES or value}


def labelled(sources: Sequence[str]) -> list[tuple[str, str]]:
    """(label, source) of each policy; raises UserError when there is none, or two have one label."""
    pairs = []
    for text in sources:
        label, equals, source = text.partition("=")
        pairs.append((label, source) if equals else (Path(text).name or text, text))
    labels = [label for label, _ in pairs]
    if not pairs:
        raise UserError("name the policies to evaluate with --policy, for example --policy pop909-tiny")
    for label in labels:
        if labels.count(label) > 1:
            raise UserError(f"two policies are called {label!r}; name them apart with --policy LABEL=SOURCE")
        if not is_label(label):
            raise UserError(f"{label!r} cannot name a policy here; give it another name with --policy LABEL=SOURCE")
    return pairs


def best_of_label(n: int) -> str:
    """Label of the best-of-n baseline in tables."""
    return f"best of {n}"


def _record(label: str, source: str, policy: Playable) -> PolicyRecord:
    run = Path(source)
    provenance = run / PROVENANCE_FILE
    if not (run / CONFIG_FILE).is_file() or not provenance.is_file():
        return PolicyRecord(label, source, weights_hash(policy), alpha=blend_alpha(run))
    font = json.loads(provenance.read_text(encoding="utf-8"))["inputs"].get("soundfont")
    return PolicyRecord(label, source, weights_hash(policy), str(run.resolve()), font["sha256"] if font else "")


def _asked_style(record: PolicyRecord) -> list[str]:
    name, _, style = record.source.partition(STYLE_MARK)
    return [style] if is_notagen(name) else []


def _reward_mark(settings: RewardSettings) -> dict[str, Any]:
    """The rewards that outputs are scored by: of a taste what its file holds, and no options of terms that are not."""
    tree = _given(settings)
    tree["taste"] = file_hash(settings.taste) if "taste" in settings.terms else None
    options = {"taste": ("taste", "taste_caution"), "constraint": ("constraint",)}
    unused = [key for term, keys in options.items() if term not in settings.terms for key in keys]
    return {key: value for key, value in tree.items() if key not in unused}


def _about(store: OutputStore, outputs: Outputs, ruler: Ruler, training_set: str | Path) -> dict[str, Any]:
    """Conditions of an evaluation, for evaluation.json; `outputs` are those of one of its policies."""
    return {
        "prompts": store.prompts,
        "distinct_prompts": int(prompt_numbers(outputs.prompts).max()) + 1,
        "seed": store.config.train.seed,
        "level": LEVEL,
        "resamples": RESAMPLES,
        "soundfonts": store.soundfonts,
        "compared": {"notes": NOTES, "tokens": TOKENS, "good_from": ruler.good_from},
        "training_set": str(Path(training_set).resolve()) if training_set else "",
        **machine(),
    }


def _under(label: str, progress: Progress) -> Progress:
    """Progress of one policy's stages."""
    return lambda stage, done, total: progress(f"{label}: {stage}", done, total)
