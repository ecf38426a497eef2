"""The policy is Hugging Face's Phi-3: the same numbers out of the same files, in both directions."""

import copy
import json
from pathlib import Path

import pytest
import torch
from tiny_policy import make_policy
from transformers import Phi3ForCausalLM

from fastsmart.errors import UserError
from fastsmart.policy.hf_format import load_policy, save_policy
from fastsmart.policy.transformer import Policy
from fastsmart.sampling import sample
from fastsmart.tokens.token_batch import TokenBatch

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
    ids = torch.randint(0, len(vocab), (3, 200), generator=torch.Generator().manual_seed(2))
    ids[0, 50:53] = vocab.pad_id  # whose embedding transformers leaves as it is

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
    if not ours.size.tied_head:
        assert not ours.model.embed_tokens.weight.grad[vocab.pad_id].any()
        assert ours.lm_head.weight.grad[vocab.pad_id].any()


def test_sampled_pads_do_not_swell_the_gradient(vocab, tmp_path):
    """In a checkpoint that transformers initialised, PAD's embedding is zero, where RMSNorm is steepest."""
    ours = make_policy(vocab)
    with torch.no_grad():
        ours.model.embed_tokens.weight[vocab.pad_id] = 0
    save_policy(ours, tmp_path / "ours")
    theirs = theirs_of(tmp_path / "ours")
    ids = torch.randint(1, len(vocab), (4, 100), generator=torch.Generator().manual_seed(4))
    ids[:, 10::25] = vocab.pad_id
    norms = []
    for model in (ours, theirs, with_pad_trained(ours)):
        logits = model(ids)
        loss = torch.nn.functional.cross_entropy(getattr(logits, "logits", logits).flatten(0, 1), ids.flatten())
        loss.backward()
        norms.append(float(torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])))
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)
    assert norms[2] > 1.5 * norms[0]


def with_pad_trained(policy: Policy) -> Policy:
    """A copy that gives PAD's embedding a gradient."""
    other = copy.deepcopy(policy)
    other.zero_grad()
    other.model.embed_tokens.padding_idx = None
    return other


def test_within_a_sliding_window_the_numbers_are_those_of_transformers_and_longer_pieces_are_refused(vocab, tmp_path):
    save_policy(make_policy(vocab), tmp_path / "ours")
    config = json.loads((tmp_path / "ours" / "config.json").read_text())
    (tmp_path / "ours" / "config.json").write_text(json.dumps(config | {"sliding_window": 24}))
    ours, theirs = load_policy(tmp_path / "ours"), theirs_of(tmp_path / "ours")
    assert theirs.config.sliding_window == ours.size.max_positions == 24
    ids = torch.randint(1, len(vocab), (2, 25), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        assert (ours(ids[:, :24]) - theirs(ids[:, :24]).logits).abs().max() <= 1e-4
        unbounded = make_policy(vocab)(ids)
        assert (unbounded - theirs(ids).logits).abs()[:, :24].max() <= 1e-4
        assert (unbounded - theirs(ids).logits).abs()[:, 24].max() > 1e-2  # here the window acts
    with pytest.raises(UserError, match=r"the policy holds 24 \(max_position_embeddings, or sliding_window"):
        sample(ours, TokenBatch.pack([[1]]), max_tokens=24)


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
