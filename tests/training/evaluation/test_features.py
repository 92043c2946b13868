"""Feature extractors: EfficientNet-Lite0, and Inception from a user's file."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image, ImageFilter
from safetensors.torch import save_file

from lutdeploy.errors import ArtefactError, BackendError, NonFiniteError, UsageError
from lutdeploy.training.data import draw_set
from lutdeploy.training.evaluation import efficientnet
from lutdeploy.training.evaluation.distances import frechet_distance, kernel_distance
from lutdeploy.training.evaluation.features import open_extractor
from lutdeploy.training.evaluation.inception import resize
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


def blurred(picture: Pixels, sigma: float) -> Pixels:
    """uint8 [3, S, S] under a Gaussian of so many pixels."""
    image = Image.fromarray(np.moveaxis(picture, 0, -1)).filter(ImageFilter.GaussianBlur(sigma))
    return np.moveaxis(np.asarray(image), -1, 0)


def golden_pixels() -> Pixels:
    return np.random.default_rng(1).integers(0, 256, (2, 3, 64, 64)).astype(np.uint8)


@pytest.fixture(scope="module")
def faces() -> Pixels:
    return draw_set(64, count=48).images


def worn(pixels: Pixels, kind: str, strength: float) -> Pixels:
    """Blurred, with noise of so many of 255 levels, or a share of the set repeated."""
    if kind == "missing":
        kept = max(1, round(len(pixels) * (1 - strength)))
        return pixels[np.arange(len(pixels)) % kept]
    if kind == "blur":
        return np.stack([blurred(picture, strength) for picture in pixels])
    noise = np.random.default_rng(0).standard_normal(pixels.shape)
    return (pixels + strength * noise).round().clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize(
    ("kind", "strengths"),
    [("blur", (0.5, 1.5)), ("noise", (8, 50)), ("missing", (0.8, 0.95))],
)
def test_distances_grow_with_what_is_worse(
    faces: Pixels, kind: str, strengths: tuple[float, ...]
) -> None:
    extractor = open_extractor()
    samples, reference = faces[:24], extractor(faces[24:])
    found = [extractor(samples), *(extractor(worn(samples, kind, s)) for s in strengths)]
    frechet = [frechet_distance(features, reference) for features in found]
    assert frechet == sorted(frechet) and frechet[-1] > 1.2 * frechet[0]
    if kind != "missing":  # an unbiased distance of means of kernels does not see repetition
        kernel = [kernel_distance(features, reference)[0] for features in found]
        assert kernel == sorted(kernel) and kernel[-1] > kernel[0] + 0.01


def test_efficientnet_is_the_published_one() -> None:
    """Features of the package efficientnet-lite-pytorch 0.1.0, which has the network itself."""
    with np.load(GOLDEN / "efficientnet.npz") as file:
        pixels, expected = file["pixels"], file["features"]
    extractor = open_extractor()
    found = extractor(pixels)
    assert found.shape == (2, efficientnet.FEATURES) and found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=0, atol=5e-5)
    assert extractor.sha256 == efficientnet.SHA256
    for name in (extractor.name, extractor.frechet_name, extractor.kernel_name):
        assert "EfficientNet-Lite0" in name and "FID" not in name and "KID" not in name


def test_features_depend_on_each_image_alone(faces: Pixels, monkeypatch: Any) -> None:
    monkeypatch.setattr("lutdeploy.training.evaluation.features.BATCH", 3)
    extractor = open_extractor()
    np.testing.assert_allclose(extractor(faces[:5])[2:4], extractor(faces[2:4]), atol=1e-4)


def test_features_of_other_sizes_and_of_grey(faces: Pixels) -> None:
    extractor = open_extractor()
    same = extractor(faces[:4])
    pictures = [Image.fromarray(np.moveaxis(face, 0, -1)) for face in faces[:4]]
    twice = [np.asarray(p.resize((128, 128), Image.Resampling.BICUBIC)) for p in pictures]
    found = extractor(np.moveaxis(np.stack(twice), -1, 1))
    assert np.abs(found - same).mean() < 0.1 * np.abs(same[1:] - same[:-1]).mean()
    grey = faces[:4, :1]
    np.testing.assert_array_equal(extractor(grey), extractor(grey.repeat(3, axis=1)))


def test_weights_are_verified(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "weights.pth"
    with pytest.raises(ArtefactError, match=r"has sha256 none, not 579344248a93: .*install"):
        efficientnet.load_network(path)
    data = bytearray(efficientnet.weights_file().read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(ArtefactError, match="damaged or replaced"):
        efficientnet.load_network(path)
    monkeypatch.setattr(efficientnet, "PACKAGE", "efficientnet_lite9")
    with pytest.raises(BackendError, match=r"pip install 'lutdeploy\[evaluate\]'"):
        open_extractor()


def test_nan_features_are_an_error(faces: Pixels) -> None:
    broken = replace(open_extractor(), network=lambda x: torch.full((len(x), 3), torch.nan))
    with pytest.raises(NonFiniteError, match="NaN or Inf in the features"):
        broken(faces[:2])


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
