"""The policy is Hugging Face's Phi-3: the same numbers out of the same files, in both directions."""

from pathlib import Path

import pytest
import torch
from tiny_policy import make_policy
from transformers import Phi3ForCausalLM

from fastsmart.policy.hf_format import load_policy, save_policy

SHAPES = [{}, {"num_kv_heads": 2}, {"num_kv_heads": 1, "tied_head": True}, {"tied_head": True, "rope_theta": 500.0}]


def theirs_of(folder: Path) -> Phi3ForCausalLM:
    return Phi3ForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)


@pytest.mark.parametrize("shape", SHAPES, ids=["plain", "gqa", "mqa-tied", "tied-theta"])
def test_logits_and_gradients_are_those_of_transformers(vocab, tmp_path, shape):
    ours = make_policy(vocab, **shape)
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            if "norm" in name:  # ones would hide a norm weight that is left out
                parameter.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(1))
    save_policy(ours, tmp_path / "ours")
    theirs = theirs_of(tmp_path / "ours")
    # PAD (0) is left out: transformers gives its embedding no gradient, and no sequence holds it
    ids = torch.randint(1, len(vocab), (3, 200), generator=torch.Generator().manual_seed(2))

    ours_logits, theirs_logits = ours(ids), theirs(ids).logits
    assert theirs_logits.std() > 0.1
    assert (ours_logits - theirs_logits).abs().max() <= 1e-4

    probe = torch.randn(ours_logits.shape, generator=torch.Generator().manual_seed(3))
    (ours_logits * probe).mean().backward()
    (theirs_logits * probe).mean().backward()
    gradients = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        theirs_gradient = gradients[name].grad
        assert theirs_gradient is not None
        torch.testing.assert_close(parameter.grad, theirs_gradient, rtol=1e-3, atol=1e-4 * theirs_gradient.abs().max())


def test_a_checkpoint_saved_by_transformers_loads(vocab, tmp_path):
    ours = make_policy(vocab, num_kv_heads=2)
    save_policy(ours, tmp_path / "ours")
    theirs_of(tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    vocab.save(tmp_path / "theirs")
    again = load_policy(tmp_path / "theirs")
    for (name, a), b in zip(ours.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b), name
    assert again.size == ours.size


def test_a_checkpoint_split_over_files_loads(vocab, tmp_path):
    ours = make_policy(vocab)
    save_policy(ours, tmp_path / "ours")
    theirs_of(tmp_path / "ours").save_pretrained(tmp_path / "split", max_shard_size="20KB")
    vocab.save(tmp_path / "split")
    assert len(list((tmp_path / "split").glob("*.safetensors"))) > 1
    again = load_policy(tmp_path / "split")
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), again.parameters(), strict=True))
