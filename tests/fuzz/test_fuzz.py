"""Hostile input of every kind, a small share by default: nothing but a sentence comes of it.

The rest: `pytest -m slow tests/fuzz`, and `python -m tests.fuzz --count 100000 --out counts.json`, which counts.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from kinds import COMMANDS, KINDS, keys, make
from nasty import changed_json
from stand import Case, Stand, judged
from whole import write_whole

from fastsmart.errors import UserError

CORPUS = Path(__file__).parent / "corpus"
SEED = 20_261_126
SHARE = 0.35  # of KINDS' share of a thousand, by default
LARGE = 12  # times as many in the slow test


@pytest.fixture(scope="session")
def stand(tmp_path_factory) -> Stand:
    made = Stand(tmp_path_factory.mktemp("stand"))
    write_whole(made.base)
    made.seal()
    return made


def hold(stand: Stand, kind: str, numbers: range) -> None:
    """Hold cases to the invariant; what breaks it is printed as a line for the corpus."""
    for number in numbers:
        case = make(kind, SEED, number, stand.base)
        if wrong := stand.wrong(case):
            pytest.fail(f"{kind} {number} {case.arguments}: {wrong}\ncorpus line:\n{case.to_json()}")


@pytest.mark.parametrize("kind", KINDS)
def test_whatever_is_put_in(stand, kind):
    share = 0.15 * SHARE if kind in ("set", "toml", "arguments") else SHARE
    hold(stand, kind, range(max(1, round(KINDS[kind][1] * share))))


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kind", KINDS)
def test_whatever_is_put_in_often(stand, kind):
    hold(stand, kind, range(1000, 1000 + KINDS[kind][1] * LARGE))


def corpus(names: str) -> list[Case]:
    return [Case.of_json(line) for path in sorted(CORPUS.glob(names)) for line in path.read_text().splitlines()]


FOUND = [*corpus("*.jsonl"), *(pytest.param(case, marks=pytest.mark.slow) for case in corpus("long/*.jsonl"))]


@pytest.mark.parametrize("case", FOUND, ids=lambda case: f"{case.kind} {' '.join(case.arguments)[:50]!r}")
def test_what_was_found_before(stand, case):
    assert not stand.wrong(case)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(key=st.sampled_from(keys()), text=st.text(max_size=200), file=st.booleans())
@example("policy.source", "\ud800", False)
@example("train.steps", "[" * 3000, True)
def test_any_text_as_the_value_of_a_key(stand, key, text, file):
    section, _, name = key.rpartition(".")
    content = f"[{section or 'train'}]\n{name} = {text}\n".encode("utf-8", "surrogatepass")
    words = ["train", "--dry-run"]
    case = Case("toml", [*words, "--config", "c.toml"], {"c.toml": content})
    assert not stand.wrong(case if file else Case("set", [*words, "--set", f"{key}={text}"]))


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(whole=st.sampled_from([c for c in COMMANDS if c[0] not in ("train", "sweep")]), data=st.data())
def test_any_text_as_an_argument(stand, whole, data):
    at = data.draw(st.integers(1, len(whole)))
    words = [*whole[:at], data.draw(st.text(max_size=60)), *whole[at + 1 :]]
    assert not stand.wrong(Case("arguments", words, many=True))


def test_a_case_is_the_same_whatever_was_made_before_it():
    content = b'{"a": [1, {"b": [2, 3]}], "c": {}, "d": [[]]}'
    made = [[changed_json(content, random.Random(seed)) for seed in range(400)] for _ in range(3)]
    assert made[0] == made[1] == made[2]


@pytest.mark.parametrize("number", range(3))
def test_a_process_of_its_own_ends_the_same_way(stand, number):
    """What is run in this process above is what a person runs: a few cases as subprocesses."""
    case = make(("set", "midi", "run")[number], SEED, number, stand.base)
    with tempfile.TemporaryDirectory(dir=stand.folder) as work:
        for name, content in case.files.items():
            (Path(work) / name).parent.mkdir(parents=True, exist_ok=True)
            (Path(work) / name).write_bytes(content)
        words = [os.fsencode(word).replace(b"\0", b"") for word in case.arguments]
        done = subprocess.run([sys.executable, "-m", "fastsmart", *words], capture_output=True, cwd=work)
    assert not judged(done.returncode, done.stderr.decode("utf-8", "replace"), case.many)


# The guard itself: with one of its checks taken out, the suite above would fail


def _nothing(*args, **kwargs):
    return None


REMOVED = {
    "types of keys": ("fastsmart.config._coerced", lambda value, hint, name: value, "set"),
    "types of keys of a file": ("fastsmart.config._coerced", lambda value, hint, name: value, "toml"),
    "midi that is none": ("fastsmart.notes.parse_midi", None, "midi"),
    "lines of metrics": ("fastsmart.run.top.whole_metrics", lambda line: True, "run"),
    "form of a sweep": ("fastsmart.study.sweep._require_form", _nothing, "sweep"),
    "answers of strangers": ("fastsmart.study.answers._wrong", lambda answer, key: "", "answers"),
    "rows of scores": ("fastsmart.study.scoring.UserError", KeyError, "scores"),
    "config of a checkpoint": ("fastsmart.policy.hf_format.UserError", KeyError, "policy"),
}
ENOUGH = 60  # inputs, among which some need the check


@pytest.mark.parametrize("removed", REMOVED)
def test_without_one_of_its_checks_the_suite_fails(stand, monkeypatch, removed):
    target, instead, kind = REMOVED[removed]
    if removed == "midi that is none":
        import mido

        def instead(path):
            return mido.MidiFile(path)

    monkeypatch.setattr(target, instead)
    assert any(stand.wrong(make(kind, SEED, number, stand.base)) for number in range(ENOUGH))
    stand.seal()


def test_without_the_sentence_the_suite_fails(stand, monkeypatch):
    """A command that lets its error through, or says it in several lines, or writes beside its own files."""
    from fastsmart import commands

    case = Case("run", ["top", "none", "--once"])
    assert not stand.wrong(case)

    def raises(options):
        raise ValueError("nobody expected this")

    def says_two(options):
        print("fastsmart: one")
        raise UserError("two\nfastsmart: three")

    def writes(options):
        (stand.base / "piece.mid").touch()
        return 0

    def leaves(options):
        return 1

    monkeypatch.setattr(commands, "top", says_two)
    assert not stand.wrong(case)  # the command line makes one line of it
    for broken, says in ((raises, "nobody expected"), (leaves, "exit code 1"), (writes, "changed files")):
        monkeypatch.setattr(commands, "top", broken)
        assert says in stand.wrong(case)
    stand.seal()
