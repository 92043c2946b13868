"""Feature extractors: lutdeploy's own network, and Inception from a user's file."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file

from lutdeploy.artefacts import files
from lutdeploy.errors import ArtefactError, BackendError, NonFiniteError, UsageError
from lutdeploy.training.data import draw_set
from lutdeploy.training.evaluation import feature_network
from lutdeploy.training.evaluation.distances import frechet_distance, kernel_distance
from lutdeploy.training.evaluation.features import open_extractor
from lutdeploy.training.evaluation.inception import resize
from lutdeploy.training.evaluation.train_features import (
    FeatureSettings,
    augment,
    blur,
    shuffle_patches,
    train_network,
)
from tests.conftest import GOLDEN

Pixels = NDArray[np.uint8]


@cache
def golden() -> dict[str, Any]:
    """torch-fidelity's (0.4.0) features, and the names and shapes of the published weights."""
    with np.load(GOLDEN / "inception.npz") as file:
        return {name: file[name] for name in file.files}


@cache
def inception_state() -> dict[str, torch.Tensor]:
    """Random weights with the names and shapes of the published ones."""
    random, state = np.random.default_rng(0), {}
    for name, text in zip(golden()["names"].tolist(), golden()["shapes"].tolist(), strict=True):
        shape = tuple(map(int, text.split("x")))
        made = random.standard_normal(shape).astype(np.float32)
        if len(shape) == 4:  # keeps the activations at their scale
            made *= np.float32(np.sqrt(2 / np.prod(shape[1:])))
        elif name.endswith(("running_var", "bn.weight")):
            made = 1 + np.float32(0.1) * np.abs(made)
        else:
            made *= 0.1
        state[name] = torch.from_numpy(made)
    return state


def golden_pixels() -> Pixels:
    return np.random.default_rng(1).integers(0, 256, (2, 3, 64, 64)).astype(np.uint8)


@pytest.fixture(scope="module")
def faces() -> Pixels:
    return draw_set(64, count=96).images


def worn(pixels: Pixels, kind: str, strength: float) -> Pixels:
    """Blur of so many pixels, noise of so many of 255 levels, or a share of the set repeated."""
    if kind == "missing":
        kept = max(1, round(len(pixels) * (1 - strength)))
        return pixels[np.arange(len(pixels)) % kept]
    x = torch.from_numpy(pixels).float()
    if kind == "blur":
        x = blur(x, strength)
    else:
        x += strength * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    return x.round().clamp(0, 255).to(torch.uint8).numpy()


@pytest.mark.parametrize(
    ("kind", "strengths"),
    [("blur", (0.5, 1.0, 2.0)), ("noise", (8, 20, 50)), ("missing", (0.5, 0.8, 0.95))],
)
def test_distances_grow_with_what_is_worse(
    faces: Pixels, kind: str, strengths: tuple[float, ...]
) -> None:
    extractor = open_extractor()
    samples, reference = faces[:48], extractor(faces[48:])
    found = [extractor(samples), *(extractor(worn(samples, kind, s)) for s in strengths)]
    frechet = [frechet_distance(features, reference) for features in found]
    assert frechet == sorted(frechet) and frechet[-1] > 1.2 * frechet[0]
    if kind != "missing":  # an unbiased distance of means of kernels does not see repetition
        kernel = [kernel_distance(features, reference)[0] for features in found]
        assert kernel == sorted(kernel) and kernel[-1] > kernel[0] + 0.01


def test_features_depend_on_each_image_alone(faces: Pixels) -> None:
    extractor = open_extractor()
    features = extractor(faces[:70])  # more than a batch
    assert features.shape == (70, feature_network.FEATURES) and features.dtype == np.float32
    assert extractor.sha256 == feature_network.SHA256
    for name in (extractor.name, extractor.frechet_name, extractor.kernel_name):
        assert "lutdeploy features" in name and "FID" not in name and "KID" not in name
    np.testing.assert_allclose(extractor(faces[66:68]), features[66:68], atol=1e-4)


def test_features_of_other_sizes_and_of_grey(faces: Pixels) -> None:
    extractor = open_extractor()
    twice = faces[:4].repeat(2, axis=2).repeat(2, axis=3)
    same, other = extractor(faces[:4]), extractor(faces[4:8])
    assert np.abs(extractor(twice) - same).mean() < 0.5 * np.abs(other - same).mean()
    grey = faces[:4, :1]
    np.testing.assert_array_equal(extractor(grey), extractor(grey.repeat(3, axis=1)))


