"""Distances against closed forms and against the formulas written out."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
import torchmetrics.image.fid
from numpy.typing import NDArray

from lutdeploy.errors import BackendError, UsageError
from lutdeploy.training.evaluation.distances import (
    frechet_distance,
    kernel_distance,
    laplacian_pyramid,
    ms_ssim_of_pairs,
    ms_ssim_scales,
    neighbourhoods,
    require_size,
    require_torchmetrics,
    sliced_wasserstein,
)
from lutdeploy.training.evaluation.memorisation import COPY_RATIO, nearest_two


def normal(n: int, d: int = 4, shift: float = 0.0, scale: float = 1.0) -> NDArray[np.float32]:
    made = np.random.default_rng(n + d).standard_normal((n, d)) * scale + shift
    return made.astype(np.float32)


def noisy(n: int, side: int = 32, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (n, 3, side, side)).astype(np.uint8)


def test_frechet_distance_of_scaled_and_shifted_features_is_the_closed_form() -> None:
    a = normal(500, 3)
    b = (2 * a + 1).astype(np.float32)  # μ' = 2μ + 1, Σ' = 4Σ commutes with Σ
    mean, covariance = a.mean(0, dtype=np.float64), np.cov(a.T.astype(np.float64))
    expected = np.square(mean + 1).sum() + np.trace(covariance)  # (2 − 1)²·tr Σ
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-5)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(("m", "n", "features"), [(40, 30, 8), (9, 30, 20)])
def test_frechet_distance_is_that_of_torchmetrics(m: int, n: int, features: int) -> None:
    a, b = normal(m, features), normal(n, features, shift=0.5, scale=2.0)
    network = torch.nn.Identity()
    network.num_features = features  # type: ignore[assignment]
    metric = torchmetrics.image.fid.FrechetInceptionDistance(feature=network)
    for x, real in ((a, False), (b, True)):
        metric.update(torch.from_numpy(x).double(), real=real)
    assert frechet_distance(a, b) == pytest.approx(float(metric.compute()), rel=1e-5)


def test_kernel_distance_is_the_unbiased_sum_over_subsets() -> None:
    a, b = normal(40), normal(41, shift=0.5)
    d = a.shape[1]

    def kernel(x: NDArray[np.float64], y: NDArray[np.float64]) -> float:
        return float((x @ y / d + 1) ** 3)

    def mmd(x: NDArray[np.float64], y: NDArray[np.float64]) -> float:
        m = len(x)
        pairs = [(i, j) for i in range(m) for j in range(m) if i != j]
        within = sum(kernel(s[i], s[j]) for s in (x, y) for i, j in pairs)
        across = sum(kernel(x[i], y[j]) for i in range(m) for j in range(m))
        return within / (m * (m - 1)) - 2 * across / m**2

    random = np.random.default_rng(3)
    values = []
    for _ in range(100):
        x, y = (s[random.choice(len(s), 20, replace=False)].astype(np.float64) for s in (a, b))
        values.append(mmd(x, y))
    mean, deviation = kernel_distance(a, b, seed=3)
    assert mean == pytest.approx(np.mean(values), rel=1e-9)
    assert deviation == pytest.approx(np.std(values), rel=1e-9)


def test_kernel_distance_is_about_zero_between_draws_of_one_distribution() -> None:
    mean, deviation = kernel_distance(normal(600), normal(601))
    assert abs(mean) < 3 * deviation
    assert kernel_distance(normal(600), normal(601, shift=0.5))[0] > 3 * deviation


def test_neighbourhoods_are_the_formulas_written_out() -> None:
    samples, reference = normal(60, 2, shift=0.8), normal(50, 2)

    def distance(x: NDArray[np.float32], y: NDArray[np.float32]) -> float:
        return float(np.linalg.norm(x.astype(np.float64) - y))

    def radius(set_: NDArray[np.float32], i: int, k: int) -> float:
        return sorted(distance(set_[i], y) for j, y in enumerate(set_) if j != i)[k - 1]

    found = neighbourhoods(samples, reference)
    radii = [radius(reference, i, 3) for i in range(50)]
    inside = [any(distance(s, r) <= radii[i] for i, r in enumerate(reference)) for s in samples]
    assert found.precision == pytest.approx(np.mean(inside))
    radii = [radius(samples, j, 3) for j in range(60)]
    inside = [any(distance(s, r) <= radii[j] for j, s in enumerate(samples)) for r in reference]
    assert found.recall == pytest.approx(np.mean(inside))
    radii = [radius(reference, i, 5) for i in range(50)]
    balls = [[distance(s, r) <= radii[i] for s in samples] for i, r in enumerate(reference)]
    assert found.density == pytest.approx(np.sum(balls) / (5 * 60))
    assert found.coverage == pytest.approx(np.any(balls, axis=1).mean())


def test_missing_modes_lower_recall_and_coverage_alone() -> None:
    clusters = np.repeat(np.eye(4, dtype=np.float32) * 20, 50, axis=0)
    reference, samples = clusters + normal(200), clusters[:100].repeat(2, 0) + normal(201)[:200]
    whole = neighbourhoods(clusters + normal(202)[:200], reference)
    found = neighbourhoods(samples, reference)
    assert whole.recall >= 0.85 and whole.coverage > 0.9
    assert found.precision > 0.8
    assert found.recall <= 0.5 and found.coverage <= 0.5


def test_the_pyramid_sums_up_to_the_image() -> None:
    pixels = noisy(2, 64)
    levels = laplacian_pyramid(pixels)
    assert list(levels) == [64, 32, 16]
    flat = laplacian_pyramid(np.full((1, 3, 64, 64), 100, np.uint8))
    assert float(flat[64].abs().max()) < 1e-3 and float(flat[32].abs().max()) < 1e-3
    assert flat[16].numpy() == pytest.approx(100, abs=1e-3)


def test_sliced_wasserstein_sees_texture_at_its_level() -> None:
    """Smooth images against the same with fine noise: the finest level differs most."""
    base = np.repeat(np.repeat(noisy(16, 8), 8, axis=2), 8, axis=3)  # squares of 8 pixels
    speckled = np.where(noisy(16, 64, 1) > 250, 255, base).astype(np.uint8)
    found = sliced_wasserstein(base, speckled)
    assert list(found) == [64, 32, 16]
    assert found[64] > found[32] > found[16]
    other = sliced_wasserstein(base, base, seed=1)
    assert all(other[side] < found[side] for side in found)
    assert sliced_wasserstein(base, speckled) == found
    with pytest.raises(UsageError, match="two equal sets"):
        sliced_wasserstein(noisy(4), noisy(5))


def test_ms_ssim_of_pairs_tells_collapse_from_variety() -> None:
    assert [ms_ssim_scales(side) for side in (8, 16, 32, 64, 256)] == [0, 1, 2, 3, 5]
    one = np.repeat(noisy(1, 64), 16, axis=0)
    assert ms_ssim_of_pairs(one, 20) == pytest.approx(1)
    assert ms_ssim_of_pairs(noisy(16, 64), 20).mean() < 0.3


def test_nearest_two_finds_flips_and_copies() -> None:
    training = noisy(1500, 8)  # more than a block
    mirrored = training[..., ::-1]
    queries = np.concatenate([training[[1400]], mirrored[[3]], noisy(3, 8, 9)])
    found = nearest_two(queries, training, mirrored)
    assert found.index[:2].tolist() == [1400, 3]
    assert found.mirrored[:2].tolist() == [False, True]
    assert found.first[:2].tolist() == [0, 0]
    both = np.stack([training, mirrored], 1).astype(np.float64)
    for q in range(2, 5):
        rms = np.sqrt(np.square(both - queries[q]).mean((2, 3, 4))).min(axis=1)
        assert found.first[q] == np.sort(rms)[0] and found.second[q] == np.sort(rms)[1]
    assert found.summary().share_copies == 0.4
    assert (found.ratio[2:] > COPY_RATIO).all()
    twice = training[[0, 0, 1, 2]]
    assert nearest_two(twice[:1], twice, twice[..., ::-1]).ratio.tolist() == [0]


def test_too_few_images_say_how_many_are_needed() -> None:
    with pytest.raises(UsageError, match="faces: 15 images are too few; at least 16"):
        require_size("faces", 15)
    require_size("faces", 16)


def test_without_torchmetrics(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchmetrics.image.kid", None)
    with pytest.raises(BackendError, match=r"pip install 'lutdeploy\[evaluate\]'"):
        require_torchmetrics()
