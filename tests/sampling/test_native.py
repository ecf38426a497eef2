"""The native engine draws from the policy's distribution and says with which probability."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from tiny_policy import eager_to_end, make_policy
from transformers import TopKLogitsWarper, TopPLogitsWarper

from fastsmart.errors import UserError
from fastsmart.kernels.sample import sample_tokens
from fastsmart.sampling import SamplingSettings, sample
from fastsmart.sampling.native import NativeEngine, _fewer_rows
from fastsmart.sampling.sampler import truncate, truncated
from fastsmart.tokens.token_batch import TokenBatch

PROMPTS = TokenBatch.pack([[21, 400, 180, 330], [1], [21, 401], [21, 400, 180, 331, 50, 120, 150]])


def full_forward(policy, rollout, i, temperature):
    """Log-probs of completion i from one pass over the whole sequence."""
    ids = torch.from_numpy(rollout.sequence(i).astype(np.int64))[None]
    with torch.no_grad():
        logprob = (policy(ids)[0] / temperature).log_softmax(-1)
    first = int(rollout.prompt_lengths[i])
    return logprob[first - 1 : -1].gather(-1, ids[0, first:, None])[:, 0].numpy()


@pytest.mark.parametrize("shape", [{}, {"num_kv_heads": 2}, {"tied_head": True}], ids=["plain", "gqa", "tied"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_are_those_of_a_full_forward_pass(vocab, shape, temperature):
    policy = make_policy(vocab, **shape)
    rollout = sample(policy, PROMPTS, group=6, max_tokens=80, temperature=temperature)
    for i, length in enumerate(rollout.lengths):
        expected = full_forward(policy, rollout, i, temperature)
        np.testing.assert_allclose(rollout.logprobs[i, :length], expected, atol=1e-4)


def test_completions_stream_as_they_end_and_stop_at_eos(vocab):
    policy = eager_to_end(vocab)
    settings = SamplingSettings(group=8, max_tokens=100)
    done = list(NativeEngine(policy, version=7).stream(PROMPTS, settings, (0,)))
    lengths = np.array([len(c.ids) for c in done])
    assert len(set(lengths)) > 5, "the test needs completions of different lengths"
    assert (np.diff(lengths) >= 0).all()  # shortest first: each was handed on when it ended
    assert sorted(c.index for c in done) == list(range(32))
    for c in done:
        assert (c.ids[:-1] != vocab.eos_id).all()
        assert c.ids[-1] == vocab.eos_id or len(c.ids) == 100
        assert c.version == 7


def test_compaction_and_chunks_do_not_change_what_is_drawn(vocab):
    policy = eager_to_end(vocab)
    together = sample(policy, PROMPTS, group=8, max_tokens=60)
    engine = NativeEngine(policy)
    few = SamplingSettings(group=8, max_tokens=60, max_rows=5)
    apart = {c.index: c for c in engine.stream(PROMPTS, few, (0,))}
    for i, length in enumerate(together.lengths):
        np.testing.assert_array_equal(apart[i].ids, together.ids[i, :length])
        np.testing.assert_allclose(apart[i].logprobs, together.logprobs[i, :length], atol=1e-4)


@pytest.mark.parametrize("static_cache", [False, True], ids=["compacted", "static"])
def test_ignore_eos_goes_on_to_max_tokens_with_the_same_tokens_until_the_end(vocab, static_cache):
    engine = NativeEngine(eager_to_end(vocab), static_cache=static_cache)
    settings = SamplingSettings(group=4, max_tokens=60)
    ended = sorted(engine.stream(PROMPTS, settings, (0,)), key=lambda c: c.index)
    whole = sorted(engine.stream(PROMPTS, replace(settings, ignore_eos=True), (0,)), key=lambda c: c.index)
    assert min(len(c.ids) for c in ended) < 60, "the test needs a completion that ends by itself"
    for short, long in zip(ended, whole, strict=True):
        assert len(long.ids) == 60
        np.testing.assert_array_equal(long.ids[: len(short.ids)], short.ids)


def test_whatever_ends_when_a_batch_goes_down_the_same_few_sizes():
    sizes = {64, 48, 36, 27, 20, 15, 11, 8, 6, 4, 3, 2, 1}
    rng = np.random.default_rng(0)
    for _ in range(50):
        rows = 64
        for running in sorted(rng.choice(64, 20, replace=False), reverse=True):
            fewer = _fewer_rows(rows, max(1, running))
            assert max(1, running) <= fewer <= rows
            assert fewer in sizes
            assert fewer == rows or running <= 0.75 * rows
            rows = fewer


def test_the_same_seed_gives_the_same_rollout_and_another_does_not(policy):
    a, b, c = (sample(policy, PROMPTS, group=2, max_tokens=30, seed=seed) for seed in (5, 5, 6))
    np.testing.assert_array_equal(a.ids, b.ids)
    np.testing.assert_array_equal(a.logprobs, b.logprobs)
    assert (a.ids != c.ids).any()
    assert (a.ids[0] != a.ids[1]).any()  # the group is no eight times the same


def test_first_tokens_follow_the_policys_distribution(policy):
    prompt = PROMPTS.row(0)
    rollout = sample(policy, TokenBatch.pack([prompt]), group=20_000, max_tokens=1, temperature=1.3)
    with torch.no_grad():
        p = (policy(torch.from_numpy(prompt.astype(np.int64))[None])[0, -1].double() / 1.3).softmax(-1).numpy()
    counts = np.bincount(rollout.ids[:, 0], minlength=len(p))
    rare = p * 20_000 < 5  # too rare for the test one by one: the rarest common token takes them in
    rare[np.argmin(np.where(rare, 1.0, p))] = True
    observed = np.append(counts[~rare], counts[rare].sum())
    expected = np.append(p[~rare], p[rare].sum()) * 20_000
    assert len(observed) > 20
    assert chisquare(observed, expected).pvalue > 1e-4


def test_a_new_load_changes_weights_and_version(vocab):
    first, second = make_policy(vocab, seed=0), make_policy(vocab, seed=1)
    engine = NativeEngine(first)
    with torch.no_grad():
        first.lm_head.weight.zero_()  # the engine has its own copy
    settings = SamplingSettings(group=2, max_tokens=20)
    before = list(engine.stream(PROMPTS, settings, (0,)))
    engine.load(second, 3)
    after = {c.index: c for c in engine.stream(PROMPTS, settings, (0,))}
    expected = sample(second, PROMPTS, group=2, max_tokens=20)
    assert {c.version for c in before} == {0}
    assert {c.version for c in after.values()} == {3}
    for i in range(len(expected)):
        np.testing.assert_array_equal(after[i].ids, expected.ids[i, : expected.lengths[i]])
    assert any((after[c.index].ids[: len(c.ids)] != c.ids[: len(after[c.index].ids)]).any() for c in before)


def test_truncation_is_that_of_transformers():
    logits = torch.randn(50, 413, generator=torch.Generator().manual_seed(0)) * 3
    ids = torch.zeros(50, 1, dtype=torch.long)
    torch.testing.assert_close(truncate(logits, 10, 1.0), TopKLogitsWarper(10)(ids, logits))
    torch.testing.assert_close(truncate(logits, 0, 0.9), TopPLogitsWarper(0.9)(ids, logits))
    truncated_logits, temperature = truncated(logits, SamplingSettings(top_k=1))
    token, logprob = sample_tokens(truncated_logits, torch.full((50,), 1.0 - 2.0**-24), temperature)
    assert torch.equal(token, logits.argmax(-1))
    assert (logprob == 0).all()


def test_the_ends_of_the_uniform_range_draw_possible_tokens():
    logits = torch.tensor([[-torch.inf, 0.0, 1.0, -torch.inf]] * 2)
    token, logprob = sample_tokens(logits, torch.tensor([0.0, 1.0 - 2.0**-24]))
    assert token.tolist() == [1, 2]
    assert logprob.isfinite().all()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"engine": "warp"}, r"sampling\.engine is 'warp'"),
        ({"group": 0}, r"sampling\.group"),
        ({"temperature": 0.0}, r"sampling\.temperature"),
        ({"top_p": 0.0}, "top_p"),
    ],
)
def test_settings_that_make_no_sense_are_refused(change, says):
    with pytest.raises(UserError, match=says):
        SamplingSettings(**change)


def test_sequences_longer_than_the_policy_and_empty_prompts_are_refused(vocab):
    policy = make_policy(vocab, max_positions=64)
    with pytest.raises(UserError, match=r"lower sampling\.max_tokens"):
        sample(policy, PROMPTS, max_tokens=60)
    with pytest.raises(UserError, match="a prompt is empty"):
        sample(policy, TokenBatch.pack([[1], []]), max_tokens=5)
