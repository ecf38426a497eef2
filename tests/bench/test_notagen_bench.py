"""The benchmark of NotaGen at a toy size, and the arithmetic its floor is made of."""

from __future__ import annotations

import harness
import notagen
import pytest
import torch
from harness import Ceilings
from torch.utils.flop_counter import FlopCounterMode


def test_both_are_timed_at_the_same_prefixes(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(harness, "reference_kernel", lambda device: lambda: None)
    monkeypatch.setattr(notagen, "measured_ceilings", lambda *_: Ceilings(100.0, 10.0))
    threads = torch.get_num_threads()
    options = ["--shape", "tiny", "--rows", "3", "--prefixes", "8", "1", "--runs", "1", "--patches", "8", "--whole"]
    try:
        figures = notagen.main([*options, "--device", "cpu", "--threads", "1"])
    finally:
        torch.set_num_threads(threads)
    assert list(figures["cases"]) == ["after 1", "after 8"]
    for case in figures["cases"].values():
        assert set(case["contenders"]) == {notagen.OURS, notagen.PUBLIC, harness.REFERENCE}
    assert figures["projection"]["times_as_fast"] > 0
    assert figures["projection"]["whole_chars_per_s"] > 0
    assert "times as fast" in capsys.readouterr().out


def test_a_projection_is_the_sum_over_the_patches_of_a_piece():
    ours, public = notagen.OURS, notagen.PUBLIC
    measured = [{ours: 1.0, public: 2.0}, {ours: 1.0, public: 6.0}]
    found = notagen.projected([1, 3], measured, rows=4, patches=3)
    assert found["seconds"] == {ours: 3.0, public: 12.0}
    assert found["ours_chars_per_s"] == 4 * 3 * 16 / 3
    assert found["times_as_fast"] == 4 * 12 / 3
    assert notagen.projected([1, 3], measured, rows=4, patches=4)["seconds"] == {ours: 4.0, public: 20.0}


def test_the_floor_counts_the_products_that_are_made():
    model = notagen.endless_model(notagen.NotaGenSize(3, 2, 256, 64))
    job = notagen.next_patches(model, rows=4, prefix=32)
    with FlopCounterMode(display=False) as counter:
        job()
    counted = counter.get_total_flops() * 1e-9
    floor = sum(work.gflop for work in notagen.drawing_work(model.size, 4, 32, 4))
    assert floor < counted < 1.05 * floor  # what is left is the attention of sixteen characters
