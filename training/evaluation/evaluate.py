"""How good and how diverse pictures are, and whether they are copies: sets in, numbers out.

:func:`compare_sets` measures one set against another; :func:`evaluate` makes the whole
evaluation of a model or of a folder of pictures, with real images against real images as the floor.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

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
from lutdeploy.training.evaluation.memorisation import COPY_RATIO, Memorisation, memorisation

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


@dataclass(frozen=True)
class Row:
    """One set measured against another, both named for people."""

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
    alarms: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def compare_sets(
    samples: Pixels, reference: Pixels, extractor: Extractor, seed: int = 0
) -> Metrics:
    """Measure samples against as many reference images, at least 16; uint8 [n, C, S, S].

    Distances depend on the number of images: compare only results of the same number.
    """
    if samples.shape != reference.shape:
        raise UsageError(
            f"two sets of one shape are compared, not {samples.shape} and {reference.shape}"
        )
    require_size("samples", len(samples))
    return measure(with_features(samples, extractor), with_features(reference, extractor), seed)


OnPhase = Callable[[str], None]  # called with the name of what is done next


@dataclass(frozen=True)
class Set:
    """Images and their features."""

    pixels: Pixels  # [n, C, S, S]
    features: Features  # [n, D]

    def __getitem__(self, rows: Any) -> Set:
        return Set(self.pixels[rows], self.features[rows])

    def __len__(self) -> int:
        return len(self.pixels)


def with_features(pixels: Pixels, extractor: Extractor) -> Set:
    """Images as :func:`measure` takes them."""
    return Set(pixels, extractor(pixels))


def measure(samples: Set, reference: Set, seed: int) -> Metrics:
    """:func:`compare_sets` of sets with their features."""
    features = samples.features, reference.features
    kernel, kernel_std = kernel_distance(*features, seed)
    return Metrics(
        images=len(samples),
        frechet_distance=frechet_distance(*features),
        kernel_distance=kernel,
        kernel_distance_std=kernel_std,
        **dataclasses.asdict(neighbourhoods(*features)),
        sliced_wasserstein=sliced_wasserstein(samples.pixels, reference.pixels, seed),
    )


def _rows(
    samples: Set, training: Set, held_out: Set, seed: int, on_phase: OnPhase
) -> tuple[Row, ...]:
    """Samples against real images, and other real images against the same ones."""
    real = Set(
        np.concatenate([training.pixels, held_out.pixels]),
        np.concatenate([training.features, held_out.features]),
    )
    n = min(len(samples), len(real) // 2)
    # Ordered by pixels, so that the halves do not depend on names or on what was held out.
    salt = seed.to_bytes(8, "big")
    hashes = [hashlib.sha256(salt + image.tobytes()).digest() for image in real.pixels]
    order = sorted(range(len(real)), key=hashes.__getitem__)
    reference = real[order[n : 2 * n]]
    pairs = [
        ("samples", f"{n:,} real", samples[:n], reference),
        ("real", f"the same {n:,}", real[order[:n]], reference),
    ]
    held = min(len(samples), len(held_out), len(training))
    if held >= SMALLEST_SET:
        some = np.random.default_rng(seed + 1).permutation(len(training))[:held]
        against = training[np.sort(some)]
        pairs += [
            ("samples", f"{held:,} training", samples[:held], against),
            ("held-out", f"the same {held:,}", held_out[:held], against),
        ]
    rows = []
    for what, name, first, second in pairs:
        on_phase(f"distances: {what} against {name}")
        rows.append(Row(what, name, measure(first, second, seed)))
    return tuple(rows)


def x0_errors(denoiser: Denoiser, held_out: Pixels, training: Pixels) -> ErrorCurve:
    """The error, at any t, on as many held-out and training images, uint8 [n, C, S, S].

    256 of each are used at most, spread evenly.
    """
    count = min(len(held_out), len(training), ERROR_IMAGES)
    noise = batch_noise(ERROR_SEED, range(count), denoiser.config.image_shape)
    found = []  # [level, image] of each kind
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
    per_image = [errors.mean(axis=0) for errors in found]
    return ErrorCurve(
        images=count,
        times=TIMES,
        held_out=tuple(found[0].mean(axis=1).tolist()),
        training=tuple(found[1].mean(axis=1).tolist()),
        gap=float(per_image[0].mean() - per_image[1].mean()),
        gap_error=float(np.sqrt(sum(e.var(ddof=1) / count for e in per_image))),
    )


def _likeness(samples: Pixels, real: Pixels, seed: int) -> Likeness | None:
    scales = ms_ssim_scales(samples.shape[-1])
    if scales == 0:
        return None
    count = min(SSIM_PAIRS, len(samples) * (len(samples) - 1) // 4)
    figures: list[float] = []
    for pixels in (samples, real):
        values = ms_ssim_of_pairs(pixels, count, seed)
        figures += [float(values.mean()), float(values.std(ddof=1) / np.sqrt(count))]
    return Likeness(count, scales, *figures)


def require_images(real: RealImages) -> None:
    """Refuse real images that are too few for the floor."""
    require_size("half of the real images", (len(real.training) + len(real.held_out)) // 2)
    require_size("training images", len(real.training))


def evaluate(
    samples: Pixels,
    real: RealImages,
    extractor: Extractor,
    denoiser: Denoiser | None = None,
    seed: int = 0,
    notes: tuple[str, ...] = (),
    on_phase: OnPhase = lambda _: None,
) -> Evaluation:
    """The whole evaluation of samples, uint8 [n, C, S, S], beside real images of the same side.

    Args:
        denoiser: the model that made the samples, for its x0 errors; None where there is none.
        notes: what a reader should know besides.
    """
    require_size("samples", len(samples))
    require_images(real)
    on_phase("features")
    made, training = with_features(samples, extractor), with_features(real.training, extractor)
    flipped = with_features(real.training[..., ::-1], extractor)
    width = training.features.shape[1]
    held_out = Set(real.held_out, np.empty((0, width), np.float32))
    if len(real.held_out):
        held_out = with_features(real.held_out, extractor)
    rows = _rows(made, training, held_out, seed, on_phase)
    on_phase("nearest training images")
    copies = tuple(
        memorisation(space, *(getattr(s, space) for s in (made, held_out, training, flipped)))
        for space in ("pixels", "features")
    )
    on_phase("likeness of pairs")
    likeness = _likeness(samples, real.training, seed)
    errors, no_errors = None, _why_no_errors(denoiser, real)
    if denoiser is not None and not no_errors:
        on_phase("x0 errors by noise level")
        errors = x0_errors(denoiser, real.held_out, real.training)
    return Evaluation(
        rows,
        copies,
        likeness,
        errors,
        alarms=_alarms(copies, likeness, errors),
        notes=(*notes, *real.warnings, *_remarks(rows, copies, real, width), *no_errors),
    )


def _remarks(
    rows: tuple[Row, ...], copies: tuple[Memorisation, ...], real: RealImages, features: int
) -> list[str]:
    """What limits the figures, as sentences."""
    remarks = []
    few = sorted({row.metrics.images for row in rows if row.metrics.images < features})
    if few:
        remarks.append(
            f"{' and '.join(f'{n:,}' for n in few)} images are fewer than the {features:,} "
            "features: a Fréchet distance of so few is inflated, and good for nothing but "
            "comparisons at the same number"
        )
    if len(rows) == 2:
        remarks.append(
            f"{len(real.held_out)} held-out images are too few for a row of their own; "
            f"{SMALLEST_SET} are needed"
        )
    in_pixels = copies[0].held_out
    if in_pixels is not None and in_pixels.smallest_nearest == 0:
        remarks.append("some held-out images are training images, to the last pixel")
    return remarks


def _why_no_errors(denoiser: Denoiser | None, real: RealImages) -> tuple[str, ...]:
    """Why a model gets no x0 errors, as a sentence, if it gets none."""
    if denoiser is not None and len(real.held_out) < 2:
        return ("no held-out images: no x0 error curve",)
    if denoiser is not None and denoiser.schedule is not None:
        return (
            "this export holds its own timesteps alone: no x0 error curve; a step export or "
            "--backend torch gives one",
        )
    return ()


def _alarms(
    copies: tuple[Memorisation, ...], likeness: Likeness | None, errors: ErrorCurve | None
) -> tuple[str, ...]:
    """Signs of overfitting, memorisation and collapse, as sentences."""
    alarms = []
    if errors is not None and errors.gap > STANDARD_ERRORS * errors.gap_error:
        share = errors.gap / (sum(errors.training) / len(errors.training))
        alarms.append(
            f"overfitting: the x0 error on held-out images is {share:.0%} above that on training "
            f"images ({errors.gap / errors.gap_error:.1f} standard errors)"
        )
    for found in copies:
        floor = found.held_out.share_copies if found.held_out else 0.0
        if found.samples.share_copies > floor + COPIES_MARGIN:
            alarms.append(
                f"memorisation: {found.samples.share_copies:.1%} of the samples have "
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
