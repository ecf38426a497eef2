"""What strangers' files cannot do: run code, take memory by their headers, lead to other files, speak as the page."""

from __future__ import annotations

import ast
import io
import json
import os
import resource
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fastsmart.cli import main
from fastsmart.errors import UserError
from fastsmart.notes import NoteBatch, read_midi
from fastsmart.policy.hf_format import load_policy
from fastsmart.sampling.settings import VllmSettings
from fastsmart.study.evaluation import Evaluation
from fastsmart.study.outputs import Outputs
from fastsmart.tokens.vocabulary import load_vocabulary

ROOT = Path(__file__).parents[1]
SOURCES = sorted([*ROOT.glob("fastsmart/**/*.py"), *ROOT.glob("kernels/**/*.py")])
RUN_CODE = {
    "pickle",
    "cPickle",
    "dill",
    "joblib",
    "marshal",
    "shelve",
    "cloudpickle",
    "yaml",
    "http.server",
    "socketserver",
}
OLD_RUN = ROOT / "tests" / "run" / "old_run" / "run"


def calls(tree: ast.AST):
    """(dotted name, keyword arguments as text) of every call."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_source_reads_what_can_run_code(path):
    tree = ast.parse(path.read_text())
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module}
    assert not imported & RUN_CODE
    for name, keywords in calls(tree):
        assert name not in ("eval", "exec", "os.system", "os.popen"), name
        assert keywords.get("shell") != "True", name
        if name == "torch.load":
            assert keywords["weights_only"] == "True"
        if name in ("np.load", "numpy.load"):
            assert keywords["allow_pickle"] == "False"
        if name == "AutoTokenizer.from_pretrained":
            assert keywords["trust_remote_code"] == "False"


def test_nothing_listens_beyond_this_machine():
    assert VllmSettings().transfer_host == "127.0.0.1"
    for path in SOURCES:
        texts = {node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)}
        bar_line = {"::"} if path.match("notagen/patches.py") else set()  # of ABC, between two repeats
        assert not texts & {"0.0.0.0", "::"} - bar_line, path


class Opens:
    """Leaves a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_checkpoint_that_would_run_code_is_refused_unrun(tmp_path):
    import torch

    torch.save({"state_dict": Opens(tmp_path / "ran")}, tmp_path / "checkpoint.pt")
    code = main(
        ["score", str(OLD_RUN / "none.mid"), "--reward", "audiobox", "--checkpoint", str(tmp_path / "checkpoint.pt")]
    )
    assert code == 2
    from fastsmart.reward.audiobox.weights import _read_torch

    with pytest.raises(UserError, match="nothing in it was run"):
        _read_torch(tmp_path / "checkpoint.pt")
    np.savez(tmp_path / "played.npz", fingerprint=np.array([Opens(tmp_path / "ran")], object))
    with pytest.raises(UserError, match="is damaged"):
        Outputs.load(tmp_path / "played.npz", "x")
    assert not (tmp_path / "ran").exists()


