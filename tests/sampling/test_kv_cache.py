"""What a query reads from the cache is attention over all slots so far, however they were laid out."""

import pytest
import torch
import torch.nn.functional as F

from fastsmart.sampling.kv_cache import BLOCK, LayerCache

R, K, E, S = 3, 2, 8, 3 * BLOCK + 5


@pytest.fixture(params=[True, False], ids=["Intel", "others"], autouse=True)
def intel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the cache is laid out as on an Intel processor."""
    monkeypatch.setattr("fastsmart.sampling.kv_cache.mkl_knows_processor", lambda: request.param)
    return request.param


def filled(end: int, prompt: int) -> tuple[LayerCache, torch.Tensor]:
    """A cache whose first `end` slots came as a prompt and then one by one; what it was given, [R, end, 2, K, E]."""
    cache = LayerCache.empty((R, K, S, E), torch.float32, torch.device("cpu"))
    cache.kv.fill_(torch.nan)
    if cache.values_transposed is not None:
        cache.values_transposed.fill_(torch.nan)
    given = torch.randn(R, end, 2, K, E, generator=torch.Generator().manual_seed(0))
    cache.put(given[:, :prompt], 0)
    for slot in range(prompt, end):
        cache.put(given[:, slot : slot + 1], slot)
    return cache, given


def test_values_are_transposed_where_mkl_does_not_know_the_processor(intel: bool) -> None:
    cache, _ = filled(5, 1)
    assert (cache.values_transposed is None) == intel


@pytest.mark.parametrize("queries", [1, 3])  # for each key head
@pytest.mark.parametrize("end", [5, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK, S])
@pytest.mark.parametrize("prompt", [1, BLOCK + 7])
def test_it_is_attention_over_what_was_put_in(end: int, prompt: int, queries: int) -> None:
    cache, given = filled(end, min(prompt, end))
    q = torch.randn(R, K, queries, E, generator=torch.Generator().manual_seed(1))
    seen = torch.arange(end) >= torch.tensor([0, 2, 4])[:, None, None, None]  # [R, 1, 1, end]
    keys, values = given.permute(2, 0, 3, 1, 4)
    for keep in (slice(None), torch.tensor([2, 0])):
        rows = cache if isinstance(keep, slice) else cache.rows(keep)
        for mask in (None, seen[keep]):
            wanted = F.scaled_dot_product_attention(q[keep], keys[keep], values[keep], mask, scale=1.0)
            found = rows.attend(q[keep].flatten(0, 1), end, mask)
            torch.testing.assert_close(found, wanted.flatten(0, 1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_queries_of_16_bit_are_read_in_float32_on_a_cpu(dtype: torch.dtype) -> None:
    """Of products of 16 bit oneDNN compiles one for every number of slots and keeps it: 7 GB after 400 outputs."""
    _, given = filled(S, 1)
    cache = LayerCache.empty((R, K, S, E), dtype, torch.device("cpu"))
    plain = LayerCache.empty((R, K, S, E), torch.float32, torch.device("cpu"))
    assert cache.kv.dtype == torch.float32
    for held in (cache, plain):
        held.put(given.to(dtype), 0)
    q = torch.randn(R * K, 2, E, generator=torch.Generator().manual_seed(1)).to(dtype)
    found = cache.attend(q, S, None)
    assert found.dtype == dtype
    assert torch.equal(found, plain.attend(q.float(), S, None).to(dtype))
