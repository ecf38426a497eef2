"""How cost grows, on costs whose growth is known."""

import numpy as np
import pytest
from growth import growth, longest_run
from scaling import fit_constants

SIZES = (8, 16, 32, 64, 128, 256, 512)


def test_a_power_law_has_its_exponent_everywhere():
    terms = [[float(n) ** 1.1, 0.0] for n in SIZES]
    line = growth("clips", "score", SIZES, [0.01 * n**1.1 for n in SIZES], terms, np.array([0.01, 0.0]))
    assert line["exponent"] == pytest.approx(1.1)
    assert line["local"] == pytest.approx([1.1] * 6) == line["model_local"]
    assert line["proportional"] == [8, 512]
    assert line["why_not"] == {}


def test_growth_bends_where_the_terms_that_bend_it_are_large():
    """A constant of 20 ms, 1 ms a token, and a square that is as large as these at 1,024 tokens."""
    sizes = (4, 16, 64, 256, 1024)
    terms = [[1.0, float(n), float(n) ** 2, 0.0] for n in sizes]
    seconds = [0.02 + 0.001 * n + 0.000001 * n**2 for n in sizes]
    units = fit_constants(terms, seconds)
    assert units[:3] == pytest.approx([0.02, 0.001, 0.000001])
    line = growth("tokens", "sample", sizes, seconds, terms, units)
    assert line["why_not"]["4 to 16"].startswith("calls:")
    assert line["why_not"]["256 to 1024"].startswith("keys and values:")
    assert "64 to 256" not in line["why_not"]
    assert line["proportional"] == [64, 256]


def test_what_the_model_does_not_have_is_said_to_be_so():
    line = growth("clips", "score", (1, 2), [1.0, 4.0], [[1.0, 1.0], [2.0, 2.0]], np.array([0.5, 0.5]))
    assert line["why_not"] == {"1 to 2": "not in the model"}


def test_work_that_is_shared_among_workers_is_proportional_when_twice_as_many_take_half_as_long():
    terms = [[1.0 / w, 1.0 / w, 1.0] for w in (1, 2, 4)]
    good = growth("workers", "render", (1, 2, 4), [8.0, 4.0, 2.0], terms, np.array([8.0, 0.0, 0.0]))
    assert good["proportional"] == [1, 4]
    slow = growth("workers", "render", (1, 2, 4), [8.0, 6.0, 5.0], terms, np.array([4.0, 0, 4.0]))
    assert slow["proportional"] is None
    assert slow["why_not"]["2 to 4"].startswith("copies by one process:")


def test_longest_run_of_true_values():
    assert longest_run([False, True, True, False, True]) == (1, 3)
    assert longest_run([False]) == (0, 0)
