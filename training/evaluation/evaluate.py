"""How good and how diverse pictures are, and whether they are copies: sets in, numbers out.

:func:`compare_sets` measures one set against another; :func:`evaluate` makes the whole
evaluation of a model or of a folder of pictures, with real-against-real rows as the floor.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lutdeploy.errors import UsageError
from lutdeploy.sampling import Denoiser, batch_noise
from lutdeploy.training.evaluation.data import RealImages
from lutdeploy.training.evaluation.distances import (
    SMALLEST_SET,
    Features,
    Pixels,
    frechet_distance,
    kernel_distance,
    ms_ssim_of_pairs,
    ms_ssim_scales,
    neighbourhoods,
    require_size,
    sliced_wasserstein,
)
from lutdeploy.training.evaluation.features import Extractor
from lutdeploy.training.evaluation.memorisation import COPY_RATIO, Neighbours, nearest_two

TIMES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98)
ERROR_IMAGES = 256  # of each kind, at every noise level
ERROR_SEED = 2  # of the noise; other than the samples' by default
ERROR_BATCH = 64
SSIM_PAIRS = 1000  # at most, and at most half of all that there are
STANDARD_ERRORS = 3  # past which a difference raises an alarm
COPIES_MARGIN = 0.01  # share of copies above the held-out images' own that raises an alarm
SSIM_MARGIN = 0.1  # likeness of sample pairs above the real pairs' that raises an alarm


@dataclass(frozen=True)
class Metrics:
    """One set measured against another of the same number of images.

    ``frechet_distance`` and ``kernel_distance`` are FID and KID only where the extractor
    says so; both, and the sliced Wasserstein distances, are 0 at best (the unbiased kernel
    distance may fall below).
    """

    images: int
    frechet_distance: float
    kernel_distance: float
    kernel_distance_std: float
    precision: float
    recall: float
    density: float
    coverage: float
    sliced_wasserstein: dict[int, float]  # by the pyramid level's side

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class Row:
    """A line of the table."""

    what: str
    against: str
    metrics: Metrics


@dataclass(frozen=True)
class ErrorCurve:
    """Mean squared error of x0, pixels in [−1, 1], by noise level t; the same noise for both."""

    images: int  # of each kind
    times: tuple[float, ...]
    held_out: tuple[float, ...]
    training: tuple[float, ...]
    gap: float  # mean over the levels, held-out minus training
    gap_error: float  # its standard error over the images


@dataclass(frozen=True)
class Closest:
    """A sample beside its nearest training image."""

    sample: int
    training: int
    mirrored: bool
    distance: float
    ratio: float


@dataclass(frozen=True)
class Memorisation:
    """Nearest training neighbours of samples and, as the floor, of held-out images."""

    space: str  # "pixels" or "features"
    samples: dict[str, Any]
    held_out: dict[str, Any] | None
    closest: tuple[Closest, ...]


@dataclass(frozen=True)
class Likeness:
    """MS-SSIM of random pairs: mean and standard error, of samples and of real images."""

    pairs: int
    scales: int
    samples: float
    samples_error: float
    real: float
    real_error: float


@dataclass(frozen=True)
class Evaluation:
    """Everything that the table, the JSON and the page show."""

    rows: tuple[Row, ...]
    memorisation: tuple[Memorisation, ...]
    likeness: Likeness | None
    errors: ErrorCurve | None
    alarms: tuple[str, ...] = field(default=())
    notes: tuple[str, ...] = field(default=())

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return dataclasses.asdict(self)


def compare_sets(
    samples: Pixels, reference: Pixels, extractor: Extractor, seed: int = 0
) -> Metrics:
    """Measure samples against as many reference images.

    Distances depend on the number of images: compare only results of the same number.

    Args:
        samples, reference: uint8 [n, C, S, S], at least 16.
        extractor: of the features, from features.open_extractor.
        seed: of the subsets, patches and projections.

    Raises:
        UsageError: too few images, or sets of different shape.
        BackendError: torchmetrics is not installed.
    """
    if samples.shape != reference.shape:
        raise UsageError(
            f"two sets of one shape are compared, not {samples.shape} and {reference.shape}"
        )
    require_size("samples", len(samples))
    return measure(with_features(samples, extractor), with_features(reference, extractor), seed)


Set = tuple[Pixels, Features]
Told = Callable[[str], None]


def with_features(pixels: Pixels, extractor: Extractor) -> Set:
    """Images as :func:`measure` takes them."""
    return pixels, extractor(pixels)


def measure(samples: Set, reference: Set, seed: int) -> Metrics:
    """:func:`compare_sets` for sets whose features are there already."""
    kernel, kernel_std = kernel_distance(samples[1], reference[1], seed)
    return Metrics(
        images=len(samples[0]),
        frechet_distance=frechet_distance(samples[1], reference[1]),
        kernel_distance=kernel,
        kernel_distance_std=kernel_std,
        **dataclasses.asdict(neighbourhoods(samples[1], reference[1])),
        sliced_wasserstein=sliced_wasserstein(samples[0], reference[0], seed),
    )


def _chosen(set_: Set, rows: NDArray[np.intp] | slice) -> Set:
    return set_[0][rows], set_[1][rows]


def _digest(image: Pixels, seed: int) -> bytes:
    """A number at random, of an image and a seed."""
    return hashlib.sha256(seed.to_bytes(8, "big") + image.tobytes()).digest()


def _rows(samples: Set, training: Set, held_out: Set, seed: int, told: Told) -> tuple[Row, ...]:
    """Samples against real images, and other real images against the same ones."""
    real: Set = (
        np.concatenate([training[0], held_out[0]]),
        np.concatenate([training[1], held_out[1]]),
    )
    n = min(len(samples[0]), len(real[0]) // 2)
    # By their pixels, so that the halves do not depend on names or on what was held out.
    by_content = sorted(range(len(real[0])), key=lambda i: _digest(real[0][i], seed))
    floor, reference = (
        _chosen(real, np.array(half)) for half in (by_content[:n], by_content[n : 2 * n])
    )
    pairs = [
        ("samples", f"{n:,} real", _chosen(samples, slice(n)), reference),
        ("real", f"the same {n:,}", floor, reference),
    ]
    held = min(len(samples[0]), len(held_out[0]), len(training[0]))
    if held >= SMALLEST_SET:
        some = np.random.default_rng(seed + 1).permutation(len(training[0]))[:held]
        against = _chosen(training, np.sort(some))
        pairs += [
            ("samples", f"{held:,} training", _chosen(samples, slice(held)), against),
            ("held-out", f"the same {held:,}", _chosen(held_out, slice(held)), against),
        ]
    rows = []
    for what, name, first, second in pairs:
        told(f"distances: {what} against {name}")
        rows.append(Row(what, name, measure(first, second, seed)))
    return tuple(rows)


def x0_errors(denoiser: Denoiser, held_out: Pixels, training: Pixels) -> ErrorCurve:
    """The denoiser's error on held-out images and on as many training images.

    Args:
        denoiser: predicts x0 at any t.
        held_out, training: uint8 [n, C, S, S]; 256 of each are used at most, spread evenly.

    Raises:
        UsageError: a denoiser that holds its own timesteps alone.
    """
    count = min(len(held_out), len(training), ERROR_IMAGES)
    noise = batch_noise(ERROR_SEED, range(count), denoiser.config.image_shape)
    found = []
    for pixels in (held_out, training):
        spread = np.linspace(0, len(pixels) - 1, count).round().astype(int)
        x = pixels[spread].astype(np.float32) / 127.5 - 1
        errors = np.empty((len(TIMES), count))
        for level, t in enumerate(TIMES):
            for start in range(0, count, ERROR_BATCH):
                part = slice(start, min(start + ERROR_BATCH, count))
                state = np.float32(t) * x[part] + np.float32(1 - t) * noise[part]
                times = np.full(len(state), t, np.float32)
                difference = denoiser.predict_x0(state, times) - x[part]
                errors[level, part] = np.square(difference).mean((1, 2, 3))
        found.append(errors)
    means = [errors.mean(axis=1) for errors in found]
    per_image = [errors.mean(axis=0) for errors in found]
    return ErrorCurve(
        images=count,
        times=TIMES,
        held_out=tuple(means[0].tolist()),
        training=tuple(means[1].tolist()),
        gap=float(per_image[0].mean() - per_image[1].mean()),
        gap_error=float(np.sqrt(sum(e.var(ddof=1) / count for e in per_image))),
    )


def _memorisation(
    space: str, samples: NDArray[Any], held_out: NDArray[Any], training: tuple[NDArray[Any], ...]
) -> Memorisation:
    found = nearest_two(samples, *training)
    floor = nearest_two(held_out, *training).to_dict() if len(held_out) else None
    return Memorisation(space, found.to_dict(), floor, _closest(found))


def _closest(found: Neighbours, count: int = 16) -> tuple[Closest, ...]:
    order = np.argsort(found.first, kind="stable")[:count]
    return tuple(
        Closest(
            sample=int(q),
            training=int(found.index[q]),
            mirrored=bool(found.mirrored[q]),
            distance=float(found.first[q]),
            ratio=float(found.ratio[q]),
        )
        for q in order
    )


def _likeness(samples: Pixels, real: Pixels, seed: int) -> Likeness | None:
    scales = ms_ssim_scales(samples.shape[-1])
    if scales == 0:
        return None
    count = min(SSIM_PAIRS, len(samples) * (len(samples) - 1) // 4)
    pairs = [ms_ssim_of_pairs(pixels, count, seed) for pixels in (samples, real)]
    errors = [float(p.std(ddof=1) / np.sqrt(len(p))) for p in pairs]
    means = [float(p.mean()) for p in pairs]
    return Likeness(count, scales, means[0], errors[0], means[1], errors[1])


def require_images(real: RealImages) -> None:
    """Refuse real images that are too few for the floor.

    Raises:
        UsageError: says how many are needed.
    """
    require_size("half of the real images", (len(real.training) + len(real.held_out)) // 2)
    require_size("training images", len(real.training))


def evaluate(
    samples: Pixels,
    real: RealImages,
    extractor: Extractor,
    denoiser: Denoiser | None = None,
    seed: int = 0,
    notes: tuple[str, ...] = (),
    told: Told = lambda _: None,
) -> Evaluation:
    """The whole evaluation.

    Args:
        samples: uint8 [n, C, S, S].
        real: training and held-out images of the same side and channels.
        extractor: of the features.
        denoiser: the model that made the samples, for its x0 errors; None where there is none.
        seed: of splits, subsets, patches, projections and pairs.
        notes: what a reader should know besides.
        told: called with what is done next.

    Raises:
        UsageError: too few images.
        BackendError: torchmetrics is not installed.
    """
    require_size("samples", len(samples))
    require_images(real)
    told("features")
    flipped = real.training[..., ::-1]
    features = [extractor(set_) for set_ in (samples, real.training, flipped)]
    held = (
        extractor(real.held_out)
        if len(real.held_out)
        else np.empty((0, features[0].shape[1]), np.float32)
    )
    rows = _rows(
        (samples, features[0]),
        (real.training, features[1]),
        (real.held_out, held),
        seed,
        told,
    )
    told("nearest training images")
    memorisation = (
        _memorisation("pixels", samples, real.held_out, (real.training, flipped)),
        _memorisation("features", features[0], held, (features[1], features[2])),
    )
    told("likeness of pairs")
    likeness = _likeness(samples, real.training, seed)
    remarks = [*notes, *real.warnings]
    few = sorted({row.metrics.images for row in rows if row.metrics.images < features[0].shape[1]})
    if few:
        remarks.append(
            f"{' and '.join(f'{n:,}' for n in few)} images are fewer than the "
            f"{features[0].shape[1]:,} features: a Fréchet distance of so few is inflated, and "
            "good for nothing but comparisons at the same number"
        )
    if len(rows) == 2:
        remarks.append(
            f"{len(real.held_out)} held-out images are too few for a row of their own; "
            f"{SMALLEST_SET} are needed"
        )
    twins = memorisation[0].held_out
    if twins is not None and twins["smallest_nearest"] == 0:
        remarks.append("some held-out images are training images, to the last pixel")
    errors = None
    if denoiser is not None and len(real.held_out) < 2:
        remarks.append("no held-out images: no x0 error curve")
    elif denoiser is not None and denoiser.schedule is not None:
        remarks.append(
            "this export holds its own timesteps alone: no x0 error curve; a step export or "
            "--backend torch gives one"
        )
    elif denoiser is not None:
        told("x0 errors by noise level")
        errors = x0_errors(denoiser, real.held_out, real.training)
    alarms = _alarms(memorisation, likeness, errors)
    return Evaluation(rows, memorisation, likeness, errors, alarms, tuple(remarks))


def _alarms(
    memorisation: tuple[Memorisation, ...], likeness: Likeness | None, errors: ErrorCurve | None
) -> tuple[str, ...]:
    """What a reader must not overlook, as sentences."""
    alarms = []
    if errors is not None and errors.gap > STANDARD_ERRORS * errors.gap_error:
        share = errors.gap / (sum(errors.training) / len(errors.training))
        alarms.append(
            f"overfitting: the x0 error on held-out images is {share:.0%} above that on training "
            f"images ({errors.gap / errors.gap_error:.1f} standard errors)"
        )
    for found in memorisation:
        floor = found.held_out["share_copies"] if found.held_out else 0.0
        if found.samples["share_copies"] > floor + COPIES_MARGIN:
            alarms.append(
                f"memorisation: {found.samples['share_copies']:.1%} of the samples have "
                f"d1/d2 < {COPY_RATIO:.2f} in {found.space}, {floor:.1%} of the held-out images"
            )
    if likeness is not None and likeness.samples - likeness.real > max(
        SSIM_MARGIN, STANDARD_ERRORS * float(np.hypot(likeness.samples_error, likeness.real_error))
    ):
        alarms.append(
            f"collapse: pairs of samples are more alike (MS-SSIM {likeness.samples:.3f}) than "
            f"pairs of real images ({likeness.real:.3f})"
        )
    return tuple(alarms)
