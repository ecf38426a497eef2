"""The formulas by which docs/scaling.md reckons agree with what PyTorch counts while the code runs."""

import pytest
import torch
from counting import audiobox_work, counting, decode_kernels, sampling_work, update_work
from harness import Work
from scaling import PROMPT, Job, sampling_terms, update_terms


def gflop(work: list[Work]) -> float:
    return sum(each.gflop for each in work)


def test_update_is_8_operations_a_weight_and_token_and_attention():
    job = Job(width=256, layers=2, clips=32, tokens=250)
    products, attention, _ = update_terms(job)
    assert attention > 0.1 * products  # so that a wrong one shows
    assert gflop(update_work(job)) == pytest.approx(products + attention, rel=0.03)


def test_sampling_is_2_operations_a_weight_and_token_and_attention():
    job = Job(width=128, layers=2, clips=8, tokens=40)
    _, products, gbyte, _ = sampling_terms(job)
    attention = gbyte / 2  # 4 operations for a key and its value, which are 8 bytes
    prompt = (PROMPT - 1) / job.tokens * products
    assert gflop(sampling_work(job)) == pytest.approx(products + attention + prompt, rel=0.03)


def test_a_window_of_audiobox_is_148_gflop():
    assert gflop(audiobox_work(1)) == pytest.approx(148.0, rel=0.01)


def test_a_product_is_counted_with_its_bytes_and_a_view_is_free():
    a, b = torch.zeros(30, 40), torch.zeros(40, 50)
    with counting() as work:
        (a @ b).t().contiguous()  # the transpose is a view, then comes a copy
    assert [each.gflop for each in work] == pytest.approx([2e-9 * 30 * 40 * 50, 0.0])
    assert [each.gbyte for each in work] == pytest.approx([4e-9 * (30 * 40 + 40 * 50 + 30 * 50), 8e-9 * 30 * 50])


@pytest.mark.parametrize("static_cache", [True, False])
def test_kernels_of_a_decode_step_are_those_of_its_layers_and_the_rest(static_cache):
    a_layer, beside = decode_kernels(static_cache)
    steps = [len(sampling_work(Job(64, 3, 8, tokens), static_cache=static_cache)) for tokens in (5, 6)]
    assert steps[1] - steps[0] == 3 * a_layer + beside
