"""Folders and pictures as people have them: what is read, what is left out, and what is said."""

from __future__ import annotations

import io
import logging
import mmap
import os
import queue
import re
import struct
import subprocess
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageCms, PngImagePlugin

from lutdeploy import decoding
from lutdeploy.artefacts import files
from lutdeploy.artefacts.run import Run
from lutdeploy.decoding import decode
from lutdeploy.errors import UsageError
from lutdeploy.training.data import (
    ImageSet,
    draw_set,
    load_folder,
    load_images,
    load_once,
    no_progress,
    read_list,
)
from lutdeploy.training.evaluation.data import read_samples
from lutdeploy.training.picture_folder import find_pictures
from lutdeploy.training.processes import Processes
from lutdeploy.training.session import require_same_images
from tests.command import fail, succeed

Pixels = NDArray[np.uint8]


def noise(seed: int = 0, side: int = 16) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (side, side, 3), np.uint8))


def put(path: Path, picture: Image.Image | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    (picture or noise()).save(path)
    return path


def encoded(picture: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def names(folder: Path) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in find_pictures(folder).files]


# Which files are pictures


def test_hidden_and_service_folders_are_left_out_and_said(tmp_path: Path) -> None:
    for name in ("a.png", "b/c.png", "odd.png/in.png"):
        put(tmp_path / name)
    for name in (".ipynb_checkpoints", "b/@eaDir", ".thumbnails", "__MACOSX"):
        put(tmp_path / name / "copy.png")
    put(tmp_path / "._a.png")
    assert names(tmp_path) == ["a.png", "b/c.png", "odd.png/in.png"], "a folder is no image"
    assert set(find_pictures(tmp_path).lines()) == {
        "4 hidden or service folders left out (.ipynb_checkpoints, .thumbnails, __MACOSX, "
        f"b{os.sep}@eaDir)",
        "1 hidden picture left out (._a.png)",
    }


def test_files_of_other_kinds_are_counted(tmp_path: Path) -> None:
    put(tmp_path / "a.png")
    for name in ("1.TXT", "2.txt", "3.heic", "README", "5.json", "6.mp4"):
        (tmp_path / name).write_text("x")
    (line,) = find_pictures(tmp_path).lines()
    assert line.startswith("6 files of other kinds left out (.txt 2, ") and line.endswith(", …)")


def test_links_to_folders_and_closed_folders_are_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tmp_path / "data" / "a.png")
    put(tmp_path / "data" / "closed" / "b.png")
    (tmp_path / "data" / "linked").symlink_to(tmp_path)
    scan = os.scandir

    def refuse(path: str) -> object:  # root may open all
        if Path(path).name == "closed":
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr("os.scandir", refuse)
    assert names(tmp_path / "data") == ["a.png"]
    assert set(find_pictures(tmp_path / "data").lines()) == {
        "1 linked folder left out (linked)",
        "1 folder that cannot be opened left out (closed)",
    }


