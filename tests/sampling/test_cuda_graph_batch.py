"""A batch in memory that stays in place draws what a compacted one draws, and a step of it can be recorded."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_policy import eager_to_end, make_policy
from torch.utils._python_dispatch import TorchDispatchMode
from watched_stream import WatchedStream

from fastsmart.errors import UserError
from fastsmart.kernels import decode_product, decode_step
from fastsmart.sampling import SamplingSettings, cuda_graph_batch, native
from fastsmart.sampling.cuda_graph_batch import GraphBatch, _Look
from fastsmart.sampling.native import _STATIC_KEPT, NativeEngine
from fastsmart.tokens.token_batch import TokenBatch

PROMPTS = TokenBatch.pack([[21, 400, 180, 330], [1], [21, 401], [21, 400, 180, 331, 50, 120, 150]])
SAME_LENGTH = TokenBatch.pack([[21, 400, 180, 330], [21, 401, 180, 331]])
WAITS = {
    "item",
    "_local_scalar_dense",
    "is_nonzero",
    "nonzero",
    "masked_select",
    "equal",
    "unique",
}  # of the GPU


def sampled(engine, settings, prompts=PROMPTS, seed=0, first=0):
    """The completions in the order they came."""
    return list(engine.stream(prompts, settings, (seed,), first))


def assert_same(some, others):
    assert sorted(c.index for c in some) == sorted(c.index for c in others)
    others = {c.index: c for c in others}
    for c in some:
        np.testing.assert_array_equal(c.ids, others[c.index].ids)
        np.testing.assert_allclose(c.logprobs, others[c.index].logprobs, atol=1e-4)
        assert c.version == others[c.index].version


def assert_same_until_a_border(some, others):
    """For two ways of multiplying: a random number within rounding of a border between two tokens parts two completions
    for good. Until there their log-probs are the same, and few are parted."""
    some, others = (sorted(completions, key=lambda c: c.index) for completions in (some, others))
    parted = 0
    for one, other in zip(some, others, strict=True):
        n = min(len(one.ids), len(other.ids))
        differ = one.ids[:n] != other.ids[:n]
        first = int(differ.argmax()) if differ.any() else n
        parted += first < n
        np.testing.assert_allclose(one.logprobs[:first], other.logprobs[:first], atol=1e-4)
        assert first < n or len(one.ids) == len(other.ids)
    assert parted <= max(1, len(some) // 16)


@pytest.mark.parametrize(
    "max_tokens",
    [1, 2, cuda_graph_batch.LOOK_EVERY, cuda_graph_batch.LOOK_EVERY + 1, cuda_graph_batch.LOOK_EVERY + 2, 100],
)
def test_a_static_batch_draws_the_tokens_of_a_compacted_one(vocab, max_tokens):
    """Lengths around one look of the host, and far beyond."""
    policy, settings = eager_to_end(vocab, 0.08), SamplingSettings(group=8, max_tokens=max_tokens)
    plain, batch = (
        sampled(NativeEngine(policy, 3), settings),
        sampled(NativeEngine(policy, 3, static_cache=True), settings),
    )
    assert_same(batch, plain)
    if max_tokens == 100:
        lengths = [len(c.ids) for c in plain]
        assert len(set(lengths)) > 5, "the test needs completions of different lengths"
        assert max(lengths) > 64
        assert [len(c.ids) for c in batch] == lengths  # each is handed on after those that ended before it


@pytest.mark.parametrize("looks", [1, 2], ids=["as on a CPU", "as on a GPU"])
def test_rows_that_have_ended_go_when_half_of_many_can(vocab, monkeypatch, looks):
    """Into one batch after the other, in whose memory the next prompts go on too; with a block drawn ahead, or not."""
    monkeypatch.setattr(native, "HALVED_ABOVE", 4)
    made, build = [], GraphBatch.__init__

    def with_looks(self, *given):
        build(self, *given)
        self.looks = [_Look(self.sampled, self.logprobs) for _ in range(looks)]
        made.append(self)

    monkeypatch.setattr(GraphBatch, "__init__", with_looks)
    policy, other = eager_to_end(vocab, 0.08), eager_to_end(vocab, 0.09)
    settings = SamplingSettings(group=9, max_tokens=100)
    engine = NativeEngine(policy, static_cache=True)
    halved, plain = sampled(engine, settings), sampled(NativeEngine(policy), settings)
    assert_same(halved, plain)
    assert [len(c.ids) for c in halved] == [len(c.ids) for c in plain]
    assert [batch.rows for batch in made] == [36, 18, 9, 4]
    assert list(engine.graph_batches.values()) == made[:1]
    engine.load(other, 1)
    assert_same(sampled(engine, settings, seed=1), sampled(NativeEngine(other, 1), settings, seed=1))
    assert len(made) == 4


def test_few_rows_are_not_halved(vocab):
    policy, settings = eager_to_end(vocab, 0.08), SamplingSettings(group=8, max_tokens=100)
    engine = NativeEngine(policy, static_cache=True)
    sampled(engine, settings)
    (batch,) = engine.graph_batches.values()
    assert batch.half is None


@pytest.mark.parametrize("shape", [{"num_kv_heads": 2}, {"tied_head": True}], ids=["gqa", "tied"])
@pytest.mark.parametrize("drawing", [{"temperature": 0.7}, {"top_k": 20}, {"top_p": 0.8}], ids=str)
def test_static_and_compacted_batches_agree_for_every_policy_and_distribution(vocab, shape, drawing):
    policy, settings = make_policy(vocab, **shape), SamplingSettings(group=4, max_tokens=70, max_rows=7, **drawing)
    assert_same(sampled(NativeEngine(policy, static_cache=True), settings), sampled(NativeEngine(policy), settings))


def test_in_16_bit_it_is_as_near_to_32_bit_as_the_other(vocab):
    """What is rounded to 16 bit differs between the two, so each is compared with the policy's own log-probs."""
    policy, settings = make_policy(vocab), SamplingSettings(group=64, max_tokens=12)
    errors = {}
    for static_cache in (True, False):
        engine = NativeEngine(policy, 0, torch.bfloat16, static_cache=static_cache)
        completions = sampled(engine, settings, SAME_LENGTH)
        assert len(completions) == 128
        errors[static_cache] = np.concatenate([np.abs(c.logprobs - own_logprobs(policy, c)) for c in completions])
    static, compacted = (errors[static_cache].mean() for static_cache in (True, False))
    assert 0 < static < 1.3 * compacted
    assert compacted < 1.3 * static
    assert compacted < 0.012
    assert max(errors[True].max(), errors[False].max()) < 0.15


