"""The names and parameters that users write against stay what they are, and the documents use them as they are."""

import ast
import inspect
import re
import shlex
from pathlib import Path

import pytest

import fastsmart as fs
from fastsmart.audio import AudioBatch
from fastsmart.cli import parser
from fastsmart.notes import NoteBatch

ROOT = Path(__file__).parents[1]
# A parameter may be added at the end, with a default; everything else breaks somebody's script
SIGNATURES = {
    fs.load_policy: "source, dtype=torch.float32, device='cpu', vocabulary=''",
    fs.save_policy: "policy, folder, dtype=torch.float32",
    fs.load_vocabulary: "source='smart'",
    fs.prompts.procedural: "vocab, n, seed=0, time_signatures=None, tempo_range=None",
    fs.prompts.procedural_with_note: "vocab, n, seed=0, time_signatures=None, tempo_range=None",
    fs.prompts.from_dataset: "vocab, dataset, n, seed=0",
    fs.sample: "policy, prompts, group=1, max_tokens=256, temperature=1.0, seed=0, engine='native', top_k=0, "
    "top_p=1.0, guidance=1.0",
    fs.decode: "sequences, vocab, max_seconds=None",
    fs.render: "notes, soundfont='', backend='bank', sample_rate=16000, max_seconds=10.0, workers=1, progress=None, "
    "**options",
    fs.load_reward: "name, **settings",
    fs.Clips: "notes, audio=None",
    fs.train: "config, out, resume=False, display=None, ranks=None",
    NoteBatch.to_midi: "self, i, path",
    AudioBatch.to_wav: "self, i, path",
}
NAMES = {
    *("Clips", "Config", "UserError", "decode", "load_policy", "load_reward", "load_vocabulary", "render", "sample"),
    *("save_policy", "train", "presets", "prompts"),
}
COMMANDS = [
    pytest.param(command, id=f"{page.name}: {command}")
    for page in (ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")))
    for command in re.findall(r"^ {4}(fastsmart .*)$", page.read_text().replace("\\\n", " "), flags=re.M)
]


def parameters(function: object) -> str:
    """A function's parameters and defaults, without their types."""
    signature = inspect.signature(function)  # type: ignore[arg-type]
    plain = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]
    return str(inspect.Signature(plain)).strip("()")


def test_the_public_names_are_these() -> None:
    assert set(fs.__all__) >= NAMES
    assert {"demo", "smart_paper", "smart_released", "h200"} <= set(dir(fs.presets))


@pytest.mark.parametrize("function", SIGNATURES, ids=lambda function: function.__qualname__)
def test_a_signature_keeps_its_parameters(function: object) -> None:
    assert parameters(function).startswith(SIGNATURES[function])


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_in_a_document_is_understood(command: str) -> None:
    options = parser().parse_args(shlex.split(command, comments=True)[1:])
    assert options.command


def test_files_that_commands_of_readme_read_are_there() -> None:
    text = (ROOT / "README.md").read_text()
    assert [name for name in re.findall(r"fastsmart sweep (\S+\.toml)", text) if not (ROOT / name).exists()] == []


def test_the_python_of_readme_calls_what_there_is() -> None:
    (block,) = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), flags=re.M | re.S)
    called = [node for node in ast.walk(ast.parse(block)) if isinstance(node, ast.Call)]
    checked = 0
    for call in called:
        name = ast.unparse(call.func)
        if re.fullmatch(r"fs(\.\w+)+", name) and not name.startswith("fs.presets"):
            function = eval(name, {"fs": fs})
            inspect.signature(function).bind(*call.args, **{keyword.arg: None for keyword in call.keywords})
            checked += 1
    assert checked >= 6


MISUSES = {
    "name": [lambda p, n: fs.load_reward(None), lambda p, n: fs.load_reward(5)],
    "it takes no settings": [lambda p, n: fs.load_reward("consonance", foo=3)],
    "it takes model, prompt": [lambda p, n: fs.load_reward("clap_similarity")],
    "source": [lambda p, n: fs.load_policy(None), lambda p, n: fs.load_vocabulary(5)],
    "dtype": [lambda p, n: fs.load_policy("pop909-tiny", dtype="float32")],
    "device": [lambda p, n: fs.load_policy("pop909-tiny", device="xyz")],
    "prompts": [lambda p, n: fs.sample(p, ["..."]), lambda p, n: fs.sample(p, None)],
    "policy": [lambda p, n: fs.sample("pop909-tiny", None), lambda p, n: fs.save_policy(None, "x")],
    "group": [lambda p, n: fs.sample(p, fs.prompts.bos(p.vocab, 1), group=1.5)],
    "max_tokens": [lambda p, n: fs.sample(p, fs.prompts.bos(p.vocab, 1), max_tokens="x")],
    "temperature": [lambda p, n: fs.sample(p, fs.prompts.bos(p.vocab, 1), temperature=None)],
    "seed": [
        lambda p, n: fs.sample(p, fs.prompts.bos(p.vocab, 1), seed=-1),
        lambda p, n: fs.prompts.procedural(p.vocab, 2, seed="a"),
    ],
    "notes": [lambda p, n: fs.render("folder"), lambda p, n: fs.render(None), lambda p, n: fs.Clips("x")],
    "foo": [lambda p, n: fs.render(n, foo=3)],
    "vocab": [lambda p, n: fs.decode([[1]], vocab=None), lambda p, n: fs.prompts.procedural(None, 2)],
    "sequence": [lambda p, n: fs.decode("abc", p.vocab), lambda p, n: fs.decode(None, p.vocab)],
    "max_seconds": [lambda p, n: fs.decode([[1]], p.vocab, max_seconds="x")],
    "n is": [lambda p, n: fs.prompts.procedural(p.vocab, 1.5), lambda p, n: fs.prompts.bos(p.vocab, None)],
    "time_signatures": [lambda p, n: fs.prompts.procedural(p.vocab, 2, time_signatures="4/4")],
    "tempo_range": [
        lambda p, n: fs.prompts.procedural(p.vocab, 2, tempo_range=5),
        lambda p, n: fs.prompts.procedural(p.vocab, 2, tempo_range=(60, 90, 120)),
        lambda p, n: fs.prompts.procedural(p.vocab, 2, tempo_range=(60, "x")),
    ],
    "path": [lambda p, n: n.to_midi(0, None)],
    "folder": [lambda p, n: fs.save_policy(p, None)],
    "config": [lambda p, n: fs.train(None, "out"), lambda p, n: fs.train({}, "out")],
    "out": [lambda p, n: fs.train(fs.presets.demo(), None)],
    "train is": [lambda p, n: fs.Config(train={"steps": 3})],
}


@pytest.mark.parametrize("named", MISUSES)
def test_a_misused_argument_is_named(named: str, policy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    notes = NoteBatch.empty(1)
    for misuse in MISUSES[named]:
        with pytest.raises((TypeError, fs.UserError), match=named) as caught:
            misuse(policy, notes)
        assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_rewards_against_real_pieces_know_those_of_the_shipped_policy() -> None:
    for name in ("typicality", "presence"):
        assert fs.load_reward(name).name == name


def test_a_run_folder_is_loaded_as_its_newest_checkpoint() -> None:
    run = ROOT / "tests" / "run" / "old_run" / "run"
    newest = sorted((run / "checkpoints").glob("step-*"))[-1]
    loaded, wanted = fs.load_policy(run), fs.load_policy(newest)
    for (name, a), (_, b) in zip(loaded.named_parameters(), wanted.named_parameters(), strict=True):
        assert (a == b).all(), name
