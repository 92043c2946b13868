"""Distances between two sets of images or of their features; arrays in, numbers out.

Sources, with the names that the formulas here carry:
- Fréchet distance: Heusel et al. 2017, equation 6.
- Kernel distance (KID): Bińkowski et al. 2018, section 4: unbiased MMD² under
  k(x, y) = (x·y/D + 1)³, over subsets. The kernel sums are torchmetrics'.
- Precision, recall: Kynkäänniemi et al. 2019, equations 1 and 2, k = 3.
- Density, coverage: Naeem et al. 2020, equations 4 and 6, k = 5.
- Sliced Wasserstein distance: Karras et al. 2018, section 5 and appendix.
- MS-SSIM of pairs: Odena et al. 2017, section 4.2. By torchmetrics.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from lutdeploy.errors import BackendError, UsageError
from lutdeploy.machine import import_problem

Features = NDArray[np.float32]  # [n, D]
Pixels = NDArray[np.uint8]  # [n, C, S, S]

SMALLEST_SET = 16  # fewer make a neighbourhood or a subset meaningless
PRECISION_NEIGHBOURS = 3
COVERAGE_NEIGHBOURS = 5
KERNEL_SUBSETS = 100
KERNEL_SUBSET_SIZE = 1000
PATCH = 7
PATCHES_PER_IMAGE = 128
PROJECTIONS, PROJECTION_ROUNDS = 128, 4
COARSEST_LEVEL = 16
PATCH_IMAGES = 4096  # of a set; bounds the memory of the patches
MS_SSIM_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
MS_SSIM_WINDOW = 11
BLOCK = 1024  # rows at once, so that memory does not grow with the product of the sizes


def require_torchmetrics() -> Any:
    """torchmetrics with its image metrics, or an error that says how to get it."""
    image_metrics = ("functional.image", "image.kid")
    problem = import_problem("evaluate", *(f"torchmetrics.{name}" for name in image_metrics))
    if problem:
        raise BackendError(problem)
    import torchmetrics

    return torchmetrics


def require_size(name: str, count: int) -> None:
    """Refuse a set that is too small to measure."""
    if count < SMALLEST_SET:
        raise UsageError(
            f"{name}: {count} images are too few; at least {SMALLEST_SET} are needed, and about a "
            "thousand for figures that mean much"
        )


def frechet_distance(a: Features, b: Features) -> float:
    """|μ_a − μ_b|² + tr(Σ_a + Σ_b − 2·(Σ_a·Σ_b)^½), in float64.

    The trace of the root is the sum of the singular values of A·Bᵀ, where AᵀA = Σ_a and BᵀB = Σ_b.
    So many of them there are, exactly, as there are images; torchmetrics looks for as many
    eigenvalues as there are features, which takes seconds and leaves noise for those that are 0.
    """
    means, roots = [], []
    for features in (a, b):
        x = torch.from_numpy(features).double()
        means.append(x.mean(0))
        roots.append((x - means[-1]) / (len(x) - 1) ** 0.5)
    common = torch.linalg.svdvals(roots[0] @ roots[1].T).sum()
    spread = sum(root.square().sum() for root in roots) - 2 * common
    # Rounding may leave −1e-12 of equal sets.
    return max(0.0, float((means[0] - means[1]).square().sum() + spread))


def kernel_distance(a: Features, b: Features, seed: int = 0) -> tuple[float, float]:
    """Mean and standard deviation of the unbiased MMD² over 100 subsets.

    A subset has 1,000 images of each set, or half of the smaller set.
    """
    poly_mmd = require_torchmetrics().image.kid.poly_mmd
    size = min(KERNEL_SUBSET_SIZE, min(len(a), len(b)) // 2)
    random = np.random.default_rng(seed)
    values = []
    for _ in range(KERNEL_SUBSETS):
        subsets = (s[random.choice(len(s), size, replace=False)] for s in (a, b))
        values.append(float(poly_mmd(*(torch.from_numpy(s).double() for s in subsets))))
    return float(np.mean(values)), float(np.std(values))


def _distances(a: Features, b: Features) -> NDArray[np.float64]:
    """Euclidean distances, [len(a), len(b)]."""
    x, y = torch.from_numpy(a).double(), torch.from_numpy(b).double()
    # By differences, not by a product: equal features are then exactly 0 apart.
    return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist").numpy()


def _radii(a: Features, k: int) -> NDArray[np.float64]:
    """The distance of each row to its k-th nearest among the others, [n]."""
    blocks = [a[start : start + BLOCK] for start in range(0, len(a), BLOCK)]
    return np.concatenate([np.partition(_distances(block, a), k, axis=1)[:, k] for block in blocks])


@dataclass(frozen=True)
class Neighbourhoods:
    """How two sets cover each other; 1 is best, density may pass it."""

    precision: float
    recall: float
    density: float
    coverage: float


def neighbourhoods(samples: Features, reference: Features) -> Neighbourhoods:
    """Precision, recall (k = 3), density and coverage (k = 5) of samples [n, D].

    No library: prdc brings scikit-learn and prints, and the formulas are these lines.
    """
    precise, dense = (_radii(reference, k) for k in (PRECISION_NEIGHBOURS, COVERAGE_NEIGHBOURS))
    recalled = _radii(samples, PRECISION_NEIGHBOURS)
    found = np.zeros(len(reference), bool)
    covered = np.zeros(len(reference), bool)
    hits = balls = 0
    for start in range(0, len(samples), BLOCK):
        distances = _distances(samples[start : start + BLOCK], reference)
        hits += int((distances <= precise).any(axis=1).sum())
        inside = distances <= dense
        balls += int(inside.sum())
        covered |= inside.any(axis=0)
        found |= (distances <= recalled[start : start + BLOCK, None]).any(axis=0)
    return Neighbourhoods(
        precision=hits / len(samples),
        recall=float(found.mean()),
        density=balls / (COVERAGE_NEIGHBOURS * len(samples)),
        coverage=float(covered.mean()),
    )


def smooth(x: torch.Tensor, taps: torch.Tensor) -> torch.Tensor:
    """[B, C, S, S] under a separable kernel of odd length, [K], edges mirrored."""
    kernel = taps.expand(x.shape[1], 1, 1, -1)
    x = F.pad(x, (len(taps) // 2,) * 4, "reflect")
    return F.conv2d(F.conv2d(x, kernel, groups=len(kernel)), kernel.mT, groups=len(kernel))


def laplacian_pyramid(pixels: Pixels) -> dict[int, torch.Tensor]:
    """Levels by their side, S to 16: what each adds to the next coarser one, and the coarsest."""
    x = torch.from_numpy(pixels).float()
    binomial = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0]) / 16
    levels = {}
    while x.shape[-1] % 2 == 0 and x.shape[-1] // 2 >= COARSEST_LEVEL:
        coarse = smooth(x, binomial)[..., ::2, ::2]
        spread = torch.zeros_like(x)
        spread[..., ::2, ::2] = 4 * coarse  # zeros between lose three quarters of the mean
        levels[x.shape[-1]] = x - smooth(spread, binomial)
        x = coarse
    levels[x.shape[-1]] = x
    return levels


def _patches(level: torch.Tensor, random: np.random.Generator) -> torch.Tensor:
    """7×7 patches at random places, each channel to mean 0 and variance 1: [n·128, C·49]."""
    count, channels, side, _ = level.shape
    places = random.integers(0, side - PATCH + 1, (2, count, PATCHES_PER_IMAGE))
    rows, columns = (torch.from_numpy(p) for p in places)
    step = torch.arange(PATCH)
    at = (
        torch.arange(count)[:, None, None, None],
        slice(None),
        (rows[..., None] + step)[..., :, None],
        (columns[..., None] + step)[..., None, :],
    )
    patches = level[at]  # [n, 128, 7, 7, C]: the indexed axes come first
    patches = patches.reshape(-1, PATCH * PATCH, channels)
    mean, spread = patches.mean((0, 1)), patches.std((0, 1))
    return ((patches - mean) / spread.clamp_min(1e-8)).flatten(1)


def sliced_wasserstein(a: Pixels, b: Pixels, seed: int = 0) -> dict[int, float]:
    """The distance between patches of each pyramid level, times 1000, by the level's side.

    Of as many images of each set; the first 4,096 count.
    """
    if a.shape != b.shape:
        raise UsageError(f"sliced Wasserstein needs two equal sets, not {a.shape} and {b.shape}")
    random = np.random.default_rng(seed)
    pyramids = [laplacian_pyramid(pixels[:PATCH_IMAGES]) for pixels in (a, b)]
    result = {}
    for side in pyramids[0]:
        if side < PATCH:
            continue
        first, second = (_patches(pyramid[side], random) for pyramid in pyramids)
        total = 0.0
        for _ in range(PROJECTION_ROUNDS):
            directions = random.standard_normal((PROJECTIONS, first.shape[1])).astype(np.float32)
            directions /= np.linalg.norm(directions, axis=1, keepdims=True)
            u, v = (np.sort(directions @ set_.numpy().T, axis=1) for set_ in (first, second))
            total += float(np.abs(u - v).mean())
        result[side] = 1000 * total / PROJECTION_ROUNDS
    return result


def ms_ssim_scales(side: int) -> int:
    """How many of the five scales an image of this side has room for; 0: not one."""
    return sum(side // 2**k >= MS_SSIM_WINDOW for k in range(len(MS_SSIM_WEIGHTS)))


def ms_ssim_of_pairs(pixels: Pixels, pairs: int, seed: int = 0) -> NDArray[np.float64]:
    """MS-SSIM of random pairs of uint8 [n, C, S, S], [pairs]: high where images are alike.

    The published weights of as many scales as fit (three at 64×64), scaled to sum to 1.
    """
    ms_ssim = require_torchmetrics().functional.image.multiscale_structural_similarity_index_measure
    scales = ms_ssim_scales(pixels.shape[-1])
    weights = np.array(MS_SSIM_WEIGHTS[:scales])
    weights /= weights.sum()
    random = np.random.default_rng(seed)
    first = random.integers(0, len(pixels), pairs)
    second = (first + random.integers(1, len(pixels), pairs)) % len(pixels)  # never itself
    values = []
    for start in range(0, pairs, 64):
        chosen = (rows[start : start + 64] for rows in (first, second))
        x, y = (torch.from_numpy(pixels[rows]).float() for rows in chosen)
        betas = tuple(weights.tolist())
        values.append(ms_ssim(x, y, data_range=255.0, betas=betas, reduction="none"))
    return torch.cat(values).double().numpy()
