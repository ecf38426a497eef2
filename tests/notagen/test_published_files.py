"""Files in the form NotaGen's authors publish: read whatever else they hold, and refused in one sentence."""

from __future__ import annotations

import math
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fastsmart.errors import UserError
from fastsmart.notagen.model import NotaGen, NotaGenSize
from fastsmart.notagen.weights import (
    HEAD,
    LARGE,
    MEDIUM,
    PUBLISHED,
    SMALL,
    WORDS,
    is_notagen,
    load_notagen,
    random_model,
    save_published,
    size_of,
)

TINY = NotaGenSize(2, 1, 64, 8)


@pytest.fixture(scope="module")
def model() -> NotaGen:
    return random_model(TINY)


@pytest.fixture
def file(model: NotaGen, tmp_path: Path) -> Path:
    return save_published(model, tmp_path / "weights.pth")


def changed(model: NotaGen, path: Path, **tensors: torch.Tensor | None) -> Path:
    """A file with some tensors replaced, or left out where None."""
    state = dict(model.state_dict()) | {HEAD: model.state_dict()[WORDS]}
    state |= {name: tensor for name, tensor in tensors.items() if tensor is not None}
    torch.save({"model": {name: t for name, t in state.items() if tensors.get(name, t) is not None}}, path)
    return path


def test_a_file_is_read_as_it_was_written(model: NotaGen, file: Path):
    read = load_notagen(file)
    assert read.size == TINY
    assert not read.training
    for (name, ours), (_, theirs) in zip(read.named_parameters(), model.named_parameters(), strict=True):
        assert torch.equal(ours, theirs), name


def test_a_file_of_a_training_run_is_read_past_its_optimizer(model: NotaGen, tmp_path: Path):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    model(torch.randint(3, 128, (1, 3, 16))).sum().backward()
    optimizer.step()
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    more = {"optimizer": optimizer.state_dict(), "lr_sched": schedule.state_dict()}
    path = save_published(model, tmp_path / "run.pth", **more, epoch=3, best_epoch=2, min_eval_loss=0.5)
    assert load_notagen(path).size == TINY


def test_masks_that_older_versions_store_are_left_out(model: NotaGen, tmp_path: Path):
    mask = {"patch_level_decoder.base.h.0.attn.bias": torch.ones(1, 1, 8, 8, dtype=torch.bool)}
    assert load_notagen(changed(model, tmp_path / "old.pth", **mask)).size == TINY


def test_a_folder_that_holds_one_file_is_a_policy(file: Path):
    assert load_notagen(file.parent).size == TINY
    assert is_notagen(str(file))
    assert is_notagen(str(file.parent))
    assert is_notagen("notagen-x")
    assert not is_notagen("pop909-tiny")
    assert not is_notagen(str(file.parent.parent / "absent"))


@pytest.mark.parametrize("size", [SMALL, MEDIUM, LARGE])
def test_the_published_sizes_are_told_from_their_tensors(size: NotaGenSize):
    with torch.device("meta"):
        assert size_of(dict(NotaGen(size).named_parameters())) == size


def test_the_six_published_files():
    assert list(PUBLISHED) == [f"notagen-{n}" for n in ("small", "medium", "large", "finetuned", "rl3", "x")]
    for published in PUBLISHED.values():
        assert f"h_size_{published.size.hidden}" in published.file
        assert f"p_length_{published.size.max_patches}_" in published.file


@pytest.mark.parametrize(
    ("tensors", "told"),
    [
        ({"patch_level_decoder.base.wpe.weight": None}, "is not a checkpoint of NotaGen"),
        ({"patch_level_decoder.base.h.1.ln_2.bias": None}, "patch_level_decoder.base.h.1.ln_2.bias is missing"),
        ({"char_level_decoder.base.extra": torch.ones(2)}, "char_level_decoder.base.extra is unknown"),
        ({WORDS: torch.ones(128, 64).int()}, "is no tensor of floats"),
        ({WORDS: torch.ones(64, 128)}, r"has the shape \(64, 128\) and not \(128, 64\)"),
        ({HEAD: torch.ones(128, 64)}, "is not the embedding it should be tied to"),
        ({"patch_level_decoder.patch_embedding.bias": torch.full((64,), math.nan)}, "numbers that are not finite"),
    ],
)
def test_the_first_tensor_that_is_wrong_is_named(model: NotaGen, tmp_path: Path, tensors: dict, told: str):
    with pytest.raises(UserError, match=told):
        load_notagen(changed(model, tmp_path / "wrong.pth", **tensors))


class Evil:
    def __reduce__(self) -> tuple:
        return (Path.touch, (Path("/nowhere/evil"),))


def _truncated(path: Path, model: NotaGen) -> None:
    save_published(model, path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


FOREIGN = {
    "truncated": _truncated,
    "empty": lambda path, model: path.write_bytes(b""),
    "text": lambda path, model: path.write_text("X:1\nK:C\n"),
    "code": lambda path, model: path.write_bytes(pickle.dumps(Evil())),
    "safetensors": lambda path, model: save_file({"a": torch.ones(2)}, path),
    "list": lambda path, model: torch.save([1, 2], path),
    "bare weights": lambda path, model: torch.save(model.state_dict(), path),
    "numbered": lambda path, model: torch.save({"model": {1: torch.ones(2)}}, path),
    "another network": lambda path, model: torch.save({"model": {"wte": torch.ones(2)}}, path),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_foreign_files_are_refused_in_one_sentence(model: NotaGen, tmp_path: Path, kind: str):
    path = tmp_path / "file.pth"
    FOREIGN[kind](path, model)
    with pytest.raises(UserError, match="ElectricAlexis/NotaGen") as refused:
        load_notagen(path)
    assert str(path) in str(refused.value)
    assert "\n" not in str(refused.value)


def test_what_is_not_there_is_said(tmp_path: Path, model: NotaGen):
    with pytest.raises(UserError, match="no NotaGen weights at"):
        load_notagen(tmp_path / "absent.pth")
    for name in ("a.pth", "b.pth"):
        save_published(model, tmp_path / name)
    with pytest.raises(UserError, match=r"must hold one checkpoint.*a\.pth, b\.pth"):
        load_notagen(tmp_path)


def test_a_published_name_without_network_says_where_to_get_the_file(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("fastsmart.machine.hub._reachable", lambda: False)
    with pytest.raises(UserError, match=r"no network.*ElectricAlexis/NotaGen"):
        load_notagen("notagen-x")
