"""The whole run as one tree of frozen dataclasses: TOML in, resolved TOML out."""

from __future__ import annotations

import json
import math
import tomllib
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from fastsmart.audio.settings import RenderSettings
from fastsmart.credit.settings import CreditSettings
from fastsmart.dpo.settings import DpoSettings
from fastsmart.errors import UserError
from fastsmart.grpo.settings import DiversitySettings, LossSettings
from fastsmart.limits import MOST_AT_ONCE, require_kind
from fastsmart.machine.files import read_file
from fastsmart.policy.settings import PolicySettings
from fastsmart.reward.settings import RewardSettings
from fastsmart.sampling.settings import SamplingSettings
from fastsmart.tilt.settings import TiltSettings
from fastsmart.tokens.settings import PromptSettings
from fastsmart.trainer.settings import MergeSettings, TrainSettings


@dataclass(frozen=True)
class Config:
    """Everything a training run depends on; each section is documented at its own class.

    Raises UserError naming the keys where two sections contradict each other.
    """

    policy: PolicySettings = field(default_factory=PolicySettings)
    prompts: PromptSettings = field(default_factory=PromptSettings)
    sampling: SamplingSettings = field(default_factory=SamplingSettings)
    audio: RenderSettings = field(default_factory=RenderSettings)
    reward: RewardSettings = field(default_factory=RewardSettings)
    grpo: LossSettings = field(default_factory=LossSettings)
    train: TrainSettings = field(default_factory=TrainSettings)
    diversity: DiversitySettings = field(default_factory=DiversitySettings)
    tilt: TiltSettings = field(default_factory=TiltSettings)
    credit: CreditSettings = field(default_factory=CreditSettings)
    dpo: DpoSettings = field(default_factory=DpoSettings)
    merge: MergeSettings = field(default_factory=MergeSettings)

    def __post_init__(self) -> None:
        for section in fields(self):
            kind = section.default_factory
            assert isinstance(kind, type)
            require_kind(getattr(self, section.name), kind, section.name, f"a {kind.__name__}")
        if self.sampling.top_k or self.sampling.top_p < 1.0:
            raise UserError(
                "sampling.top_k and sampling.top_p must be off (0 and 1.0) in training: the loss takes log-probs over "
                "the whole vocabulary, and a truncated sampler would bias every ratio"
            )
        if self.sampling.guidance != 1:
            raise UserError(
                f"sampling.guidance is {self.sampling.guidance}; it must be 1 in training: the loss is of the policy, "
                "and completions would come from another distribution"
            )
        if self.sampling.group < 2 and self.diversity.stratify == 1:
            raise UserError(
                "sampling.group must be at least 2: advantages are relative to the rest of the group, unless "
                "diversity.stratify is below 1"
            )
        if (completions := self.train.prompts * self.sampling.group) > MOST_AT_ONCE:
            raise UserError(
                f"train.prompts times sampling.group makes {completions:,} completions a step; at most "
                f"{MOST_AT_ONCE:,} are drawn at once"
            )
        if self.diversity.active and self.reward.normalize != "none":
            raise UserError(
                f"reward.normalize is {self.reward.normalize!r}; with any part of [diversity] on it must be 'none': "
                "advantages are then in fixed units of the base's rewards"
            )
        if self.diversity.style_kl and not self.prompts.styles:
            raise UserError("diversity.style_kl keeps styles near the base's; name them in prompts.styles")
        metre, metres = self.reward.constraint.metre, self.prompts.time_signatures
        if "constraint" in self.reward.terms and metre and metres and metre not in metres:
            raise UserError(
                f"reward.constraint.metre is {metre}, and every prompt begins in another ({', '.join(metres)}); set "
                f'prompts.time_signatures=["{metre}"]'
            )
        if self.grpo.loss == "dr_grpo" and self.grpo.max_tokens != self.sampling.max_tokens:
            raise UserError(
                f"grpo.max_tokens is {self.grpo.max_tokens}; dr_grpo needs that of sampling.max_tokens, "
                f"{self.sampling.max_tokens}"
            )
        if self.grpo.ratio == "one" and self.train.iterations > 1:
            raise UserError(
                "grpo.ratio 'one' takes every step for on-policy; with train.iterations above 1 it must be 'behaviour'"
            )
        if self.grpo.ratio == "one" and self.train.pipeline == "one-step-off":
            raise UserError(
                "train.pipeline 'one-step-off' learns from completions of an older policy: grpo.ratio must be "
                "'behaviour'"
            )
        self._refuse_unread()
        if self.merge.active:
            self._refuse_unmergeable()

    def _refuse_unread(self) -> None:
        """Raises UserError for what is set and train.algorithm does not read."""
        algorithm = self.train.algorithm
        read = {algorithm, "tilt"} if self.merge.tilt_steps else {algorithm}
        sections: dict[str, Any] = {
            "grpo": replace(self.grpo, kernel="auto"),
            "tilt": self.tilt,
            "dpo": self.dpo,
            "credit": self.credit,
        }
        for name, settings in sections.items():
            changed = [f.name for f in fields(settings) if getattr(settings, f.name) != f.default]
            if name not in read and changed:
                raise UserError(
                    f"{name}.{changed[0]} is set, and train.algorithm {algorithm!r} does not read it; leave it out, or "
                    f"choose train.algorithm = {name!r}"
                )
        if algorithm == "grpo":
            return
        if self.diversity.active or self.diversity.style_kl:
            raise UserError(
                f"[diversity] acts on the advantages of train.algorithm 'grpo', not {algorithm!r}; leave it out"
            )
        for key, value, refused in (
            ("train.pipeline", self.train.pipeline, "one-step-off"),
            ("reward.normalize", self.reward.normalize, "group"),
        ):
            if value == refused:
                raise UserError(f"{key} = {refused!r} is for train.algorithm 'grpo', not {algorithm!r}; leave it out")
        if self.train.iterations > 1:
            raise UserError(
                f"train.iterations is {self.train.iterations}; with train.algorithm {algorithm!r} it must be 1: "
                f"{algorithm}.round_steps says how many steps learn from the same completions"
            )
        self._require_round(algorithm)

    def _require_round(self, section: str) -> None:
        """Raises UserError where the rounds of a section are too large."""
        completions = getattr(self, section).prompts * self.sampling.group
        if completions > MOST_AT_ONCE:
            raise UserError(
                f"{section}.prompts times sampling.group makes {completions:,} completions a round; at most "
                f"{MOST_AT_ONCE:,} are kept"
            )

    def _refuse_unmergeable(self) -> None:
        """Raises UserError for what runs that are to be merged cannot have."""
        merge, algorithm = self.merge, self.train.algorithm
        shared = self.train.steps - merge.tilt_steps
        each, rest = divmod(shared, merge.runs)
        if rest or each < 1:
            raise UserError(
                f"train.steps is {self.train.steps}; less merge.tilt_steps ({merge.tilt_steps}) it must be a multiple "
                f"of merge.runs ({merge.runs}), for each run takes as many steps"
            )
        if algorithm != "grpo" and (merge.runs > 1 or merge.tilt_steps):
            round_steps = getattr(self, algorithm).round_steps
            if not round_steps or each % round_steps:
                raise UserError(
                    f"{algorithm}.round_steps is {round_steps}, and a run of [merge] takes {each} steps; make these a "
                    "whole number of rounds"
                )
        if merge.tilt_steps:
            self._require_round("tilt")
        for key, value, refused in (
            ("train.pipeline", self.train.pipeline, self.train.pipeline == "one-step-off"),
            ("train.average", self.train.average, self.train.average > 0),
            ("[diversity]", "on", self.diversity.active),
        ):
            if refused:
                raise UserError(f"{key} is {value!r}, which goes on from run to run; with [merge] leave it out")


