"""A studio of a tiny policy, and a client of its page that no network is between."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from starlette.testclient import TestClient
from tiny_policy import make_policy

from fastsmart.live.server import make_app
from fastsmart.live.session import Session
from fastsmart.live.settings import LiveSettings
from fastsmart.live.studio import Studio
from fastsmart.policy.hf_format import save_policy
from fastsmart.taste import Clip
from fastsmart.tokens.decode import decode
from fastsmart.tokens.prompts import procedural

TOKEN = "t" * 48
HOST = "http://127.0.0.1:8723"


@pytest.fixture(scope="session")
def tiny(vocab, tmp_path_factory) -> str:
    """A saved tiny policy that plays music enough for a page: most of its tokens come in threes that make notes."""
    folder = tmp_path_factory.mktemp("policies") / "tiny"
    save_policy(make_policy(vocab, spread=1.0), folder)
    return str(folder)


@pytest.fixture(scope="session")
def clips(vocab) -> list[Clip]:
    """Sixty clips of the shipped policy's vocabulary: scales and chords that no two have in common."""
    made = []
    for number in range(60):
        random = np.random.default_rng(number)
        ids = [*procedural(vocab, 1, number, ["4/4"], (60, 150)).row(0)]
        for position in sorted(random.choice(48, 12, replace=False)):
            ids.append(vocab.id(f"Position_{position}"))
            ids += [int(random.choice(vocab.ids_of(kind)[:40])) for kind in ("Pitch", "Velocity", "Duration")]
        notes = decode([np.array(ids)], vocab, 10.0)
        made.append(Clip.of(f"clip-{number:03d}", np.array(ids), 4, notes))
    return made


@pytest.fixture
def session(tmp_path: Path, clips) -> Session:
    """A session that has its first pair."""
    begun = Session(tmp_path / "taste", LiveSettings(train=False))
    begun.add(clips)
    return begun


@pytest.fixture(scope="module")
def studio(tiny, clips, tmp_path_factory):
    """A studio in which nothing is trained, and only the given clips are played."""
    opened = Studio.open(tmp_path_factory.mktemp("studio") / "taste", LiveSettings(tiny, train=False, max_tokens=60))
    opened.session.add(clips)
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def client(studio):
    """A client whose every path is below the token."""
    with TestClient(make_app(studio, TOKEN), f"{HOST}/{TOKEN}") as opened:
        yield opened
