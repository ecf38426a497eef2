"""Small things many tests need: a vocabulary, a tiny policy, a soundfont, a browser."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import fastsmart  # noqa: F401  # isort: skip  # before torch, so that OpenMP's threads wait politely

import pytest
import torch

# Without a GPU, Triton kernels run in Triton's interpreter; it asks when they are imported.
os.environ.setdefault("TRITON_INTERPRET", "0" if torch.cuda.is_available() else "1")

from tiny_policy import make_policy

from fastsmart.audio import find_soundfont
from fastsmart.policy.hf_format import save_policy
from fastsmart.policy.transformer import Policy
from fastsmart.tokens.vocabulary import Vocabulary, load_vocabulary

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), ""
)


@pytest.fixture(scope="session", autouse=True)
def _two_threads() -> None:
    torch.set_num_threads(2)  # as on the smallest machine we support; more only wait for each other


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    os.environ["FASTSMART_CACHE"] = str(tmp_path_factory.mktemp("cache"))  # not the note banks of whoever runs this


@pytest.fixture(scope="session")
def vocab() -> Vocabulary:
    return load_vocabulary("smart")


@pytest.fixture
def policy(vocab: Vocabulary) -> Policy:
    return make_policy(vocab)


@pytest.fixture
def checkpoint(policy: Policy, tmp_path: Path) -> Path:
    """A saved tiny policy."""
    save_policy(policy, tmp_path / "tiny")
    return tmp_path / "tiny"


@pytest.fixture(scope="session")
def soundfont() -> Path:
    return find_soundfont()


@pytest.fixture
def browser():
    """Headless Chromium; skips where there is none (Debian: apt-get install chromium)."""
    if not CHROMIUM:
        pytest.skip("no Chromium on this machine")
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        options = ["--no-sandbox", "--autoplay-policy=no-user-gesture-required"]
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=options)
        yield chromium
        chromium.close()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let peers warn: tests of tests/peers and tests/bench run other people's packages, whose warnings are not ours."""
    for item in items:
        if item.path.relative_to(Path(__file__).parent).parts[0] in ("peers", "bench"):
            item.add_marker(pytest.mark.filterwarnings("default"))