def own_logprobs(policy, completion):
    """Float32 log-probs of a completion of SAME_LENGTH, 64 for each prompt, by one pass of the policy."""
    prompt = SAME_LENGTH.row(completion.index // 64).tolist()
    ids = torch.tensor([*prompt, *completion.ids.tolist()])
    with torch.no_grad():
        logprobs = policy(ids[None, :-1])[0, len(prompt) - 1 :].log_softmax(-1)
    return logprobs.gather(-1, ids[len(prompt) :, None])[:, 0].numpy()


def test_memory_is_used_again_for_other_prompts_weights_and_numbers(vocab):
    """Nothing of the batch before may be seen: longer prompts than before, shorter ones, padded and not."""
    first, second = eager_to_end(vocab), make_policy(vocab, seed=1)
    engine, settings = NativeEngine(first, static_cache=True), SamplingSettings(group=4, max_tokens=70)
    sampled(engine, settings)
    (batch,) = engine.graph_batches.values()
    held = [
        batch.token,
        batch.sampled,
        batch.cache[0].kv,
        engine.weights.embed,
        *(m.weight for m in engine.weights.matrices()),
    ]
    where = [tensor.data_ptr() for tensor in held]
    engine.load(second, 4)
    shorter = TokenBatch.pack([[1], [21], [400], [21]])
    for prompts, seed in ((shorter, 5), (PROMPTS, 6)):
        expected = sampled(NativeEngine(second, 4, static_cache=True), settings, prompts, seed, first=32)
        assert_same(sampled(engine, settings, prompts, seed, first=32), expected)
    assert list(engine.graph_batches.values()) == [batch]
    assert [tensor.data_ptr() for tensor in held] == where
    assert engine.first_difference(second) is None
    assert engine.first_difference(first) == "model.embed_tokens.weight"


@pytest.mark.parametrize("static_cache", [True, False])
def test_the_sampler_works_on_its_own_stream_and_its_customers_do_not(policy, static_cache):
    engine, inside = NativeEngine(policy, static_cache=static_cache), []
    engine.own, forward, load = WatchedStream(), engine.weights.forward, engine.weights.load
    engine.weights.forward = lambda *given: inside.append(engine.own.entered) or forward(*given)
    for _ in engine.stream(PROMPTS, SamplingSettings(group=2, max_tokens=20), (0,)):
        assert not engine.own.entered
    assert inside == [True] * len(inside) != []
    engine.weights.load = lambda policy: inside.append(engine.own.turns) or load(policy)
    engine.load(policy, 1)
    assert (inside[-1], engine.own.turns, engine.own.entered) == (1, 1, False)


def test_memory_is_kept_for_a_few_shapes_only(policy):
    engine = NativeEngine(policy, static_cache=True)
    for group in range(1, _STATIC_KEPT + 3):
        sampled(engine, SamplingSettings(group=group, max_tokens=3))
    rows = [key[0] for key in engine.graph_batches]
    assert rows == [len(PROMPTS) * group for group in range(3, _STATIC_KEPT + 3)]
    sampled(engine, SamplingSettings(group=3, max_tokens=3))  # the oldest, which is the newest from now on
    assert [key[0] for key in engine.graph_batches] == [*rows[1:], rows[0]]


@pytest.mark.parametrize("static_cache", [True, False])
def test_memory_is_kept_by_who_stops_asking_at_the_last_completion(policy, static_cache):
    engine = NativeEngine(policy, dtype=torch.float32)
    engine.static_cache = static_cache
    settings = SamplingSettings(group=2, max_tokens=6)
    held = []
    for _ in range(2):
        stream = engine.stream(PROMPTS, settings, (0,))
        assert len([next(stream) for _ in range(2 * len(PROMPTS))]) == 8  # as a run takes them: it does not ask again
        stream.close()
        held.append(list(engine.graph_batches.values()) if static_cache else [c.kv.data_ptr() for c in engine.memory])
    assert held[0]
    assert held[0] == held[1]


def test_a_policy_that_has_diverged_is_found_and_leaves_nothing_behind(vocab):
    good, bad = make_policy(vocab), make_policy(vocab)
    with torch.no_grad():
        bad.model.layers[0].self_attn.qkv_proj.weight.fill_(torch.nan)
    engine, settings = NativeEngine(good, static_cache=True), SamplingSettings(group=2, max_tokens=30)
    sampled(engine, settings)
    engine.load(bad, 1)
    with pytest.raises(UserError, match="no longer finite"):
        sampled(engine, settings)
    engine.load(good, 0)
    assert_same(sampled(engine, settings), sampled(NativeEngine(good), settings))


def test_two_streams_at_once_do_not_share_memory(vocab):
    policy, settings = eager_to_end(vocab), SamplingSettings(group=2, max_tokens=60)
    engine = NativeEngine(policy, static_cache=True)
    one, two = (engine.stream(PROMPTS, settings, (seed,)) for seed in (0, 1))
    turns = [(next(one, None), next(two, None)) for _ in range(len(PROMPTS) * 2)]
    plain = NativeEngine(policy)
    for seed, completions in enumerate(zip(*turns, strict=True)):
        assert_same(completions, sampled(plain, settings, seed=seed))


class Operators(TorchDispatchMode):
    """The names of the operators that were called."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.names.add(operator.overloadpacket.__name__)
        return operator(*args, **(kwargs or {}))


def test_a_step_waits_for_nothing(policy):
    """What is recorded must not ask the GPU for a number."""
    engine = NativeEngine(policy, static_cache=True)
    sampled(engine, SamplingSettings(group=2, max_tokens=30))
    (batch,) = engine.graph_batches.values()
    with torch.inference_mode():
        batch.column.zero_()
        with Operators() as step:
            batch.step()
    with Operators() as asking:
        batch.column.item()
    assert {"matmul", "index_copy_"} < step.names
    assert not step.names & WAITS
    assert asking.names & WAITS


def test_with_tritons_kernels(vocab, monkeypatch):
    """In the interpreter: the sampler draws the same, from prompts of different lengths, with shared keys."""
    pytest.importorskip("triton")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    policy, settings = make_policy(vocab, num_kv_heads=2, num_layers=1), SamplingSettings(group=1, max_tokens=8)
    policy = policy.to(device)
    plain = sampled(NativeEngine(policy), settings)
    asked = []
    monkeypatch.setattr(decode_step, "choose_kernel", lambda kernel, device: asked.append(kernel) or "triton")
    assert_same(sampled(NativeEngine(policy, static_cache=True), settings), plain)
    assert set(asked) == {"auto"}


@pytest.mark.parametrize("kernel", ["torch", "triton"])
@pytest.mark.parametrize("shape", [{"num_kv_heads": 2}, {"tied_head": True}], ids=["gqa", "tied"])
def test_with_fused_products(vocab, monkeypatch, kernel, shape):
    """Those of few rows in 16 bit, here in float32, so that the same must be drawn: by the twins, and by Triton's
    kernels (on a GPU, or in the interpreter). The operators of a step wait for nothing."""
    if kernel == "triton":
        pytest.importorskip("triton")
    device = "cuda" if kernel == "triton" and torch.cuda.is_available() else "cpu"
    policy, settings = make_policy(vocab, num_layers=2, **shape).to(device), SamplingSettings(group=1, max_tokens=3)
    plain = sampled(NativeEngine(policy), settings)
    asked = []
    for module in (decode_product, decode_step):
        monkeypatch.setattr(module, "choose_kernel", lambda *given: asked.append(given) or kernel)
    monkeypatch.setattr(cuda_graph_batch, "serves", lambda rows, dtype, device: True)
    engine = NativeEngine(policy, static_cache=True)
    assert_same(sampled(engine, settings), plain)
    assert len(asked) >= 2 * (2 * 5 + 1)  # five kernels a layer and the head, two steps
    (batch,) = engine.graph_batches.values()
    with torch.inference_mode(), Operators() as step:
        batch.column.zero_()
        batch.step()
    assert not step.names & WAITS


@pytest.mark.gpu
def test_on_a_gpu_the_sampler_does_not_wait_for_the_trainer(vocab):
    """What the default stream has still to do changes nothing that is drawn, and new weights are those it has made."""
    policy, settings = eager_to_end(vocab).to("cuda"), SamplingSettings(group=8, max_tokens=100)
    engine = NativeEngine(policy)
    expected = sampled(engine, settings)
    big, other = torch.randn(8192, 8192, device="cuda"), make_policy(vocab, seed=1).to("cuda")
    torch.cuda.synchronize()
    for _ in range(100):  # seconds of float32 products
        big = big @ big
    busy = torch.cuda.Event()
    busy.record()
    assert_same(sampled(engine, settings), expected)
    assert not busy.query(), "the sampler has waited"
    with torch.no_grad():
        for mine, new in zip(policy.parameters(), other.parameters(), strict=True):
            mine.copy_(new)  # when the products are done
    engine.load(policy, 1)
    assert_same(sampled(engine, settings), sampled(NativeEngine(other, 1), settings))


@pytest.mark.gpu
def test_on_a_gpu_many_rows_are_halved(vocab):
    """Once with the graphs of half the rows to record, once with them at hand."""
    policy, settings = eager_to_end(vocab).to("cuda"), SamplingSettings(group=64, max_tokens=100)
    engine = NativeEngine(policy)
    first, again = sampled(engine, settings), sampled(engine, settings)
    (batch,) = engine.graph_batches.values()
    assert batch.rows == 256
    assert batch.half.graphs
    assert_same(again, first)
    assert_same_until_a_border(first, sampled(engine, replace(settings, cuda_graph=False)))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_on_a_gpu_replays_draw_what_launches_draw(vocab, dtype):
    policy, settings = eager_to_end(vocab).to("cuda"), SamplingSettings(group=8, max_tokens=100)
    other = make_policy(vocab, seed=1).to("cuda")
    engine = NativeEngine(policy, 0, dtype)
    replayed = sampled(engine, settings)
    engine.load(other, 0)
    replayed_other = sampled(engine, settings)
    if dtype == torch.float32:
        assert_same_until_a_border(replayed_other, sampled(engine, replace(settings, cuda_graph=False)))
    (batch,) = engine.graph_batches.values()
    batch.graphs.clear()
    assert_same(replayed_other, sampled(engine, settings))
    engine.load(policy, 0)
    assert_same(replayed, sampled(engine, settings))
