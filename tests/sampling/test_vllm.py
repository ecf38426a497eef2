"""Real vLLM on the CPU keeps the contract of the native engine."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import chi2_contingency
from tiny_policy import eager_to_end
from vllm_policy import SHAPE, make_vllm_policy

from fastsmart.errors import UserError
from fastsmart.policy.hf_format import save_policy
from fastsmart.sampling import Rollout, SamplingSettings, make_engine
from fastsmart.sampling import vllm as vllm_engine
from fastsmart.sampling.settings import VllmSettings
from fastsmart.sampling.vllm import VllmEngine, missing_api
from fastsmart.sampling.vllm_isolation import isolated
from fastsmart.tokens.token_batch import TokenBatch

PROMPTS = TokenBatch.pack([[21, 400, 180, 330], [1], [21, 401], [21, 400, 180, 331, 50, 120, 150]])
SETTINGS = SamplingSettings("vllm", group=6, max_tokens=60, max_rows=24)


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # for policies as small as these
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def shared(vocab):
    """An engine, and the policy whose weights it holds: tests that load others put these back."""
    policy = make_vllm_policy(vocab)
    engine = make_engine(SETTINGS, policy, version=7)
    yield engine, policy
    engine.close()


def worst_gap(policy, rollout, temperature):
    """Largest |log-prob - that of one pass over the whole sequence|."""
    worst = 0.0
    for i, length in enumerate(rollout.lengths):
        ids = torch.from_numpy(rollout.sequence(i).astype(np.int64))[None]
        with torch.no_grad():
            logprob = (policy(ids)[0] / temperature).log_softmax(-1)
        first = int(rollout.prompt_lengths[i])
        expected = logprob[first - 1 : -1].gather(-1, ids[0, first:, None])[:, 0].numpy()
        worst = max(worst, float(np.abs(expected - rollout.logprobs[i, :length]).max()))
    return worst


def draw(engine, settings, seed=(0,)):
    return Rollout.gather(engine.stream(PROMPTS, settings, seed), PROMPTS, settings.group)


@pytest.mark.parametrize("shape", [{}, {"num_kv_heads": 1}, {"tied_head": True}], ids=["plain", "gqa", "tied"])
def test_logprobs_are_the_trainers_before_and_after_each_sync(vocab, shape):
    engine = make_engine(SETTINGS, make_vllm_policy(vocab, **shape))
    try:
        for version, temperature in enumerate((1.0, 0.7, 1.3)):
            policy = make_vllm_policy(vocab, seed=version, **shape)
            if version:
                engine.load(policy, version)
            assert engine.first_difference(policy) is None
            rollout = draw(engine, replace(SETTINGS, temperature=temperature))
            assert worst_gap(policy, rollout, temperature) < 1e-4
            assert rollout.version == version
    finally:
        engine.close()


def test_in_bfloat16_the_logprobs_are_those_of_a_float32_head(vocab):
    policy = make_vllm_policy(vocab)
    engine = make_engine(SETTINGS, policy, dtype=torch.bfloat16)
    try:
        rollout = draw(engine, SETTINGS)
        assert engine.first_difference(policy) is None
    finally:
        engine.close()
    assert worst_gap(policy.bfloat16().float(), rollout, 1.0) < 0.3  # of logits up to about 10 in 8 bits
    # a bfloat16 head would give values with 8 significant bits; these have more
    values = torch.from_numpy(rollout.logprobs[rollout.logprobs < -0.1])
    assert (values.bfloat16().float() != values).float().mean() > 0.9


def test_every_tensor_that_differs_is_named(shared):
    engine, policy = shared
    for name, parameter in policy.named_parameters():
        before = parameter.detach().clone()
        with torch.no_grad():
            parameter[..., 0] += 0.25
        assert engine.first_difference(policy) == name
        with torch.no_grad():
            parameter.copy_(before)
    assert engine.first_difference(policy) is None


def test_the_engine_has_its_own_copy_and_an_unsent_tensor_stays_behind(shared, vocab, monkeypatch):
    engine, policy = shared
    other = make_vllm_policy(vocab, seed=1)
    everything = vllm_engine.weights_of
    left_out = "model.layers.1.mlp.down_proj.weight"
    monkeypatch.setattr(vllm_engine, "weights_of", lambda p: ((n, t) for n, t in everything(p) if n != left_out))
    engine.load(other, 8)
    assert engine.first_difference(other) == left_out
    monkeypatch.undo()
    engine.load(policy, 7)
    with torch.no_grad():
        policy.lm_head.weight.mul_(2.0)
    assert engine.first_difference(policy) == "lm_head.weight"
    with torch.no_grad():
        policy.lm_head.weight.mul_(0.5)
    assert engine.first_difference(policy) is None


def test_completions_stream_as_they_end_with_their_version(shared):
    """Of a policy that ends at any token with about the same probability: lengths differ whatever is drawn."""
    engine, policy = shared
    eos = policy.vocab.eos_id
    engine.load(eager_to_end(policy.vocab, 0.06, **SHAPE), 8)
    done = list(engine.stream(PROMPTS, replace(SETTINGS, max_tokens=100), (3,), first=100))
    engine.load(policy, 7)
    lengths = np.array([len(c.ids) for c in done])
    assert len(set(lengths)) > 5, "the test needs completions of different lengths"
    assert (np.diff(lengths) >= 0).all()  # shortest first: each was handed on when it ended
    assert sorted(c.index for c in done) == list(range(100, 124))
    for c in done:
        assert (c.ids[:-1] != eos).all()
        assert c.ids[-1] == eos or len(c.ids) == 100
        assert (c.ids.dtype, c.logprobs.dtype, c.version) == (np.int32, np.float32, 8)
        assert len(c.logprobs) == len(c.ids)


def test_a_stream_given_up_leaves_nothing_behind(shared):
    engine, _ = shared
    stream = engine.stream(PROMPTS, SETTINGS, (0,))
    next(stream)
    with pytest.raises(RuntimeError, match="one batch at a time"):
        next(engine.stream(PROMPTS, SETTINGS, (0,)))
    stream.close()
    assert not engine.engine.has_unfinished_requests()
    assert len(draw(engine, SETTINGS)) == 24


def test_a_completion_depends_on_seed_and_number_alone(shared):
    engine, _ = shared
    together = draw(engine, SETTINGS)
    again = draw(engine, SETTINGS)
    np.testing.assert_array_equal(together.ids, again.ids)
    np.testing.assert_array_equal(together.logprobs, again.logprobs)
    assert (draw(engine, SETTINGS, (1,)).ids != together.ids).any()
    assert (together.ids[0] != together.ids[1]).any()
    last = list(engine.stream(TokenBatch.pack([PROMPTS.row(3)]), SETTINGS, (0,), first=18))
    for c in last:
        np.testing.assert_array_equal(c.ids, together.ids[c.index, : together.lengths[c.index]])


def test_it_sleeps_between_rollouts_and_wakes_for_what_is_needed(shared, monkeypatch):
    """On a CPU nothing is freed, but vLLM keeps the same account of what is asleep, and refuses to step or to wake
    what is awake."""
    engine, policy = shared
    awake = draw(engine, SETTINGS)
    asked = []
    wake_up = engine.engine.wake_up
    monkeypatch.setattr(engine.engine, "wake_up", lambda tags: asked.append(tags) or wake_up(tags))
    monkeypatch.setattr(engine, "sleeps", True)
    np.testing.assert_array_equal(draw(engine, SETTINGS).ids, awake.ids)
    assert engine.engine.is_sleeping()
    np.testing.assert_array_equal(draw(engine, SETTINGS).ids, awake.ids)
    engine.load(policy, 7)
    np.testing.assert_array_equal(draw(engine, SETTINGS).ids, awake.ids)
    assert asked == [["kv_cache", "weights"], ["weights"], ["kv_cache"]]
    monkeypatch.setattr(engine, "sleeps", False)
    np.testing.assert_array_equal(draw(engine, SETTINGS).ids, awake.ids)
    assert not engine.engine.is_sleeping()


def homogeneity(a, b):
    """p-value of two samples of tokens having one distribution; rare tokens are counted together."""
    table = np.stack([np.bincount(x, minlength=413) for x in (a, b)])
    rare = table.sum(0) < 20
    return chi2_contingency(np.c_[table[:, ~rare], table[:, rare].sum(1, keepdims=True) + 1]).pvalue


def test_token_frequencies_are_those_of_the_native_engine(shared):
    engine, policy = shared
    prompt = TokenBatch.pack([PROMPTS.row(0)])
    first = replace(SETTINGS, group=20_000, max_tokens=1, temperature=1.2)
    ours, theirs = (
        np.concatenate([c.ids for c in e.stream(prompt, first, (5,))])
        for e in (make_engine(replace(first, engine="native"), policy), engine)
    )
    assert len(ours) == len(theirs) == 20_000
    assert homogeneity(ours, theirs) > 1e-4
    assert homogeneity(ours, np.where(np.arange(20_000) % 20, theirs, 60)) < 1e-6  # 5 % of another token is seen


def test_stationary_frequencies_are_those_of_the_native_engine(shared):
    """Tokens of one completion depend on each other, so completions are what a permutation test exchanges."""
    engine, policy = shared
    prompt = TokenBatch.pack([PROMPTS.row(0)])
    long = replace(SETTINGS, group=350, max_tokens=62)
    both = [
        Rollout.gather(e.stream(prompt, long, (5,)), prompt, 350)
        for e in (make_engine(replace(long, engine="native"), policy), engine)
    ]
    assert min(r.lengths.sum() for r in both) > 20_000
    counts = np.stack([np.bincount(r.ids[i, : r.lengths[i]], minlength=413) for r in both for i in range(350)])

    def distance(order):
        a, b = counts[order[:350]].sum(0), counts[order[350:]].sum(0)
        return ((a - b) ** 2 / np.maximum(a + b, 1)).sum()

    random_order = np.random.default_rng(0)
    permuted = np.array([distance(random_order.permutation(700)) for _ in range(1000)])
    assert (permuted >= distance(np.arange(700))).mean() > 1e-3
    counts[350:] = np.roll(counts[350:], 1, axis=1)  # another distribution is seen
    permuted = np.array([distance(random_order.permutation(700)) for _ in range(1000)])
    assert (permuted >= distance(np.arange(700))).mean() < 1e-3


def test_engines_side_by_side_end_one_by_one(vocab):
    first, second = make_vllm_policy(vocab), make_vllm_policy(vocab, seed=1)
    engines = [make_engine(SETTINGS, policy) for policy in (first, second)]
    engines[0].close()
    engines[0].close()  # does nothing
    with pytest.raises(UserError, match="this policy's are of 16"):
        make_engine(SETTINGS, make_vllm_policy(vocab, hidden_size=32))
    assert worst_gap(second, draw(engines[1], SETTINGS), 1.0) < 1e-4
    engines[1].close()


def test_engines_and_syncs_under_other_numbers_of_threads_compute_with_the_weights_they_were_sent(vocab):
    """Without AVX-512, oneDNN lays a weight out by the number of threads; vLLM's compiled products know one layout."""
    engines = []
    try:
        for seed, threads in enumerate((1, 2, 3)):
            torch.set_num_threads(threads)
            policy = make_vllm_policy(vocab, seed=seed)
            engines.append(make_engine(SETTINGS, policy))
            assert torch.get_num_threads() == threads
            assert engines[-1].first_difference(policy) is None
            assert worst_gap(policy, draw(engines[-1], SETTINGS), 1.0) < 1e-4
        torch.set_num_threads(2)
        engines[0].load(policy, 1)
        assert engines[0].first_difference(policy) is None
        assert worst_gap(policy, draw(engines[0], SETTINGS), 1.0) < 1e-4
    finally:
        for engine in engines:
            engine.close()


