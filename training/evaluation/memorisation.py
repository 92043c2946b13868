"""Whether samples are copies of training images: their nearest neighbours, flips included."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

# A sample that lies three times nearer to one training image than to any other is a copy of
# it (Yoon et al. 2023, section 3; Somepalli et al. 2023 compare with held-out images likewise).
COPY_RATIO = 1 / 3
CLOSEST = 16  # pairs that are shown
BLOCK = 1024


@dataclass(frozen=True)
class Summary:
    """The neighbours of a set in figures: d1 and d1/d2 over its images."""

    images: int
    median_nearest: float
    smallest_nearest: float
    median_ratio: float
    share_copies: float


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
    samples: Summary
    held_out: Summary | None
    closest: tuple[Closest, ...]


@dataclass(frozen=True)
class Neighbours:
    """The two nearest training images of each query, nearest first."""

    index: NDArray[np.intp]  # [q]
    mirrored: NDArray[np.bool_]  # [q], the nearest is nearer when flipped
    first: NDArray[np.float64]  # [q] distance, root mean square over the values
    second: NDArray[np.float64]  # [q]

    @property
    def ratio(self) -> NDArray[np.float64]:
        """d1/d2; 0 for an exact copy, also of an image that is there twice."""
        zeros = np.zeros_like(self.first)
        return np.divide(self.first, self.second, out=zeros, where=self.second > 0)

    def summary(self) -> Summary:
        return Summary(
            images=len(self.index),
            median_nearest=float(np.median(self.first)),
            smallest_nearest=float(self.first.min()),
            median_ratio=float(np.median(self.ratio)),
            share_copies=float((self.ratio < COPY_RATIO).mean()),
        )

    def closest(self) -> tuple[Closest, ...]:
        """The queries that lie nearest to a training image."""
        columns = (self.index, self.mirrored, self.first, self.ratio)
        order = np.argsort(self.first, kind="stable")[:CLOSEST]
        return tuple(Closest(int(q), *(column[q].item() for column in columns)) for q in order)


def nearest_two(
    queries: NDArray[Any], training: NDArray[Any], mirrored: NDArray[Any]
) -> Neighbours:
    """The two nearest rows of ``training``, each as near as it or its mirror image is.

    Queries [q, …], pixels or features; training [n, …], at least two; mirrored: the same flipped.
    """
    x = torch.from_numpy(queries.reshape(len(queries), -1)).float()
    lengths = x.square().sum(1, keepdim=True)
    best = torch.full((len(x), 2), torch.inf)
    index = torch.zeros((len(x), 2), dtype=torch.long)
    for start in range(0, len(training), BLOCK):
        # |q − r|² = |q|² + |r|² − 2·q·r, of the image and of its flip; the smaller counts.
        squares = []
        for set_ in (training, mirrored):
            block = np.ascontiguousarray(set_[start : start + BLOCK])
            r = torch.from_numpy(block.reshape(len(block), -1)).float()
            squares.append(lengths + r.square().sum(1) - 2 * (x @ r.T))
        nearer = torch.minimum(*squares)  # [q, b]
        rows = torch.arange(start, start + nearer.shape[1]).expand(len(x), -1)
        best, order = torch.cat([best, nearer], 1).topk(2, largest=False)
        index = torch.cat([index, rows], 1).gather(1, order)
    # The product rounds, so the two that are left are measured again by their differences.
    exact = np.empty((2, 2, len(queries)))  # nearest two, image and flip
    for q, pair in enumerate(index.tolist()):
        for side, set_ in enumerate((training, mirrored)):
            for k, row in enumerate(pair):
                difference = queries[q].astype(np.float64) - set_[row]
                exact[k, side, q] = np.sqrt(np.square(difference).mean())
    distances = exact.min(axis=1)  # [2, q]
    ranked = np.argsort(distances, axis=0, kind="stable")
    pick, everywhere = ranked[0], np.arange(len(queries))
    return Neighbours(
        index=index.numpy()[everywhere, pick].astype(np.intp),
        mirrored=exact[pick, 1, everywhere] < exact[pick, 0, everywhere],
        first=distances[pick, everywhere],
        second=distances[ranked[1], everywhere],
    )


def memorisation(
    space: str,
    samples: NDArray[Any],
    held_out: NDArray[Any],
    training: NDArray[Any],
    mirrored: NDArray[Any],
) -> Memorisation:
    """Samples and held-out images beside the training images and those flipped."""
    found = nearest_two(samples, training, mirrored)
    floor = nearest_two(held_out, training, mirrored).summary() if len(held_out) else None
    return Memorisation(space, found.summary(), floor, found.closest())
