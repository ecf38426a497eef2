"""Blends of weights: their ends are the two policies, bit for bit, and what lies between them can be played."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny_policy import make_policy

from fastsmart import UserError
from fastsmart.cli import main
from fastsmart.policy.blend import blend_alpha, blended, write_blends
from fastsmart.policy.hf_format import load_policy, save_policy


@pytest.fixture
def two(vocab, tmp_path):
    for seed, name in enumerate(("base", "tuned")):
        policy = make_policy(vocab, seed)
        with torch.no_grad():  # values whose differences float32 cannot hold, and a negative zero
            policy.lm_head.weight[0, :3] = torch.tensor([1e30, -0.0, 1e-30]) * (-1) ** seed
        save_policy(policy, tmp_path / name)
    return str(tmp_path / "base"), str(tmp_path / "tuned")


def bits(policy) -> dict[str, torch.Tensor]:
    return {name: p.detach().view(torch.int32) for name, p in policy.named_parameters()}


def test_the_ends_are_base_and_tuned_bit_for_bit_and_the_rest_lies_between(two, tmp_path):
    written = write_blends(*two, [0.0, 0.25, 1.0], tmp_path / "blends")
    assert [path.name for path in written] == ["alpha-0", "alpha-0.25", "alpha-1"]
    base, tuned = (load_policy(source) for source in two)
    first, between, last = (load_policy(path) for path in written)
    for ours, theirs in ((first, base), (last, tuned)):
        for name, stored in bits(theirs).items():
            assert torch.equal(bits(ours)[name], stored), name
    for name, weight in between.named_parameters():
        a, b = (dict(p.named_parameters())[name].double() for p in (base, tuned))
        torch.testing.assert_close(weight, (a + 0.25 * (b - a)).float(), rtol=1e-6, atol=0)
    assert json.loads((written[1] / "blend.json").read_text()) == {
        "alpha": 0.25,
        "base": two[0],
        "tuned": two[1],
        "average": False,
    }
    assert [blend_alpha(path) for path in (*written, two[0])] == [0.0, 0.25, 1.0, None]


def test_a_blend_leaves_both_policies_as_they_were(two):
    base, tuned = (load_policy(source) for source in two)
    before = bits(base), bits(tuned)
    blended(base, tuned, 0.5)
    for policy, kept in zip((base, tuned), before, strict=True):
        assert all(torch.equal(now, kept[name]) for name, now in bits(policy).items())


def test_changes_of_others_are_added_with_their_weights(two, vocab, tmp_path, capsys):
    save_policy(make_policy(vocab, 7), tmp_path / "other")
    other = str(tmp_path / "other")
    code = main(
        ["blend", two[1], "--base", two[0], "--alphas", "0,1", "--add", f"{other}:0.25", "--add", f"{two[1]}:-1"]
    )
    assert code == 0
    written = capsys.readouterr().out.splitlines()
    base, tuned, third = (dict(load_policy(s).named_parameters()) for s in (*two, other))
    for path, alpha in zip(written, (0, 1), strict=True):
        for name, weight in load_policy(path).named_parameters():
            a, b, c = (p[name].double() for p in (base, tuned, third))
            torch.testing.assert_close(
                weight, (a + (alpha - 1) * (b - a) + 0.25 * (c - a)).float(), rtol=1e-5, atol=1e-7
            )
    assert json.loads((Path(written[0]) / "blend.json").read_text())["added"] == [[other, 0.25], [two[1], -1.0]]


def test_a_blend_plays_as_at_another_temperature(two, vocab, tmp_path, capsys):
    assert main(["blend", two[1], "--base", two[0], "--alphas", "0.5", "--out", str(tmp_path / "warm")]) == 0
    cooler = ["--temperature", "0.8", "--out", str(tmp_path / "cool")]
    assert main(["blend", two[1], "--base", two[0], "--alphas", "0.5", *cooler]) == 0
    warm, cool = (load_policy(path) for path in capsys.readouterr().out.split())
    ids = torch.arange(8)[None] % len(vocab)
    with torch.no_grad():
        cold, usual = (policy(ids)[..., 3:].double() for policy in (cool, warm))  # two of the first weights are 1e30
    torch.testing.assert_close(cold, usual / 0.8, rtol=1e-5, atol=1e-6)
    assert json.loads((tmp_path / "cool/alpha-0.5/blend.json").read_text())["temperature"] == 0.8


def test_nothing_lies_between_policies_of_different_size(two, vocab, tmp_path, capsys):
    save_policy(make_policy(vocab, num_layers=1), tmp_path / "other")
    with pytest.raises(UserError, match="of another size"):
        write_blends(two[0], str(tmp_path / "other"), [0.5], tmp_path / "blends")
    assert not (tmp_path / "blends").exists()
    assert main(["blend", two[1], "--base", two[0], "--add", f"{tmp_path / 'other'}:0.1"]) == 2
    assert f"{tmp_path / 'other'} is of another size" in capsys.readouterr().err
    assert main(["blend", str(tmp_path / "other"), "--base", two[0]]) == 2
    error = capsys.readouterr().err
    assert "of another size" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--alphas", "0.5,x"], "--alphas has 'x'"),
        (["--alphas", "1.5"], "--alphas has '1.5'"),
        (["--alphas", "0.5,0.5"], "--alphas has 0.5 twice"),
        (["--add", "runs/b"], "--add has 'runs/b'; write a policy and a weight from -2 to 2"),
        (["--add", "runs/b:nan"], "--add has 'runs/b:nan'"),
        (["--temperature", "0"], "--temperature"),
        ([], "is no run, which would say what it was tuned from; name that with --base"),
    ],
)
def test_what_can_be_mended_is_one_sentence(two, capsys, options, says):
    assert main(["blend", two[1], *options]) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1


def test_the_command_writes_the_default_alphas_beside_the_checkpoint(two, capsys):
    assert main(["blend", two[1], "--base", two[0]]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert [line.rsplit("/", 2)[1:] for line in shown] == [
        ["blends", f"alpha-{a}"] for a in ("0.25", "0.5", "0.75", "1")
    ]
