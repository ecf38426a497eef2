"""The Python face with one argument of another kind: a result, or an error that names it, not one from deep inside."""

from __future__ import annotations

import inspect

import numpy as np
import pytest

import fastsmart as fs
from fastsmart.notes import NoteBatch

JUNK = (
    *(None, 5, -1, 0, 1.5, True, "x", "", b"x", [], {}, (), [None], ["x"], [[1.5]], {"a": 1}, 10**30, -(10**30)),
    *(
        float("nan"),
        float("inf"),
        1j,
        object(),
        np.zeros(3),
        np.int64(2),
        np.float32(0.5),
        int,
        print,
        "\0",
        "x" * 5000,
    ),
    *("../x", "\ud800", range(3), NoteBatch.empty(0), {1, 2}, "a/b/c", "[/x]"),
)
NAMED_OTHERWISE = {"sequences": "sequence|sequences|token id", "vocab": "vocab|outside the vocabulary"}


def face(policy):
    """(function, arguments that are right) of the public face, without those that would train or render for long."""
    prompts = fs.prompts.bos(policy.vocab, 1)
    yield (
        fs.load_policy,
        {"source": "pop909-tiny", "dtype": policy.lm_head.weight.dtype, "device": "cpu", "vocabulary": ""},
    )
    yield fs.load_vocabulary, {"source": "smart"}
    yield fs.load_reward, {"name": "variety"}
    yield (
        fs.prompts.procedural,
        {**{"vocab": policy.vocab, "n": 2, "seed": 0, "time_signatures": ["4/4"], "tempo_range": (60.0, 90.0)}},
    )
    yield fs.prompts.bos, {"vocab": policy.vocab, "n": 1}
    yield (
        fs.sample,
        {
            **{"policy": policy, "prompts": prompts, "group": 1, "max_tokens": 2, "temperature": 1.0, "seed": 0},
            **{"engine": "native", "top_k": 0, "top_p": 1.0},
        },
    )
    yield fs.decode, {"sequences": [[1, 2]], "vocab": policy.vocab, "max_seconds": None}
    yield fs.Clips, {"notes": NoteBatch.empty(1), "audio": None}
    yield fs.render, {"notes": None}
    yield fs.train, {"config": None}


@pytest.mark.parametrize("number", range(10))
def test_an_argument_of_another_kind(policy, tmp_path, monkeypatch, number):
    monkeypatch.chdir(tmp_path)
    started = {fs.render: {"backend": "none"}, fs.train: {"out": "run"}}  # refused, where the other argument is right
    monkeypatch.setattr("fastsmart.machine.hub._reachable", lambda: False)
    function, right = list(face(policy))[number]
    beside = started.get(function, {})
    inspect.signature(function).bind(**right, **beside)
    for name in right:
        for junk in JUNK:
            try:
                function(**right | beside | {name: junk})
            except (TypeError, ValueError, fs.UserError) as error:
                said = str(error)
                assert "\n" not in said, (name, junk)
                assert len(said) < 8000
                if isinstance(error, TypeError):
                    assert any(word in said for word in NAMED_OTHERWISE.get(name, name).split("|")), (name, junk, said)
    assert not list(tmp_path.iterdir())
