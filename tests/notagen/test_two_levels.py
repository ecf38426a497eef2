"""The two-level network beside transformers' GPT-2, which the authors built theirs of."""

from __future__ import annotations

import copy

import pytest
import torch
from public_notagen import PublicNotaGen
from torch import Tensor

from fastsmart.notagen.model import BOS, EOS, PATCH_CHARS, NotaGenSize, shapes
from fastsmart.notagen.packed import packed
from fastsmart.notagen.weights import HEAD, LARGE, MEDIUM, SMALL, random_model

TINY = NotaGenSize(2, 2, 128, 24)
CLOSE = 1e-4  # in log-probs


def drawn_patches(pieces: int, count: int) -> Tensor:
    """Patches of random characters, some of them short, after the first patch of every piece."""
    generator = torch.Generator().manual_seed(1)
    patches = torch.randint(3, 128, (pieces, count, PATCH_CHARS), generator=generator)
    patches[:, 0], patches[:, 0, -1] = BOS, EOS
    patches[:, 2, 9], patches[:, 2, 10:] = EOS, 0
    return patches


@torch.no_grad()
def assert_equals_transformers(size: NotaGenSize, pieces: int, count: int) -> None:
    model = random_model(size, seed=3, scale=2.0)  # beyond GPT-2's first weights, so that attention attends
    patches = drawn_patches(pieces, count)
    ours, theirs = model(patches), PublicNotaGen(model).logprobs(patches)
    written = patches[:, 1:] != 0
    assert ours[written].std() > 0.1
    assert (ours - theirs)[written].abs().max() < CLOSE
    assert (ours[~written] == 0).all()


def test_log_probs_equal_transformers():
    assert_equals_transformers(TINY, 2, 24)


@pytest.mark.slow
@pytest.mark.parametrize("size", [SMALL, MEDIUM, LARGE], ids=["small", "medium", "large"])
def test_log_probs_of_the_published_shapes_equal_transformers(size: NotaGenSize):
    assert_equals_transformers(size, 1, 6)


@pytest.mark.parametrize(
    ("size", "parameters"), [(SMALL, 109_579_776), (MEDIUM, 243_677_184), (LARGE, 515_738_880)]
)  # the publication says 110, 244 and 516 million
def test_the_sizes_are_the_published_ones(size: NotaGenSize, parameters: int):
    found = shapes(size)
    assert sum(torch.Size(shape).numel() for shape in found.values()) == parameters
    assert HEAD not in found  # tied


def test_the_large_one_has_323_tensors_with_its_head():
    assert len(shapes(LARGE)) + 1 == 323


def test_patches_of_pad_at_the_end_change_nothing():
    model, patches = random_model(TINY), drawn_patches(1, 8)
    longer = torch.cat([patches, torch.zeros(1, 5, PATCH_CHARS, dtype=torch.int64)], dim=1)
    with torch.no_grad():
        short, long = model(patches), model(longer)
    torch.testing.assert_close(long[:, :7], short, rtol=0, atol=1e-5)
    assert (long[:, 7:] == 0).all()


def test_the_gradient_reaches_every_parameter_that_is_used():
    model, patches = random_model(TINY), drawn_patches(1, 8)
    model(patches).sum().backward()
    idle = {name for name, p in model.named_parameters() if p.grad is None}
    assert idle == {"patch_level_decoder.base.wte.weight"}


def test_packed_products_say_what_the_network_says():
    """In bfloat16, as a CPU with fast 16-bit products samples: no further from float64 than the network itself is."""
    exact = random_model(NotaGenSize(2, 2, 128, 16), seed=3)
    half = copy.deepcopy(exact).bfloat16()
    lean = packed(half, 3)
    assert packed(exact, 3) is exact
    patches = torch.randint(3, 128, (3, 5, 16), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected, plain, found = (m(patches).double() for m in (exact.double(), half, lean))
    assert (found - expected).abs().mean() < 1.2 * (plain - expected).abs().mean()
    assert (found - expected).abs().max() < 0.05
    assert not torch.equal(found, lean(patches.flip(0)).double())
