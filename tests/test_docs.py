"""Links and names in the documents lead somewhere, and so do the click paths of CONTRIBUTING.md."""

import re
import tomllib
from itertools import pairwise
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCUMENTS = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "bench/README.md"]
LINK = re.compile(r"\[[^\]]*\]\(([^)#\s]+)(?:#[^)]*)?\)")
NAMED = re.compile(r"`((?:fastsmart|kernels|bench|docs|tests|examples|\.ci)/[\w./-]+)`")


def links(document: Path) -> set[Path]:
    """The files that a document links to."""
    targets = LINK.findall(document.read_text())
    return {(document.parent / target).resolve() for target in targets if "://" not in target}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_link_and_every_named_file_is_there(document: Path) -> None:
    missing = [str(target) for target in links(document) if not target.exists()]
    missing += [name for name in NAMED.findall(document.read_text()) if not (ROOT / name).exists()]
    assert not missing


def click_paths() -> list[tuple[str, list[Path], str]]:
    """(question, files of the way, text at its end) of each row in CONTRIBUTING.md."""
    text = (ROOT / "CONTRIBUTING.md").read_text().partition("## Five click paths")[2]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    return [(question, [ROOT / name for name in LINK.findall(way)], end.strip("`")) for question, way, end in rows[2:]]


def test_there_are_five_click_paths() -> None:
    assert len(click_paths()) == 5


@pytest.mark.parametrize("question", range(5))
def test_a_click_path_holds(question: int) -> None:
    _, way, end = click_paths()[question]
    assert way[0] == ROOT / "README.md"
    for here, there in pairwise(way):
        assert there.resolve() in links(here), f"{here} does not link to {there}"
    assert end in way[-1].read_text()


def test_every_page_is_in_the_index() -> None:
    pages = {page.resolve() for page in ROOT.glob("docs/*.md")} - {ROOT / "docs/README.md"}
    assert pages <= links(ROOT / "docs/README.md")


def test_every_extra_that_a_page_names_exists() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    named = {name for page in DOCUMENTS for name in re.findall(r"(?:fastsmart|`\.|'\.)\[(\w+)\]", page.read_text())}
    assert named <= set(extras)
    assert "vllm" in named


def test_the_version_is_the_same_everywhere() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert f"version: {version}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"## [{version}]" in (ROOT / "CHANGELOG.md").read_text()
