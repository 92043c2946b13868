"""From times to figures, and the FLOPs behind the share of the limit."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from lutdeploy.config import model_config
from lutdeploy.engines.benchmark import limits as bench_limits
from lutdeploy.engines.benchmark.method import (
    Window,
    best_row,
    block_seconds,
    gains,
    images_per_second,
    settled,
    share_of_peak,
    speed,
    sweep_sizes,
)
from lutdeploy.fused import FusedNetwork, TimeBias
from lutdeploy.model import LutTransformer


def windows(*medians: float) -> list[Window]:
    """A window in each round, with steps around its median."""
    return [Window(k, (0.9 * m, m, 1.5 * m)) for k, m in enumerate(medians)]


def test_three_windows_within_a_tenth_settle() -> None:
    made = windows(3.0, 2.0, 1.0, 1.05, 1.1)
    assert settled(made) == made[2:]
    assert settled(made[:4]) is None
    assert settled(windows(1.0, 1.05, 1.11)) is None
    assert settled(windows(1.0, 1.0)) is None


def test_the_last_settled_windows_count_even_when_noise_follows() -> None:
    made = windows(1.0, 1.0, 1.0, 5.0, 1.0)
    assert settled(made) == made[:3]


def test_a_stable_speed_is_that_of_its_settled_windows() -> None:
    found = speed(windows(9.0, 1.0, 1.02, 1.04), windows(2.0, 2.0, 2.0, 2.0))
    assert found.stable and found.windows == 4
    assert found.step_seconds == 1.02
    assert (found.step_seconds_min, found.step_seconds_max) == (0.9, 1.5 * 1.04)


def test_an_unstable_speed_is_that_of_all_windows() -> None:
    found = speed(windows(1.0, 2.0, 4.0), ())
    assert not found.stable
    assert found.step_seconds == 2.0
    assert found.ratio_to_original is None and found.ratio_min is None


def test_a_ratio_pairs_the_rounds() -> None:
    """The machine's clock halves in the middle: both are slow at once, the ratio stays 2."""
    ours, original = windows(1.0, 1.0, 2.0, 2.0), windows(2.0, 2.0, 4.0, 4.0)
    found = speed(ours, original)
    assert (found.ratio_min, found.ratio_to_original, found.ratio_max) == (2, 2, 2)
    missed = speed(ours, [w for w in original if w.round != 1])
    assert missed.ratio_to_original == 2


def test_a_ratio_is_stable_when_both_were() -> None:
    ours = windows(1.0, 1.0, 1.0)
    assert speed(ours, windows(2.0, 2.1, 2.0)).ratio_stable
    assert not speed(ours, windows(2.0, 3.0, 2.0)).ratio_stable
    assert not speed(ours, windows(2.0, 2.0)).ratio_stable
    assert not speed(windows(1.0, 2.0, 1.0), windows(2.0, 2.0, 2.0)).ratio_stable


def test_the_sweep_goes_on_while_images_a_second_grow_by_a_twentieth() -> None:
    assert gains([]) and gains([10.0])
    assert gains([10.0, 10.5])
    assert not gains([10.0, 10.4])
    assert not gains([10.0, 20.0, 20.5])
    assert sweep_sizes(16) == [1, 2, 4, 8, 16]
    assert sweep_sizes(15) == [1, 2, 4, 8]
    assert sweep_sizes(1) == [1]


def test_the_best_batch_is_the_smallest_that_is_nearly_as_fast() -> None:
    rows = [
        {"batch": batch, "images_per_second": rate}
        for batch, rate in ((1, 50.0), (2, 98.0), (4, 100.0), (8, 90.0))
    ]
    assert best_row(rows) == rows[1]
    assert best_row([]) is None


def test_images_a_second_and_share_of_the_peak() -> None:
    assert images_per_second(16, 0.25, 64) == 1.0
    assert share_of_peak(50, 0.5, 200.0) == 0.5
    assert share_of_peak(50, 0.5, None) is None
    assert bench_limits.rate("fp32", 0.5, 10) == 4000
    assert bench_limits.rate(bench_limits.MEMORY, 2.0, 10) == bench_limits.COPIED_BYTES


def test_the_time_of_a_batch_size_is_foreseen() -> None:
    fast, slow = 0.01, 1.0
    expected = 3 * ((0.1 + fast + 0.3) + (0.1 + slow + 2 * slow))
    assert block_seconds({"a": fast, "b": slow}, 0.3, 2, 0.1) == pytest.approx(expected)


@torch.inference_mode()
def test_the_formula_counts_what_the_rewritten_network_multiplies(preset: str) -> None:
    config = model_config(preset, "tiny")
    model = LutTransformer(config)
    batch = 3
    network, time = FusedNetwork(model, "fp32"), TimeBias(model.stem)
    x, bias = torch.randn(batch, *config.image_shape), time(torch.rand(batch))
    with FlopCounterMode(display=False) as counter:
        network(x, bias)
    assert counter.get_total_flops() == 2 * config.multiply_adds() * batch