def test_memory_is_what_the_plan_says(shared):
    engine, policy = shared
    memory = engine.memory
    assert memory.weight_bytes == 4 * policy.num_parameters
    block_bytes = 2 * 2 * 2 * 32 * 4 * memory.block_tokens  # k and v, layers, heads, head size, float32
    held = sum(cache.numel() * cache.element_size() for cache in caches(engine))
    assert held == memory.kv_cache_bytes == block_bytes * (24 * 1 + 1)  # 24 rows of one block each, one of vLLM's own


def caches(engine):
    return engine.engine.model_executor.driver_worker.worker.model_runner.kv_caches


def test_what_fastsmart_calls_is_there(monkeypatch):
    assert missing_api() == []
    from vllm.outputs import CompletionOutput
    from vllm.v1.engine.llm_engine import LLMEngine

    monkeypatch.delattr(LLMEngine, "set_weight_version")
    monkeypatch.delitem(CompletionOutput.__dataclass_fields__, "weight_versions")
    monkeypatch.delattr(CompletionOutput, "weight_versions")
    assert missing_api() == ["CompletionOutput.weight_versions", "LLMEngine.set_weight_version"]


@pytest.mark.parametrize(
    ("size", "change", "says"),
    [
        (
            {"hidden_size": 32, "num_heads": 4, "num_kv_heads": 4},
            {},
            "heads of 32, .* this policy's are of 8: use --engine native",
        ),
        ({}, {"vllm": VllmSettings(sleep=True)}, "this policy is on the CPU"),
        ({}, {"vllm": VllmSettings(kv_cache_bytes=1)}, r"kv_cache_bytes is 1; .* needs \d+"),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence(vocab, size, change, says):
    with pytest.raises(UserError, match=says):
        make_engine(replace(SETTINGS, **change), make_vllm_policy(vocab, **size))


def test_a_version_outside_the_window_is_refused(vocab, monkeypatch):
    for version, says in (("0.31.0", "vLLM 0.31.0 is not one"), (None, "needs vLLM: pip install")):
        monkeypatch.setattr(vllm_engine, "installed_version", lambda *packages, version=version: version)
        with pytest.raises(UserError, match=says):
            VllmEngine(make_vllm_policy(vocab), 0, torch.float32)


def test_sequences_longer_than_the_policy_empty_prompts_and_broken_weights_are_refused(shared):
    engine, policy = shared
    with pytest.raises(UserError, match=r"lower sampling\.max_tokens"):
        draw(engine, replace(SETTINGS, max_tokens=2045))
    with pytest.raises(UserError, match="a prompt is empty"):
        list(engine.stream(TokenBatch.pack([[1], []]), SETTINGS, (0,)))
    before = policy.lm_head.weight.detach().clone()
    with torch.no_grad():
        policy.lm_head.weight.fill_(float("nan"))
    engine.load(policy, 7)
    with pytest.raises(UserError, match="no longer finite"):
        draw(engine, SETTINGS)
    with torch.no_grad():
        policy.lm_head.weight.copy_(before)
    engine.load(policy, 7)
    assert worst_gap(policy, draw(engine, SETTINGS), 1.0) < 1e-4


def test_vllm_loads_the_checkpoint_we_save_by_itself(vocab, tmp_path):
    """Not only what a sync sends: config.json and tensors on disk, with a tied head."""
    policy = make_vllm_policy(vocab, tied_head=True, num_kv_heads=1)
    save_policy(policy, tmp_path / "saved")
    engine = make_engine(SETTINGS, policy)
    with vllm_engine.packed_alike(), isolated(), vllm_engine.groups.joined():
        from vllm.engine.arg_utils import EngineArgs
        from vllm.v1.engine.llm_engine import LLMEngine

        engine.engine = LLMEngine.from_engine_args(
            EngineArgs(
                model=str(tmp_path / "saved"),
                skip_tokenizer_init=True,
                dtype="float32",
                enforce_eager=True,
                logprobs_mode="processed_logprobs",
                kv_cache_memory_bytes=engine.memory.kv_cache_bytes,
                disable_log_stats=True,
                use_tqdm_on_load=False,
            )
        )
        engine.engine.set_weight_version("0")
    try:
        assert worst_gap(policy, draw(engine, SETTINGS), 1.0) < 1e-4
    finally:
        vllm_engine.end_engine(engine.engine)
        engine.close()
