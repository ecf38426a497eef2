"""Small things many tests need: a vocabulary, a tiny policy, a soundfont, a browser."""

from __future__ import annotations

import os
import shutil
from contextlib import nullcontext, suppress
from pathlib import Path

import fastsmart  # noqa: F401  # isort: skip  # before torch, so that OpenMP's threads wait politely

import pytest
import torch

# Without a GPU, Triton kernels run in Triton's interpreter; it asks when they are imported.
os.environ.setdefault("TRITON_INTERPRET", "0" if torch.cuda.is_available() else "1")

from tiny_policy import make_policy

from fastsmart.audio import find_soundfont
from fastsmart.machine.files import cpu_cores
from fastsmart.policy.hf_format import save_policy
from fastsmart.policy.transformer import Policy
from fastsmart.run.curves import curves
from fastsmart.tokens.vocabulary import Vocabulary, load_vocabulary

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), ""
)

MOST_PROCESSES = 4  # with torch, vLLM and a browser each takes gigabytes


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """Processes that `-n auto` shares the tests among, one a core; 0, none but this one, where there is one core."""
    cores = min(cpu_cores(), MOST_PROCESSES)
    return cores if cores > 1 else 0


def is_one_of_several(config: pytest.Config) -> bool:
    """Whether this process shares the tests with others, as pytest-xdist spreads them."""
    return hasattr(config, "workerinput")


@pytest.fixture(scope="session", autouse=True)
def _threads(pytestconfig: pytest.Config) -> None:
    # Alone as many as the smallest machine we support has cores: more only wait for each other
    torch.set_num_threads(1 if is_one_of_several(pytestconfig) else 2)


@pytest.fixture(scope="session", autouse=True)
def _own_cache(pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Not the note banks of whoever runs this; processes that share the tests share them, as those of a run do."""
    folder = tmp_path_factory.getbasetemp()
    if is_one_of_several(pytestconfig):
        folder = folder.parent  # above the folders of each
    (folder / "cache").mkdir(exist_ok=True)
    os.environ["FASTSMART_CACHE"] = str(folder / "cache")


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
def light_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests of many runs: leaves out what takes longer than all else that a run so small does.

    The figure of its curves is made, but not painted; the heap, which holds all that any test has imported, is not
    searched through as it begins. Tests of single runs (tests/trainer/test_run.py) and those that a module shares do
    both.
    """

    def made(lines: list[dict], path: Path) -> None:
        with suppress(ImportError):  # a run goes on without matplotlib
            if curves(lines):
                path.touch()

    monkeypatch.setattr("fastsmart.trainer.outcome.plot_curves", made)
    monkeypatch.setattr("fastsmart.trainer.loop.gc_at_steps", lambda: nullcontext(lambda step: None))


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