def grown_mb(call) -> int:
    """By how much the largest size of this process grows, MB."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    call()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024


def refused(call, says: str) -> None:
    with pytest.raises(UserError, match=says):
        call()


@pytest.mark.parametrize(
    "key", ["num_hidden_layers", "vocab_size", "hidden_size", "intermediate_size", "max_position_embeddings"]
)
def test_a_policy_of_a_billion_of_anything_takes_no_memory(checkpoint, key):
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(config | {key: 10**9}))
    assert grown_mb(lambda: refused(lambda: load_policy(checkpoint), "it must be from 1 to|does not split")) < 100


@pytest.mark.parametrize(
    "changes",
    [{"num_tempos": 10**9}, {"beat_res": {"0_1000000000": 12}}, {"num_velocities": 10**9}, {"pitch_range": [0, 10**9]},
     {"special_tokens": ["PAD_None"] * 20_000}, {"time_signature_range": {"4": list(range(20_000))}}],
)  # fmt: skip
def test_a_vocabulary_of_a_billion_tokens_takes_no_memory(tmp_path, changes):
    params = json.loads(load_vocabulary("smart").description)
    params["config"] |= changes
    (tmp_path / "v.json").write_text(json.dumps(params))
    assert grown_mb(lambda: refused(lambda: load_vocabulary(tmp_path / "v.json"), r"v\.json")) < 200


def test_an_archive_that_grows_without_end_is_not_unpacked(tmp_path, monkeypatch):
    from fastsmart.study import outputs

    assert outputs.LARGEST_BYTES == 4 * 2**30
    monkeypatch.setattr(outputs, "LARGEST_BYTES", 2**26)
    with zipfile.ZipFile(tmp_path / "a.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(header, {"descr": "<f8", "fortran_order": False, "shape": (10**12,)})
        with archive.open("total/x.npy", "w", force_zip64=True) as member:
            member.write(header.getvalue())
            for _ in range(65):
                member.write(bytes(2**20))
    assert (tmp_path / "a.npz").stat().st_size < 2**20
    assert grown_mb(lambda: refused(lambda: Outputs.load(tmp_path / "a.npz"), "unpacks to more than 0.0625 GiB")) < 100


@pytest.mark.parametrize("command", [["render"], ["score", "--reward", "variety"], ["sample", "--prompt"]])
def test_a_device_without_end_is_no_music(command, tmp_path, capsys):
    (tmp_path / "zero.mid").symlink_to("/dev/zero")
    words = [*command[:1], str(tmp_path / "zero.mid"), *command[1:]] if command[0] != "sample" else [*command]
    words += [str(tmp_path / "zero.mid"), "--out", str(tmp_path / "s")] if command[0] == "sample" else []
    assert grown_mb(lambda: main(words)) < 300
    assert capsys.readouterr().err.startswith("fastsmart: ")
    os.mkfifo(tmp_path / "pipe.mid")  # nobody writes into it: to open it would be to wait for ever
    assert main(["render", str(tmp_path / "pipe.mid")]) == 2


def test_a_midi_file_of_more_than_any_music_is_refused(tmp_path):
    with open(tmp_path / "big.mid", "wb") as sink:
        sink.truncate(2**31)
    assert grown_mb(lambda: refused(lambda: read_midi(tmp_path / "big.mid"), "larger than 8 MiB")) < 100


@pytest.mark.parametrize("label", ["../../secret", "/etc/passwd", "a/b", "..", "", "x" * 300, "a\nb", None, 5])
def test_an_evaluation_reads_only_its_own_folder(tmp_path, label):
    policy = {"label": label, "source": "x", "sha256": "x", "run": "", "soundfont": ""}
    (tmp_path / "evaluation.json").write_text(json.dumps({"policies": [policy], "metrics": []}))
    with pytest.raises(UserError, match="is not an evaluation"):
        Evaluation.open(tmp_path)


HTML = "<img src=x onerror=alert(1)></script><script>alert(2)</script>"


def test_names_in_a_strangers_files_cannot_speak_as_the_page(tmp_path):
    from fastsmart.study.report import render_page

    for template in ("report.html", "listen.html", "profile.html"):
        source = (ROOT / "fastsmart" / "study" / "pages" / template).read_text()
        assert "| safe" not in source
        assert "autoescape false" not in source
    page = render_page(
        "listen.html", "listen.js", notes={"question": HTML, HTML: [HTML], "n": NoteBatch.empty(0).counts.tolist()}
    )
    assert "<img" not in page
    assert page.count("<script") == 2
    assert json.loads(page.split('id="notes">')[1].split("</script>")[0])["question"] == HTML


def test_a_run_with_markup_and_control_codes_is_shown_as_it_is(tmp_path, capsys):
    import shutil

    run = tmp_path / "[red]run[/x]"
    shutil.copytree(OLD_RUN, run)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        if "terms" in line:
            line["terms"] |= {"[/bold]\x1b]0;owned\x07": 1.0, "[link=file:///etc]x[/link]": 2.0}
            line["time"] |= {"[/]\x1b[2J": 1.0}
        if "eval" in line:
            line["eval"]["terms"] |= {"[/x]\x1b[31m": {"mean": 1.0, "std": 0.0}}
        line["health"] = {"rss_mb": 1.0, "files": 1, "notes": ["[/x] \x1b[2J\r\nnote"]}
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert main(["top", str(run), "--once"]) == 0
    shown = capsys.readouterr().out
    assert not set(shown) & set("\x1b\x07\r")
    assert "[/bold]" in shown
    assert "[red]run[/x]" in shown.replace("\n", "")


def test_the_live_view_shows_a_path_with_markup(monkeypatch):
    from rich.console import Console

    from fastsmart.presets import demo
    from fastsmart.run.display import Terminal

    view = Terminal()
    view.console = Console(file=io.StringIO(), force_terminal=False, width=200)
    view.start(replace(demo()), Path("runs/[/x][bold]a"), 0)
    view.message("[/y] said")
    assert "runs/[/x][bold]a" in view.console.file.getvalue()
    assert "[/y] said" in view.console.file.getvalue()
