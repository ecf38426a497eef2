"""Checkpoints: what is saved comes back, and what is broken is named."""

import json
import resource
import subprocess
import sys
import textwrap

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_policy import make_policy

from fastsmart.errors import UserError
from fastsmart.machine.files import atomic_folder
from fastsmart.policy.checkpoints import Checkpoints
from fastsmart.policy.hf_format import load_policy, save_policy, shipped_policies
from fastsmart.policy.optimizer import make_optimizer
from fastsmart.policy.transformer import Policy, PolicySize


def test_a_round_trip_keeps_every_bit(policy, checkpoint):
    again = load_policy(checkpoint)
    assert all(torch.equal(a, b) for a, b in zip(policy.parameters(), again.parameters(), strict=True))
    assert again.vocab.tokens == policy.vocab.tokens
    assert not again.training


def test_loading_imports_no_compiler(checkpoint):
    """Which takes PyTorch two seconds."""
    code = f"""if True:
        import sys
        from fastsmart.policy.hf_format import load_policy
        load_policy({str(checkpoint)!r})
        print("torch" in sys.modules, "torch._dynamo" in sys.modules)"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["True", "False"]


def test_sixteen_bit_weights_load_as_float32(policy, tmp_path):
    save_policy(policy, tmp_path / "half", torch.float16)
    again = load_policy(tmp_path / "half")
    for a, b in zip(policy.parameters(), again.parameters(), strict=True):
        assert b.dtype == torch.float32
        assert torch.equal(a.half().float(), b)


def test_a_tied_head_stays_tied(vocab, tmp_path):
    save_policy(make_policy(vocab, tied_head=True), tmp_path / "tied")
    assert "lm_head.weight" not in load_file(tmp_path / "tied" / "model.safetensors")
    again = load_policy(tmp_path / "tied")
    assert again.lm_head.weight is again.model.embed_tokens.weight


def edit_config(checkpoint, **changes):
    path = checkpoint / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_what_a_killed_process_left_is_cleared_away_and_what_it_moved_aside_put_back(policy, checkpoint):
    aside = checkpoint.parent / f".{checkpoint.name}.old.abc"
    aside.mkdir()
    checkpoint.rename(aside / checkpoint.name)  # killed between the two renames
    (checkpoint.parent / f".{checkpoint.name}.xyz").mkdir()  # killed while writing
    with pytest.raises(KeyboardInterrupt), atomic_folder(checkpoint):
        raise KeyboardInterrupt
    assert [p.name for p in checkpoint.parent.iterdir()] == [checkpoint.name]
    assert load_policy(checkpoint).size == policy.size


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"vocab_size": 400}, "weights for 400 tokens, but its vocabulary has 413"),
        ({"model_type": "llama"}, "model_type 'llama'"),
        ({"rope_scaling": {"type": "longrope"}}, "rotary scaling 'longrope'"),
        ({"num_hidden_layers": 3}, r"no tensor model\.layers\.2"),
        ({"intermediate_size": 96}, "its config says"),
        ({"hidden_size": "many"}, "not a Phi-3 configuration"),
        ({"num_attention_heads": 5}, "does not split into 5 heads"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(checkpoint, changes, says):
    edit_config(checkpoint, **changes)
    with pytest.raises(UserError, match=says):
        load_policy(checkpoint)


def test_a_wrong_vocabulary_beside_the_weights_is_refused(checkpoint):
    description = json.loads((checkpoint / "tokenizer.json").read_text())
    description["config"]["num_tempos"] = 32
    (checkpoint / "tokenizer.json").write_text(json.dumps(description))
    with pytest.raises(UserError, match="weights for 413 tokens, but its vocabulary has 381"):
        load_policy(checkpoint)


def test_a_checkpoint_without_vocabulary_takes_the_one_named(checkpoint):
    (checkpoint / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"policy\.vocabulary"):
        load_policy(checkpoint)
    assert len(load_policy(checkpoint, vocabulary="smart").vocab) == 413


def test_damaged_weights_are_named(checkpoint):
    weights = checkpoint / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"model\.safetensors is damaged"):
        load_policy(checkpoint)
    weights.unlink()
    with pytest.raises(UserError, match="safetensors only"):
        load_policy(checkpoint)


def test_an_unknown_policy_lists_the_shipped_ones():
    with pytest.raises(UserError, match=shipped_policies()[0]):
        load_policy("no-such-policy")


def test_a_missing_tensor_is_named(checkpoint):
    tensors = load_file(checkpoint / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, checkpoint / "model.safetensors")
    with pytest.raises(UserError, match=r"no tensor model\.norm\.weight"):
        load_policy(checkpoint)


def test_a_policy_of_another_size_than_its_vocabulary_is_refused(vocab):
    with pytest.raises(UserError, match="a policy of 10 tokens cannot use a vocabulary of 413"):
        Policy(PolicySize(10), vocab)


@pytest.mark.parametrize("limit", [20_000, 250_000], ids=["weights", "optimizer"])
def test_a_full_disk_leaves_the_previous_checkpoint_whole(policy, tmp_path, limit):
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    optimizer = make_optimizer(policy, 1e-3, (0.9, 0.999), 0.0)
    for parameter in policy.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    checkpoints.save(1, policy, optimizer)
    (checkpoint,) = checkpoints.all()
    before = {p.name: p.read_bytes() for p in checkpoint.iterdir()}
    assert len(before["model.safetensors"]) < 250_000 < len(before["optimizer.safetensors"])
    script = """
        import resource, sys
        from pathlib import Path
        from fastsmart.policy.hf_format import load_policy
        from fastsmart.policy.optimizer import make_optimizer
        from fastsmart.policy.checkpoints import Checkpoints
        policy, checkpoints = load_policy(sys.argv[1]), Checkpoints(Path(sys.argv[1]).parent)
        optimizer = make_optimizer(policy, 1e-3, (0.9, 0.999), 0.0)
        checkpoints.load(policy, optimizer)
        limit = int(sys.argv[2])  # bytes a file may have: the write fails half way, as on a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        checkpoints.save(2, policy, optimizer)
    """
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), str(checkpoint), str(limit)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 1
    assert "UserError: cannot write" in run.stderr
    assert {p.name: p.read_bytes() for p in checkpoint.iterdir()} == before
    assert [p.name for p in checkpoint.parent.iterdir()] == [checkpoint.name]  # nothing half-written left behind
