"""The original's layout: golden vectors, and against ours."""

from __future__ import annotations

import torch

from lutdeploy.artefacts.checkpoint import from_author_state
from lutdeploy.config import model_config
from lutdeploy.engines.benchmark.original import OriginalModel
from tests.conftest import Golden

TOLERANCE = 2e-5  # of the output's standard deviation: float32 rounding in another order


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Max abs error within TOLERANCE times the standard deviation of ``expected``."""
    assert found.shape == expected.shape
    assert float((found - expected).abs().max()) <= TOLERANCE * float(expected.std())


@torch.inference_mode()
def test_author_state_loads_and_gives_the_golden_vector(golden: Golden) -> None:
    model = OriginalModel(golden.config).eval()
    model.load_state_dict(golden.state, strict=True)
    x, t, x0 = (torch.from_numpy(golden.arrays[name]) for name in ("x", "t", "x0"))
    assert_close(model(x, t), x0)


@torch.inference_mode()
def test_equals_lutdeploy_on_random_weights_and_inputs(preset: str) -> None:
    torch.manual_seed(0)
    config = model_config(preset, "tiny")
    original = OriginalModel(config).eval()
    for value in original.parameters():  # no bias or scale stays at a 0 or 1 that hides it
        value.add_(torch.randn_like(value) * 0.05)
    ours = from_author_state(original.state_dict(), config)
    for batch in (1, 5):
        x, t = torch.randn(batch, *config.image_shape), torch.rand(batch)
        assert_close(ours(x, t), original(x, t))
