"""The PyTorch model against the golden vectors; the author's checkpoints both ways."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lutdeploy.artefacts.checkpoint import (
    from_author_state,
    import_file,
    infer_config,
    load_model,
    save_author_file,
    save_model,
)
from lutdeploy.config import ModelConfig, model_config
from lutdeploy.errors import ArtefactError
from lutdeploy.lut import image_to_tiles, tiles_to_image
from lutdeploy.model import LutTransformer, position_tables, rotate
from lutdeploy.reference import TorchDenoiser
from lutdeploy.sampling import trajectory
from lutdeploy.schedule import solver_schedule
from tests.conftest import Golden, read_golden

TOLERANCE = 2e-5  # of the output's standard deviation


def test_one_pass_and_a_trajectory_equal_the_golden_vectors(golden: Golden) -> None:
    denoiser = TorchDenoiser(from_author_state(golden.state, golden.config))
    schedule = solver_schedule("euler", int(golden.arrays["euler_steps"]))
    states = [state.x for state in trajectory(denoiser, golden.arrays["x"], schedule)]
    pairs = [(denoiser.predict_x0(golden.arrays["x"], golden.arrays["t"]), golden.arrays["x0"])]
    for step, expected in zip(golden.arrays["euler_kept"], golden.arrays["euler_x"], strict=True):
        pairs.append((states[int(step)], expected))
    for found, expected in pairs:
        assert np.abs(found - expected).max() <= TOLERANCE * expected.std()


def test_author_file_round_trip_infers_the_config(golden: Golden, tmp_path: Path) -> None:
    torch.save(golden.state, tmp_path / "theirs.pth")
    found = import_file(tmp_path / "theirs.pth", heads=golden.config.heads)
    assert found.model.config == golden.config
    assert found.assumed == ("weights", "image_size")
    for weights in ("softmax", "tanh"):  # the state dict does not tell
        assert infer_config(golden.state, weights=weights).weights == weights
    save_author_file(found.model, tmp_path / "ours.pth")
    back = torch.load(tmp_path / "ours.pth", weights_only=True)
    assert set(back) == set(golden.state)
    for key, value in golden.state.items():
        assert torch.equal(back[key], value), key


def test_safetensors_round_trip_is_bit_exact(golden: Golden, tmp_path: Path) -> None:
    model = from_author_state(golden.state, golden.config)
    save_model(model, tmp_path / "m.safetensors", about={"origin": "test"})
    loaded = load_model(tmp_path / "m.safetensors")
    assert loaded.config == model.config
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"time_mlp.0.weight": None}, "time_mlp.0.weight is missing"),
        ({"projection.bias": None}, "projection.bias is missing"),
        ({"extra": torch.zeros(1)}, "extra is unknown"),
        ({"projection.bias": torch.zeros(3)}, r"projection.bias has shape \[3\]"),
    ],
)
def test_first_wrong_key_is_named(change: dict[str, torch.Tensor | None], message: str) -> None:
    golden = read_golden("static-tanh-64")
    state = {k: v for k, v in {**golden.state, **change}.items() if v is not None}
    with pytest.raises(ArtefactError, match=message):
        from_author_state(state, golden.config)


@pytest.mark.parametrize(
    "overrides",
    [
        {"image_size": 32},
        {"image_size": 24, "patch_size": 4, "channels": 1},
        {"entries": 5, "width": 36, "heads": 3, "depth": 1},
        {"stem_channels": 7, "time_frequencies": 3},
    ],
)
def test_any_size_keeps_shapes(preset: str, overrides: dict[str, int]) -> None:
    config = model_config(preset, "tiny", **overrides)
    model = LutTransformer(config).eval()
    x = torch.randn(2, *config.image_shape)
    x0, weights, lut = model.paint(x, torch.tensor([0.0, 0.9]))
    assert x0.shape == x.shape
    assert weights.shape == (2, config.image_tokens, config.entries)
    assert lut.shape[-2:] == (config.entries, config.entry_values)
    assert torch.isfinite(x0).all()


def test_softmax_weights_are_convex() -> None:
    model = LutTransformer(model_config("static-softmax-512", "tiny"))
    _, weights, _ = model.paint(torch.randn(2, 3, 64, 64), torch.rand(2))
    assert (weights >= 0).all()
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 64))


def test_position_by_the_specs_words() -> None:
    """Spec step 4, spelled out channel by channel."""
    config = model_config("static-tanh-64", "tiny", width=8, heads=2, image_size=16)
    cos, sin = position_tables(config)
    u = torch.randn(4, 8)
    half = 4
    for token in range(4):
        row, column = divmod(token, 2)
        for index, part in ((row, slice(0, 4)), (column, slice(4, 8))):
            phi = [index * 10000 ** (-2 * j / half) for j in (0, 0, 1, 1)]
            v = u[token, part].double()
            rotated = torch.tensor([-v[2], -v[3], v[0], v[1]])
            angles = torch.tensor(phi, dtype=torch.float64)
            expected = v * angles.cos() + rotated * angles.sin()
            found = rotate(u, cos, sin)[token, part].double()
            torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)


@settings(max_examples=20)
@given(grid=st.integers(1, 4), patch=st.integers(1, 5), channels=st.integers(1, 4))
def test_tiles_and_images_are_inverse(grid: int, patch: int, channels: int) -> None:
    config = ModelConfig(image_size=grid * patch, patch_size=patch, channels=channels)
    images = torch.randn(2, *config.image_shape)
    tiles = image_to_tiles(images, config)
    assert torch.equal(tiles_to_image(tiles, config), images)
    assert torch.equal(tiles[0, 0].reshape(channels, patch, patch), images[0, :, :patch, :patch])
