"""The controllers hold a measure above its floor on plants of many strengths, and are idle where nothing pulls."""

import numpy as np
import pytest

from fastsmart.grpo.control import Controller


def closed_loop(authority: float, pressure: float, seed: int, steps: int = 200) -> np.ndarray:
    """The measure over time of a plant that reward pulls down and the multiplier pulls up, both fading as the
    learning rate does; measured with noise."""
    rng = np.random.default_rng(seed)
    measure, controller, course = 1.0, Controller(0.5), []
    for step in range(steps):
        controller = controller.step(measure + rng.normal(0, 0.03), floor=0.93)
        rate = 1 - step / steps
        weight = controller.weight
        measure += rate * (authority * weight * (1 - measure) - pressure) / (1 + weight)
        measure = min(max(measure, 0.0), 1.0)
        course.append(measure)
    return np.array(course)


@pytest.mark.parametrize("authority", [0.05, 0.15, 0.5])
@pytest.mark.parametrize("pressure", [0.004, 0.008])
def test_it_holds_the_floor_where_the_plant_lets_it(authority: float, pressure: float):
    end = np.mean([closed_loop(authority, pressure, seed)[-1] for seed in range(8)])
    least = np.mean([closed_loop(authority, pressure, seed).min() for seed in range(8)])
    assert end > 0.9
    assert least > 0.85


def test_without_pressure_the_weight_falls_to_nothing():
    controller = Controller(0.5)
    for _ in range(30):
        controller = controller.step(1.0, floor=0.93)
    assert controller.weight == 0.0
    assert controller.integral == 0.0


def test_it_does_not_wind_up_at_its_bound():
    controller = Controller(0.5)
    for _ in range(500):
        controller = controller.step(0.2, floor=0.93)
    assert controller.integral == 4.0
    for _ in range(40):
        controller = controller.step(1.0, floor=0.93)
    assert controller.weight < 3.0


def test_what_cannot_be_measured_changes_nothing():
    controller = Controller(0.5, 0.9, 0.2)
    assert controller.step(float("nan"), 0.93) == controller
