"""The discrete cosine transform, as a matrix."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def dct_matrix(size: int) -> Tensor:
    """The orthonormal DCT-II, float64 [size, size]: row k is the cosine of frequency k."""
    index = torch.arange(size, dtype=torch.float64)
    cosines = torch.cos(math.pi / size * (index[None] + 0.5) * index[:, None])
    cosines[0] /= math.sqrt(2)
    return cosines * math.sqrt(2 / size)
