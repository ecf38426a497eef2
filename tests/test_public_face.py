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
    fs.sample: "policy, prompts, group=1, max_tokens=256, temperature=1.0, seed=0, engine='native', top_k=0, top_p=1.0",
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