MOST_CHARACTERS = 10_000  # of a value of --set
MOST_TEXT = 4096  # characters of a path or another text
SHOWN_CHARACTERS = 80  # of a value in a message
WHOLE_BELOW = 2**63  # what a whole number of torch and numpy can hold


def read_config(path: str | Path, base: Config | None = None) -> Config:
    """A config from a TOML file; keys it does not name stay as in `base`.

    Raises UserError naming the file and the key, with the nearest valid one for a key that does not exist.
    """
    try:
        text = read_file(path).decode("utf-8-sig")  # some editors begin a file with a mark
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from error
    try:
        tree = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{path} is not valid TOML: {error}") from error
    except ValueError as error:  # Python reads no whole number of more than 4,300 digits
        raise UserError(f"{path} holds a number with too many digits; write a smaller one") from error
    except RecursionError as error:
        raise UserError(f"{path} nests lists or tables too deeply; a config has two levels of tables") from error
    try:
        return merged(base or Config(), tree)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def with_overrides(config: Config, texts: Sequence[str]) -> Config:
    """The config with every `section.key=value` put in, checked when all are in.

    A value is read as TOML, and as plain text where it is none. A key inside a table (`reward.terms.consonance=2`)
    leaves the table's other keys as they are; a whole table (`reward.terms={consonance=2}`) takes its place. Raises
    UserError where there is no `=`, and as `merged` does.
    """
    tree = _plain(asdict(config))
    for text in texts:
        key, equals, value = text.partition("=")
        *sections, last = key.strip().split(".")
        if not equals or not last or not sections:
            raise UserError(f"--set {shortened(text)}: write it as section.key=value, for example --set train.steps=50")
        node = tree
        for i, section in enumerate(sections):
            node = node.setdefault(section, {})
            if not isinstance(node, dict):
                raise UserError(f"--set {shortened(text)}: {'.'.join(sections[: i + 1])} is a value, not a section")
        node[last] = _assigned(key.strip(), value)
    return merged(Config(), tree)


def _assigned(key: str, text: str) -> Any:
    """A value of --set: TOML, or text where it is none; raises UserError for what is too large to be meant."""
    if len(text) > MOST_CHARACTERS:
        raise UserError(f"--set {key} has a value of {len(text):,} characters; write at most {MOST_CHARACTERS:,}")
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text.strip()
    except (ValueError, RecursionError) as error:  # more digits than Python reads, or more brackets
        raise UserError(f"--set {key} is {shortened(text)}; write a smaller number or a flatter list") from error