def test_what_lutdeploy_makes_is_not_trained_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run and samples among the images, and a resumed run that finds the same images."""
    for index in range(4):
        put(tmp_path / f"{index}.png", noise(index, 64))
    monkeypatch.chdir(tmp_path)
    small = ("--size", "tiny", "--batch", 2, "--sample-every", 1)
    succeed("train", "--data", ".", "--out", "runs/x", "--steps", 1, *small)
    assert list(Run(Path("runs/x")).pictures.iterdir())
    succeed("sample", "runs/x", "-n", 2, "--steps", 1, "--backend", "torch", "--unverified")
    resumed = succeed("train", "--resume", "--out", "runs/x", "--steps", 2, "--data", ".")
    assert "data: 4 images, 0 unreadable" in resumed.stderr
    assert "1 run left out (runs/x)" in resumed.stderr
    assert "1 folder of samples left out (samples)" in resumed.stderr
    # The folder of samples itself is a folder of pictures, without the one about the others.
    assert names(Path("samples")) == ["000000.png", "000001.png"]
    assert (
        "1 of lutdeploy's own pictures left out (grid.png)"
        in find_pictures(Path("samples")).lines()
    )
    assert len(read_samples(Path("samples"), 10).pixels) == 2
    with pytest.raises(UsageError, match=r"1 run left out .*--data names such a folder"):
        (tmp_path / "empty").mkdir()
        Path("samples").rename("empty/samples")
        Path("runs").rename("empty/runs")
        find_pictures(tmp_path / "empty")


def test_a_run_among_its_own_images(tmp_path: Path) -> None:
    put(tmp_path / "a.png", noise(0, 64))
    small = ("--data", tmp_path, "--out", tmp_path, "--size", "tiny", "--batch", 1)
    succeed("train", *small, "--steps", 1)
    succeed("train", *small, "--steps", 2, "--resume")
    assert names(tmp_path) == ["a.png"]


def test_what_is_no_folder_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.zip").write_bytes(b"PK")
    put(tmp_path / "x.png")
    train = ("train", "--size", "tiny", "--out", "runs/x", "--data")
    assert "x.zip is a file, --data takes a folder of images; unpack it" in fail(2, *train, "x.zip")
    assert "x.png is a file, --data takes a folder of images" in fail(2, *train, "x.png")
    assert "no such folder of images; --data says where" in fail(2, *train, "none")
    assert not (tmp_path / "runs" / "x").exists()


# Pixels


def test_an_ordinary_picture_is_as_pillow_decodes_it() -> None:
    picture = noise()
    for kind in ("PNG", "BMP", "TIFF", "WEBP", "QOI", "PPM"):
        options = {"lossless": True} if kind == "WEBP" else {}
        found = decode(encoded(picture, kind, **options))
        np.testing.assert_array_equal(found.pixels, np.asarray(picture))
        assert found.remarks == ()
    jpeg = encoded(picture, "JPEG")
    np.testing.assert_array_equal(decode(jpeg).pixels, np.asarray(Image.open(io.BytesIO(jpeg))))


@pytest.mark.skipif("AVIF" not in decoding.formats(), reason="this Pillow reads no AVIF")
def test_avif_is_read(tmp_path: Path) -> None:
    put(tmp_path / "a.avif", Image.new("RGB", (64, 64), (200, 30, 30)))
    assert np.abs(load_folder(tmp_path, 16).images.mean((0, 2, 3)) - (200, 30, 30)).max() < 4


def test_an_animation_is_its_first_frame_and_said(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (32, 32), colour) for colour in ("red", "blue")]
    for name in ("a.gif", "b.webp", "c.png", "d.tif"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:])
    found = load_folder(tmp_path, 16)
    assert (found.images[:, 0] > 250).all() and (found.images[:, 2] < 5).all()
    assert found.remarks == (
        "only the first frame is read: 4 images (a.gif, b.webp, c.png, d.tif)",
    )


def of_mode(mode: str) -> tuple[Image.Image, Pixels]:
    """A picture with transparency or many bits, and the pixels that a viewer shows."""
    rng = np.random.default_rng(1)
    if mode == "RGBA":
        rgba = rng.integers(0, 256, (64, 64, 4), np.uint8)
        rgba[..., 3] = np.where(rgba[..., 3] < 128, 0, 255)
        shown = np.where(rgba[..., 3:] == 0, 255, rgba[..., :3])
        return Image.fromarray(rgba), shown.astype(np.uint8)
    deep = rng.integers(0, 65536, (64, 64)).astype(np.uint16)
    return Image.fromarray(deep), np.rint(deep / 257).astype(np.uint8)[..., None]


@pytest.mark.parametrize("mode", ["RGBA", "I;16"])
def test_a_folder_is_the_same_as_data_and_as_pictures_to_judge(mode: str, tmp_path: Path) -> None:
    picture, shown = of_mode(mode)
    put(tmp_path / "a.png", picture)
    judged = read_samples(tmp_path, 10).pixels
    np.testing.assert_array_equal(judged[0], np.moveaxis(shown, -1, 0))
    np.testing.assert_array_equal(judged, load_folder(tmp_path, 64, judged.shape[1]).images)


def test_grey_pictures_among_coloured_ones_are_judged_as_coloured(tmp_path: Path) -> None:
    put(tmp_path / "a.png", Image.new("L", (16, 16), 90))
    assert read_samples(tmp_path, 10).pixels.shape == (1, 1, 16, 16)
    put(tmp_path / "b.png")
    judged = read_samples(tmp_path, 10).pixels
    assert judged.shape == (2, 3, 16, 16) and (judged[0] == 90).all()


def tiff(values: NDArray[np.uint16], bits: int, photometric: int = 1) -> bytes:
    """A TIFF of one strip of grey samples of 12 or 16 bits, little endian."""
    if bits == 12:
        pairs = values.reshape(-1, 2).astype(np.uint32)
        packed = pairs[:, 0] << 12 | pairs[:, 1]
        strip = b"".join(int(pair).to_bytes(3, "big") for pair in packed)
    else:
        strip = values.astype("<u2").tobytes()
    height, width = values.shape
    start = 8 + 2 + 12 * 9 + 4  # of the strip: after header and directory
    tags = {256: width, 257: height, 258: bits, 259: 1, 262: photometric, 273: start, 277: 1}
    tags |= {278: height, 279: len(strip)}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4) + strip


def test_bits_of_grey_are_scaled_by_what_the_file_says() -> None:
    values: Any = np.array([[0, 1000], [2048, 4095]], np.uint16)
    shown = np.rint(values / 4095 * 255).astype(np.uint8)[..., None]
    np.testing.assert_array_equal(decode(tiff(values, 12)).pixels, shown)
    deep = (values * 16).astype(np.uint16)
    shown = np.rint(deep / 257).astype(np.uint8)[..., None]
    np.testing.assert_array_equal(decode(tiff(deep, 16)).pixels, shown)
    np.testing.assert_array_equal(decode(tiff(deep, 16, photometric=0)).pixels, 255 - shown)
    floats = Image.fromarray(np.array([[0, 0.5], [0.25, 1]], np.float32))
    assert decode(encoded(floats, "TIFF")).pixels.ravel().tolist() == [0, 128, 64, 255]
    for kind, values in (("f4", [[0, 7]]), ("f4", [[np.nan, 0]]), ("i4", [[-1, 70000]])):
        with pytest.raises(ValueError, match="of no known range"):
            decode(encoded(Image.fromarray(np.array(values, kind)), "TIFF"))


def test_a_16_bit_colour_that_is_transparent_shows_white() -> None:
    grey = Image.fromarray(np.array([[0, 257 * 9], [257 * 7, 65535]], np.uint16))
    clear = encoded(grey, "PNG", transparency=257 * 9)
    assert decode(clear).pixels.ravel().tolist() == [0, 255, 7, 255]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP", "AVIF"])
def test_every_orientation_is_upright(kind: str) -> None:
    """One corner is white: where it lies, and which side is longer, tells the turn."""
    if kind not in decoding.formats():
        pytest.skip(f"this Pillow reads no {kind}")
    stored = Image.new("L", (64, 32))
    stored.paste(255, (0, 0, 16, 16))
    corners = {1: (0, 0), 2: (0, -1), 3: (-1, -1), 4: (-1, 0), 5: (0, 0), 6: (0, -1), 7: (-1, -1)}
    for orientation, (row, column) in {**corners, 8: (-1, 0)}.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        found = decode(encoded(stored.convert("RGB"), kind, exif=exif))
        assert found.pixels.shape == ((32, 64, 3) if orientation < 5 else (64, 32, 3)), orientation
        assert found.pixels[row, column].min() > 200, orientation
        assert (found.pixels > 128).mean() == pytest.approx(16 * 16 / 64 / 32, abs=0.03)
        assert found.remarks == ()


def swapped_primaries() -> bytes:
    """An sRGB profile with red and blue exchanged: what is stored as red shows blue."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    (count,) = struct.unpack_from(">I", profile, 128)
    tags = {bytes(profile[p : p + 4]): p for p in range(132, 132 + 12 * count, 12)}
    red, blue = tags[b"rXYZ"], tags[b"bXYZ"]
    profile[red : red + 4], profile[blue : blue + 4] = b"bXYZ", b"rXYZ"
    return bytes(profile)