def test_own_weights_are_verified(tmp_path: Path) -> None:
    path = tmp_path / "features.safetensors"
    with pytest.raises(ArtefactError, match="is missing: install lutdeploy again"):
        feature_network.load_network(path)
    data = bytearray(feature_network.WEIGHTS.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(ArtefactError, match="damaged or replaced"):
        feature_network.load_network(path)
    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(ArtefactError, match="does not hold the feature network"):
        feature_network.load_network(path, files.sha256(path))


def test_nan_features_are_an_error(faces: Pixels) -> None:
    broken = replace(open_extractor(), network=lambda x: torch.full((len(x), 3), torch.nan))
    with pytest.raises(NonFiniteError, match="NaN or Inf in the features"):
        broken(faces[:2])


def test_training_the_network_is_repeatable_and_learns(faces: Pixels, tmp_path: Path) -> None:
    settings = FeatureSettings(steps=2, batch=4, bf16=False)
    first, second = (train_network(faces[:16], settings) for _ in range(2))
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name
    path = tmp_path / "features.safetensors"
    feature_network.save_network(first, path)
    loaded = feature_network.load_network(path, files.sha256(path))
    x = torch.from_numpy(faces[:16]).float() / 127.5 - 1
    # What float16 rounds by. Of an untrained network's features, which hardly vary, it is more.
    for name, value in first.state_dict().items():
        if not name.endswith("num_batches_tracked"):
            torch.testing.assert_close(loaded.state_dict()[name], value, rtol=2**-11, atol=2**-25)
    with torch.no_grad():
        torch.testing.assert_close(loaded.pooled(x), first.pooled(x), rtol=0.01, atol=2e-3)
        # Standardised over what it was trained on.
        assert float(first(x).mean(0).abs().max()) < 1e-4


def test_views_stay_images(faces: Pixels) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.from_numpy(faces[:8]).float() / 255
    for view in (augment(x, generator), shuffle_patches(x, 4, generator), blur(x, 1.5)):
        assert view.shape == x.shape
        assert float(view.min()) >= -1e-6 and float(view.max()) <= 1 + 1e-6
        assert not torch.equal(view, x)
    shuffled = shuffle_patches(x, 4, generator)
    assert torch.equal(shuffled.flatten(2).sort().values, x.flatten(2).sort().values)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_a_device_that_is_not_there() -> None:
    with pytest.raises(BackendError, match="no CUDA device 'cuda:7' here"):
        open_extractor(device="cuda:7")


# Inception


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("inception") / "inception.pth"
    torch.save(inception_state(), path)
    return path


def test_inception_is_the_one_of_published_figures(inception_file: Path) -> None:
    extractor = open_extractor(inception_file)
    found = extractor(golden_pixels())
    assert found.shape == (2, 2048)
    np.testing.assert_allclose(found[:, ::64], golden()["features"], rtol=0, atol=5e-5)
    assert (extractor.frechet_name, extractor.kernel_name) == ("FID", "KID")
    assert extractor.name == "Inception, weights inception.pth (not the published file)"


def test_inception_from_safetensors(tmp_path: Path, inception_file: Path) -> None:
    path = tmp_path / "inception.safetensors"
    counts = {"Mixed_5b.branch1x1.bn.num_batches_tracked": torch.tensor(0)}  # some files have them
    save_file(inception_state() | counts, path)
    one, other = open_extractor(path), open_extractor(inception_file)
    assert one.sha256 != other.sha256
    np.testing.assert_array_equal(one(golden_pixels()[:1]), other(golden_pixels()[:1]))


def test_resize_takes_pixels_from_their_corners() -> None:
    x = torch.tensor([[0.0, 4.0], [8.0, 12.0]])[None, None]
    wide = resize(x, 4)[0, 0]
    assert wide[0].tolist() == [0, 2, 4, 4]
    assert wide[:, 0].tolist() == [0, 4, 8, 8]
    assert resize(x, 2).equal(x)


def test_files_that_hold_no_inception(tmp_path: Path) -> None:
    state = inception_state()
    path = tmp_path / "features.safetensors"
    cases = {
        "key fc.bias is missing": {k: v for k, v in state.items() if k != "fc.bias"},
        r"classifier has .*'fc.bias': \(3,\)": {**state, "fc.bias": torch.zeros(3)},
        "key AuxLogits.fc.bias is unknown": {**state, "AuxLogits.fc.bias": torch.zeros(3)},
        "key Conv2d_1a_3x3.conv.weight is missing": {"conv1.weight": torch.zeros(3)},
        "the shapes do not fit together": {
            **state,
            "Mixed_6b.branch1x1.conv.weight": torch.zeros(192, 700, 1, 1),
        },
    }
    for message, tensors in cases.items():
        save_file(tensors, path)
        with pytest.raises(ArtefactError, match="FID is defined by .*" + message):
            open_extractor(path)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(ArtefactError, match="is cut off: it has"):
        open_extractor(path)
    for name in ("none.safetensors", "none.pth"):
        with pytest.raises(UsageError, match="no such file"):
            open_extractor(tmp_path / name)
    pickled = tmp_path / "code.pth"
    torch.save({"a": print}, pickled)
    with pytest.raises(ArtefactError, match=r"holds more than tensors \(print\)"):
        open_extractor(pickled)
    pickled.write_bytes(b"nothing")
    with pytest.raises(ArtefactError, match="is text that begins with 'nothing'"):
        open_extractor(pickled)