def shortened(text: str) -> str:
    """A text as it may stand in a message: its beginning, where it is long."""
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}... ({len(text):,} characters)"


def merged(config: Any, tree: Mapping[str, Any], where: str = "") -> Any:
    """The dataclass with the values of a nested mapping put in, checked against the types of its fields.

    A mapping-valued key (`reward.terms`) is replaced as a whole. Raises UserError naming the key that is unknown or of
    the wrong type.
    """
    hints = get_type_hints(type(config))
    changes: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{where}{key}"
        if key not in hints:
            raise UserError(f"unknown key {shortened(name)}; {_nearest(key, where, config)}")
        current = getattr(config, key)
        if is_dataclass(current):
            if not isinstance(value, Mapping):
                raise UserError(f"{name} is a section, not a value; set one of its keys: {', '.join(_keys(current))}")
            changes[key] = merged(current, value, f"{name}.")
        else:
            changes[key] = _coerced(value, hints[key], name)
    try:
        return replace(config, **changes)
    except UserError as error:
        section = where.rstrip(".")
        text = str(error)
        for value in changes.values():
            text = text.replace(value, shortened(value)) if isinstance(value, str) and value else text
        raise UserError(text if not section or text.startswith(section) else f"{section}.{text}") from error


def to_toml(config: Config) -> str:
    """The resolved config as TOML; `read_config` gives the same config back."""
    return "\n".join(_tables(_plain(asdict(config)), ""))


def _tables(tree: Mapping[str, Any], name: str) -> Iterator[str]:
    """A table of TOML, and the tables within it."""
    if name:
        own = [f"{_key(key)} = {toml_value(value)}\n" for key, value in tree.items() if not isinstance(value, Mapping)]
        yield f"[{name}]\n" + "".join(own)
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _tables(value, f"{name}.{_key(key)}" if name else _key(key))


def _key(key: str) -> str:
    return key if key.isascii() and key.replace("-", "_").isidentifier() else toml_value(key)


def toml_value(value: Any) -> str:
    """A value as TOML writes it."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_key(key)} = {toml_value(v)}" for key, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(toml_value, value)) + "]"
    if isinstance(value, str):  # strings of JSON are TOML's, but for one character
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return repr(value).lower() if isinstance(value, bool) else repr(value)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items() if v is not None}
    return [_plain(v) for v in value] if isinstance(value, tuple | list) else value


def _keys(config: Any) -> list[str]:
    return [f.name for f in fields(config)]


def _nearest(key: str, where: str, config: Any) -> str:
    near = get_close_matches(key, _keys(config), n=1)
    if near:
        return f"did you mean {where}{near[0]}?"
    return f"{where.rstrip('.') or 'a config'} has {', '.join(_keys(config))}"


def _coerced(value: Any, hint: Any, name: str) -> Any:
    """The value as the field's type wants it; raises UserError naming the key where it is none."""
    origin, args = get_origin(hint), get_args(hint)
    if isinstance(value, int) and abs(value) >= WHOLE_BELOW:
        raise UserError(f"{name} is a number of more than 18 digits; it must be below {WHOLE_BELOW:,}")
    if isinstance(value, str) and (len(value) > MOST_TEXT or "\0" in value):
        raise UserError(f"{name} is {shortened(repr(value))}; write at most {MOST_TEXT:,} characters, none of them NUL")
    if isinstance(value, str) and not value.isascii() and any("\ud800" <= c <= "\udfff" for c in value):
        raise UserError(f"{name} is {shortened(repr(value))}, which is no UTF-8; give it another name")
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{name} is {value}; it must be a finite number")
    shown = shortened(repr(value))
    if origin is Literal:
        if value in args:
            return value
        raise UserError(f"{name} is {shown}; choose one of {', '.join(map(str, args))}")
    if origin in (Union, types.UnionType):
        return None if value is None else _coerced(value, next(a for a in args if a is not type(None)), name)
    if origin is tuple:
        if not isinstance(value, list | tuple) or (args[-1] is not Ellipsis and len(value) != len(args)):
            raise UserError(f"{name} is {shown}; it must be a list" + ("" if args[-1] is ... else f" of {len(args)}"))
        kinds = [args[0]] * len(value) if args[-1] is Ellipsis else args
        return tuple(_coerced(v, kind, f"{name}[{i}]") for i, (v, kind) in enumerate(zip(value, kinds, strict=True)))
    if origin is not None and issubclass(origin, Mapping):
        if not isinstance(value, Mapping):
            raise UserError(f"{name} is {shown}; it must be a table, such as {{ name = 1.0 }}")
        return {k: _coerced(v, args[1], f"{name}.{k}") for k, v in value.items()}
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    kinds_by_name = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
    raise UserError(f"{name} is {shown}; it must be {kinds_by_name.get(hint, hint)}")