def test_a_colour_profile_is_followed() -> None:
    red = Image.new("RGB", (8, 8), (255, 0, 0))
    for kind, options in (("PNG", {}), ("TIFF", {}), ("JPEG", {"quality": 100})):
        found = decode(encoded(red, kind, icc_profile=swapped_primaries(), **options))
        assert np.abs(found.pixels[0, 0].astype(int) - (0, 0, 255)).max() < 6, kind
        assert found.remarks == ()
    clear = red.convert("RGBA")
    clear.putpixel((0, 0), (255, 0, 0, 0))
    found = decode(encoded(clear, "PNG", icc_profile=swapped_primaries()))
    assert found.pixels[0, 0].tolist() == [255, 255, 255]
    assert np.abs(found.pixels[4, 4].astype(int) - (0, 0, 255)).max() < 6
    brick = Image.new("RGB", (8, 8), (180, 90, 60))
    spaces = (ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"))
    lab = ImageCms.buildTransform(*spaces, "RGB", "LAB").apply(brick)
    assert np.abs(decode(encoded(lab, "TIFF")).pixels[0, 0].astype(int) - (180, 90, 60)).max() < 4


def test_an_srgb_profile_changes_no_pixel() -> None:
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    picture = noise()
    found = decode(encoded(picture, "PNG", icc_profile=srgb))
    np.testing.assert_array_equal(found.pixels, np.asarray(picture))
    grey = picture.convert("L")  # with a profile for RGB, as some programs write
    found = decode(encoded(grey, "PNG", icc_profile=srgb))
    np.testing.assert_array_equal(found.pixels[..., 0], np.asarray(grey))
    assert found.remarks == ()


def test_a_profile_that_cannot_be_used_is_said() -> None:
    picture = noise()
    found = decode(encoded(picture, "PNG", icc_profile=b"nonsense"))
    np.testing.assert_array_equal(found.pixels, np.asarray(picture))
    assert found.remarks[0].startswith("colour profile not used, cannot open profile")
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    found = decode(encoded(picture, "PNG", icc_profile=lab))
    assert found.remarks == ("colour profile not used, it is for Lab, the pixels are RGB",)


def chunk_spoiled(png: bytes, kind: bytes) -> bytes:
    """A PNG with a bit of the data of a chunk turned."""
    place = png.index(kind) + 4
    return png[:place] + bytes([png[place] ^ 1]) + png[place + 1 :]


def test_damaged_metadata_costs_no_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    picture, about = noise(), PngImagePlugin.PngInfo()
    about.add_text("Comment", "x" * 100)
    png = encoded(picture, "PNG", pnginfo=about)
    found = decode(chunk_spoiled(png, b"tEXt"))
    np.testing.assert_array_equal(found.pixels, np.asarray(picture))
    assert found.remarks == ("damaged metadata is left out",)
    about.add_text("prompt", "x" * 100_000, zip=True)
    monkeypatch.setattr(PngImagePlugin, "MAX_TEXT_CHUNK", 10_000)
    assert decode(encoded(picture, "PNG", pnginfo=about)).remarks[0].startswith("damaged metadata")
    with pytest.raises(OSError, match="truncated"):  # pixels that are not there
        decode(chunk_spoiled(png, b"tEXt")[: png.index(b"IDAT") + 100])


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_damaged_exif_costs_no_pixels(kind: str, tmp_path: Path) -> None:
    picture = noise()
    (tmp_path / "whole.png").write_bytes(whole := encoded(picture, kind))
    cut = encoded(picture, kind, exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x05garbage")
    (tmp_path / "x.png").write_bytes(cut)
    found = load_folder(tmp_path, 16)
    np.testing.assert_array_equal(*found.images)
    assert len(whole) < len(cut) and found.skipped == ()
    (line,) = found.remarks
    assert "EXIF" in line and line.endswith(": 1 image (x.png)")


def malformed_mpo() -> bytes:
    """A JPEG whose second picture is announced and not there; Pillow warns."""
    jpeg = encoded(noise(), "JPEG")
    table = b"MPF\0II*\0" + struct.pack("<I", 8) + b"\xff\xff"
    return jpeg[:2] + b"\xff\xe2" + struct.pack(">H", len(table) + 2) + table + jpeg[2:]


def test_pillows_warnings_name_the_file(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Of every thread, and whatever the filters of warnings are."""
    for index in range(8):
        put(tmp_path / f"good-{index}.jpg")
    (tmp_path / "odd.jpg").write_bytes(malformed_mpo())
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        found = load_folder(tmp_path, 8)
        judged = read_samples(tmp_path, 10)
    assert len(found.images) == len(judged.pixels) == 9 and found.skipped == ()
    assert any(line.startswith("Image appears to be a malformed MPO") for line in found.remarks)
    assert all(line.endswith(": 1 image (odd.jpg)") for line in found.remarks)
    assert judged.warnings == found.remarks
    captured = capfd.readouterr()
    assert captured.out == captured.err == ""


def test_libtiff_prints_nothing_of_its_own(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    put(tmp_path / "good.tif")
    tiff = bytearray(encoded(noise(0, 64), "TIFF", compression="tiff_lzw"))
    tiff[500:900] = bytes(400)
    (tmp_path / "cut.tif").write_bytes(tiff)
    found = load_folder(tmp_path, 8)
    assert len(found.skipped) == 1 and "cut.tif: OSError" in found.skipped[0]
    assert capfd.readouterr().err == ""


def test_names_of_any_bytes_are_read_listed_and_shown(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9.png")
    try:
        put(tmp_path / "faces" / name, noise(0, 20))
    except OSError:
        pytest.skip("this file system takes names in UTF-8 alone")
    found = load_folder(tmp_path / "faces", 64)
    assert found.names == (name,)
    assert found.remarks == (r"enlarged to 64×64: 1 image (caf\xe9.png 20×20)",)
    found.write_list(tmp_path / "images.sha256")
    assert (tmp_path / "images.sha256").read_bytes().endswith(b"  caf\xe9.png\n")
    assert read_list(tmp_path / "images.sha256") == found.sha256


def test_others_warnings_are_left_alone() -> None:
    with pytest.warns(UserWarning, match="from another thread"), decoding.warnings_as_remarks():
        other = threading.Thread(target=warnings.warn, args=("from another thread",))
        other.start()
        other.join()
    assert logging.getLogger("PIL").handlers == []


def test_small_images_are_enlarged_and_said(tmp_path: Path) -> None:
    put(tmp_path / "small.png", noise(0, 20))
    put(tmp_path / "large.png", noise(0, 70))
    found = load_folder(tmp_path, 64)
    assert found.remarks == ("enlarged to 64×64: 1 image (small.png 20×20)",)
    assert load_folder(tmp_path, 16).remarks == ()


def test_what_is_no_file_is_skipped_and_named(tmp_path: Path) -> None:
    put(tmp_path / "a.png")
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "gone.png").symlink_to("nowhere")
    for skipped in (load_folder(tmp_path, 8).skipped, read_samples(tmp_path, 10).warnings):
        text = " ".join(skipped)
        assert "pipe.png: OSError: no regular file" in text
        assert "gone.png: OSError: a link to nothing" in text


# The list of a run's images


def test_the_list_is_what_sha256sum_checks(tmp_path: Path) -> None:
    folder = tmp_path / "faces"
    for index, name in enumerate(("a.png", "b/c d.png", "line\nback\\slash.png")):
        put(folder / name, noise(index))
    found = load_folder(folder, 8)
    found.write_list(tmp_path / "images.sha256")
    assert read_list(tmp_path / "images.sha256") == found.sha256
    assert [files.sha256(folder / name) for name in found.names] == list(found.sha256)
    check = ["sha256sum", "--check", "--quiet", str(tmp_path / "images.sha256")]
    done = subprocess.run(check, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def begun(tmp_path: Path) -> Run:
    """A run of one step on four images."""
    for index in range(4):
        put(tmp_path / "faces" / f"{index}.png", noise(index, 64))
    run = Run(tmp_path / "run")
    small = ("--size", "tiny", "--batch", 2, "--steps", 1)
    succeed("train", "--data", tmp_path / "faces", "--out", run.path, *small)
    return run


def copy_as(folder: Path, target: Path, rename: Callable[[int], str]) -> Path:
    target.mkdir()
    for index in range(4):
        (target / rename(index)).write_bytes((folder / f"{index}.png").read_bytes())
    return target


def test_a_resumed_run_needs_the_same_images(
    begun: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    faces = tmp_path / "faces"
    resume = ("train", "--resume", "--out", begun.path, "--steps", 2, "--data")
    before = {path: path.read_bytes() for path in begun.path.iterdir() if path.is_file()}
    turned = copy_as(faces, tmp_path / "turned", lambda index: f"{3 - index}.png")
    assert "was trained on 4: they are in another order" in fail(2, *resume, turned)
    others = copy_as(faces, tmp_path / "others", lambda index: f"{index}.png")
    put(others / "2.png", noise(9, 64))
    assert "1 are new and 1 are gone (images.sha256 lists them)" in fail(2, *resume, others)
    monkeypatch.setattr(
        "lutdeploy.training.data.draw_set.__defaults__", (3, 6, 0, no_progress, None)
    )
    assert "6 are new and 4 are gone" in fail(2, *resume, "synthetic")
    assert {path: path.read_bytes() for path in before} == before
    same = copy_as(faces, tmp_path / "same", lambda index: f"other name {index}.png")
    succeed(*resume, same)


def test_a_run_of_an_earlier_version_has_no_list(begun: Run, tmp_path: Path) -> None:
    begun.images.unlink()
    resume = ("train", "--resume", "--out", begun.path, "--steps", 2)
    result = succeed(*resume)
    assert "noted no images: only their number is compared" in result.stderr
    assert len(read_list(begun.images)) == 4, "from now on they are known"
    assert "noted no images" not in succeed(*resume).stderr


def test_a_relative_path_is_stored_absolute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for index in range(2):
        put(tmp_path / "faces" / f"{index}.png", noise(index, 64))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    small = ("--size", "tiny", "--batch", 2, "--steps", 1)
    succeed("train", "--data", "faces", "--out", "run", *small)
    monkeypatch.chdir(tmp_path / "elsewhere")
    resume = ("train", "--resume", "--out", "../run", "--steps", 2)
    succeed(*resume)
    settings = Run(tmp_path / "run").settings
    values = files.read_json(settings)
    assert values["data"] == str(tmp_path / "faces")
    files.write_json(settings, {**values, "data": "faces"})  # as an earlier version stored it
    words = (
        f"faces: no such folder of images (a relative path, looked for from {Path.cwd()}); --data"
    )
    assert words in fail(2, *resume)
    assert words in fail(2, "evaluate", "../run", "-n", 16, "--backend", "torch")
    succeed(*resume, "--data", "../faces")


# Several processes


class Joined(Processes):
    """One of two processes of a machine; here they are threads."""

    count = 2

    def __init__(self, rank: int, barrier: threading.Barrier, told: queue.Queue[Any]) -> None:
        super().__init__("cpu")
        self.rank = self.local_rank = rank
        self._barrier, self._told = barrier, told

    def tell(self, value: Any) -> Any:
        if self.rank == 0:
            self._told.put(value)
            return value
        return self._told.get(timeout=30)

    def wait(self) -> None:
        self._barrier.wait(30)


@pytest.mark.parametrize("source", ["folder", "synthetic"])
def test_processes_of_a_machine_share_one_copy(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for index in range(5):
        put(tmp_path / "folder" / f"{index}.png", noise(index))
    (tmp_path / "folder" / "2.png").write_text("broken")
    monkeypatch.setattr(
        "lutdeploy.training.data.draw_set.__defaults__", (3, 6, 0, no_progress, None)
    )
    monkeypatch.chdir(tmp_path)
    scratch = tmp_path / "run"
    scratch.mkdir()
    (scratch / ".images.left.0").write_bytes(b"by a process that was killed")
    loads: list[str] = []

    def load(*arguments: Any) -> ImageSet:
        loads.append(threading.current_thread().name)
        return load_images(*arguments)

    monkeypatch.setattr("lutdeploy.training.data.load_images", load)
    barrier, told = threading.Barrier(2), queue.Queue[Any]()
    found: dict[int, ImageSet] = {}

    def work(rank: int) -> None:
        found[rank] = load_once(Joined(rank, barrier, told), source, 8, 3, scratch)

    threads = [threading.Thread(target=work, args=(rank,), name=str(rank)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert loads == ["0"], "one of them decodes"
    expected = draw_set(8, count=6) if source == "synthetic" else load_folder(Path("folder"), 8)
    for rank in range(2):
        pixels = found[rank].images
        np.testing.assert_array_equal(pixels, expected.images)
        assert isinstance(pixels, np.memmap) and isinstance(pixels.base, np.memmap | mmap.mmap)
    assert found[0].sha256 == expected.sha256 and found[1].sha256 == ()
    assert list(scratch.iterdir()) == [], "the file has no name to leave behind"


def test_an_error_of_the_first_process_ends_all(begun: Run) -> None:
    told = queue.Queue[Any]()
    first, second = (Joined(rank, threading.Barrier(2), told) for rank in range(2))
    others = draw_set(8, count=2)

    def check() -> None:
        require_same_images(begun, others, "faces", print)

    for process in (first, second, Processes("cpu")):
        with pytest.raises(UsageError, match="2 are new and 4 are gone"):
            process.by_first(check)
    first.by_first(lambda: None)
    second.by_first(lambda: pytest.fail("the second does nothing itself"))


def test_reading_is_shown(begun: Run) -> None:
    result = succeed("train", "--resume", "--out", begun.path, "--steps", 2)
    assert re.search(r"^data 4 of 4, 100%", result.stderr, re.MULTILINE)
