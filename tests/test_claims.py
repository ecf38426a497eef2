"""Every figure in README.md, docs/results.md and docs/listening.md stands in the file that bench/claims.toml names."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
TABLE = tomllib.loads((ROOT / "bench/claims.toml").read_text())
CLAIMS = [(claim["document"], claim["file"], text) for claim in TABLE["claims"] for text in claim["texts"]]
DOCUMENTS = ("README.md", "docs/listening.md", "docs/results.md")
RECORDS = ("bench/results/", "bench/records/", "fastsmart/policy/shipped/")
FOLDS = {"mean": np.mean, "median": np.median, "sum": np.sum}


def unwrapped(text: str) -> str:
    """The text with line ends as spaces."""
    return " ".join(text.split())


def read_json(path: Path) -> Any:
    text = path.read_text()
    return [json.loads(line) for line in text.splitlines()] if path.suffix == ".jsonl" else json.loads(text)


def look_up(tree: Any, path: list[str]) -> Any:
    """The value at a path; "3:" stands for the items from number 3 on, of which it gives an array."""
    for i, key in enumerate(path):
        if key.endswith(":"):
            return np.array([look_up(item, path[i + 1 :]) for item in tree[int(key[:-1]) :]])
        tree = tree[int(key)] if isinstance(tree, list) else tree[key]
    return np.array(tree) if isinstance(tree, list) else tree


def evaluate(tree: Any, expression: str) -> Any:
    """The value of paths, divided and subtracted from left to right, folded where they are lists."""
    folded = re.fullmatch(r"(mean|median|sum)\(([^()]*)\)", expression)
    if folded:
        return FOLDS[folded[1]](evaluate(tree, folded[2]))
    first, *rest = re.split(r" ([/-]) ", expression)
    if not rest:
        return look_up(tree, first.split("/"))
    value = evaluate(tree, first)
    for sign, term in zip(rest[::2], rest[1::2], strict=True):
        other = evaluate(tree, term)
        value = value / other if sign == "/" else value - other
    return value


def rendered(text: str, tree: Any) -> str:
    """The text with every {path:rounding} put in."""

    def one(match: re.Match[str]) -> str:
        expression, _, rounding = match[1].rpartition(":") if ":" in match[1] else (match[1], "", "")
        value = evaluate(tree, expression)
        return f"{100 * value:.0f} %" if rounding == "%" else f"{value:{rounding}}"

    return re.sub(r"\{([^}]*)\}", one, text)


def claimed_text(file: str, text: str) -> str:
    """What a document has to say; of a file that is no JSON, what it says itself."""
    path = ROOT / file
    if path.suffix in (".json", ".jsonl"):
        return unwrapped(rendered(text, read_json(path)))
    assert unwrapped(text) in unwrapped(path.read_text()), f"{file} does not say {text!r}"
    return unwrapped(text)


@pytest.mark.parametrize(("document", "file", "text"), CLAIMS)
def test_a_document_says_what_its_file_holds(document: str, file: str, text: str) -> None:
    assert file.startswith(RECORDS)
    claim = claimed_text(file, text)
    assert claim in unwrapped((ROOT / document).read_text()), f"{document} does not say: {claim}"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_figure_is_claimed(document: str) -> None:
    text = re.sub(r"^```.*?^```|^(?: {4}[^\n]*\n)+", " ", (ROOT / document).read_text(), flags=re.M | re.S)
    text = unwrapped(re.sub(r"\]\([^)]*\)", "]", text))
    known = [claimed_text(file, claim) for where, file, claim in CLAIMS if where == document]
    known += [unwrapped(name) for entry in TABLE["free"] if entry["document"] == document for name in entry["texts"]]
    for words in sorted(known, key=len, reverse=True):
        assert words in text, f"bench/claims.toml has {words!r}, which is not in {document}"
    for words in sorted(known, key=len, reverse=True):
        text = text.replace(words, " ")
    text = re.sub(r"`[^`]*`", " ", text)
    left = [text[max(0, m.start() - 40) : m.end() + 40] for m in re.finditer(r"\d[\d.,]*", text)]
    assert not left, f"{document} has figures that bench/claims.toml does not know: {left}"


def test_a_figure_that_is_altered_is_found() -> None:
    tree = {"a": {"x": [2.0, 4.0]}, "b": 0.256}
    assert rendered("{mean(a/x):.1f} s, {b:%}, {b / a/x/0:.3f}, {b - a/x/1:+.2f}", tree) == "3.0 s, 26 %, 0.128, -3.74"
    assert rendered("{median(a/x / a/x):.0f}", tree) == "1"
    tree["b"] = 0.266
    assert rendered("{b:%}", tree) == "27 %"
    assert evaluate([{}, {"t": 1}, {"t": 3}], "sum(1:/t)") == 4
