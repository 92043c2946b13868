"""Noise, the loop, and pictures that do not depend on the batch."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lutdeploy
from lutdeploy import images
from lutdeploy.artefacts import sample_folder
from lutdeploy.errors import ConfigError, NonFiniteError, UsageError
from lutdeploy.reference import TorchDenoiser
from lutdeploy.sampling import (
    Images,
    batch_noise,
    image_noise,
    resume,
    sample,
    trajectory,
)
from lutdeploy.schedule import (
    FITTED,
    Schedule,
    ScheduleRequest,
    Step,
    fitted_schedule,
    solver_schedule,
)
from tests.conftest import golden_model

SHAPE = (3, 64, 64)


@pytest.fixture(scope="module")
def denoiser() -> TorchDenoiser:
    return TorchDenoiser(golden_model("static-tanh-64"))


def test_noise_never_changes() -> None:
    """Every picture ever made depends on these bytes."""
    digest = hashlib.sha256(batch_noise(7, [0, 1, 1000], SHAPE).tobytes()).hexdigest()
    assert digest == "3b74ff0748229f447692af13773b94138ef4cf8113baefafa92584b168c1c487"


@settings(max_examples=25)
@given(seed=st.integers(0, 2**64 - 1), start=st.integers(0, 2**40), n=st.integers(1, 5))
def test_noise_depends_on_seed_and_index_alone(seed: int, start: int, n: int) -> None:
    together = batch_noise(seed, range(start, start + n), (1, 4, 4))
    for row, index in enumerate(range(start, start + n)):
        assert np.array_equal(together[row], image_noise(seed, index, (1, 4, 4)))
    assert len({row.tobytes() for row in together}) == n


def test_noise_is_standard_normal() -> None:
    noise = batch_noise(3, range(100), SHAPE)
    assert noise.dtype == np.float32
    assert abs(noise.mean()) < 3e-3
    assert abs(noise.std() - 1) < 3e-3
    flat = noise.reshape(100, -1)
    correlation = np.corrcoef(flat) - np.eye(100)
    assert np.abs(correlation).max() < 0.05


@pytest.mark.parametrize(("seed", "index"), [(-1, 0), (2**64, 0), (0, -1)])
def test_noise_outside_its_range_raises(seed: int, index: int) -> None:
    with pytest.raises(ConfigError, match=str(min(seed, index)) if seed < 2**64 else str(seed)):
        image_noise(seed, index, SHAPE)


def test_batch_size_changes_no_picture(denoiser: TorchDenoiser) -> None:
    alone = sample(denoiser, 5, seed=5, steps=4, batch=1)
    for batch in (2, 5):
        other = sample(denoiser, 5, seed=5, steps=4, batch=batch)
        difference = images.to_uint8(alone).astype(int) - images.to_uint8(other)
        assert np.abs(difference).max() <= 1


def test_noise_argument_overrides_the_seed(denoiser: TorchDenoiser) -> None:
    noise = batch_noise(9, range(3), SHAPE)
    given_noise = sample(denoiser, 3, seed=1, steps=4, noise=noise)
    assert np.array_equal(given_noise, sample(denoiser, 3, seed=9, steps=4))
    with pytest.raises(UsageError, match="noise must have shape"):
        sample(denoiser, 4, noise=noise)


def test_trajectory_yields_every_state(denoiser: TorchDenoiser) -> None:
    noise = batch_noise(0, range(2), SHAPE)
    one = sample(denoiser, 2, steps=1, noise=noise)
    assert np.array_equal(one, denoiser.predict_x0(noise, np.zeros(2, np.float32)))
    states = list(trajectory(denoiser, noise, solver_schedule("dpmpp-2m", 6)))
    assert [state.step for state in states] == list(range(7))
    assert states[0].x is noise
    assert states[0].x0 is None
    assert states[-1].x0 is not None
    assert np.array_equal(states[-1].x, states[-1].x0)  # the last step gives x' = x0


def test_third_order_remembers_two_predictions(denoiser: TorchDenoiser) -> None:
    noise = batch_noise(0, range(2), SHAPE)
    schedule = solver_schedule("dpmpp-3m", 6)
    x, past = noise, [np.zeros_like(noise)] * 2
    _, *states = trajectory(denoiser, noise, schedule)
    for row, state in zip(schedule.rows, states, strict=True):
        x0 = denoiser.predict_x0(x, np.full(2, row.t, np.float32))
        x = row.a * x + row.b * x0 + row.c * past[-1] + row.d * past[-2]
        x = x.astype(np.float32)
        past.append(x0)
        np.testing.assert_allclose(state.x, x, atol=1e-5)


def test_a_trajectory_can_be_resumed_anywhere(denoiser: TorchDenoiser) -> None:
    noise = batch_noise(0, range(2), SHAPE)
    schedule = solver_schedule("dpmpp-3m", 6)
    states = list(trajectory(denoiser, noise, schedule))
    for state in states:
        rest = list(resume(denoiser, state, schedule, range(2)))
        assert [s.step for s in rest] == list(range(state.step + 1, 7))
        assert np.array_equal(rest[-1].x if rest else state.x, states[-1].x)


FIT_4 = fitted_schedule([Step(t, 0.7, 0.3, 0.0) for t in (0.0, 0.2, 0.5, 0.8)])
FIT_2 = fitted_schedule([Step(0.0, 0.6, 0.5, 0.0), Step(0.4, 0.1, 1.2, -0.3)])
OTHER_FIT_2 = fitted_schedule([Step(0.0, 0.6, 0.5, 0.0), Step(0.4, 0.1, 1.1, -0.3)])
FITS = [FIT_4, FIT_2]  # the best first
OLD = Schedule("dpmpp-2m", 1.0, FIT_2.rows, "tuned")  # as exports of earlier versions hold it


@pytest.mark.parametrize(
    ("request_", "held", "expected"),
    [
        (ScheduleRequest(FITTED), None, FIT_4),
        (ScheduleRequest(FITTED, 2), None, FIT_2),
        (ScheduleRequest(FITTED), OTHER_FIT_2, OTHER_FIT_2),
        (ScheduleRequest(steps=2), OTHER_FIT_2, OTHER_FIT_2),
        (ScheduleRequest(FITTED, 4), OTHER_FIT_2, FIT_4),
        (ScheduleRequest(), OLD, OLD),
        (ScheduleRequest("dpmpp-2m", 2), OLD, OLD),
        (ScheduleRequest("euler"), OLD, solver_schedule("euler", 2)),
        (ScheduleRequest("euler", 3, 2.0), OLD, solver_schedule("euler", 3, 2.0)),
        (ScheduleRequest(), None, solver_schedule("euler", 64)),
    ],
)
def test_a_requested_schedule_is_found(
    request_: ScheduleRequest, held: Schedule | None, expected: Schedule
) -> None:
    assert request_.resolve(held, lambda: FITS) == expected


@pytest.mark.parametrize(
    ("request_", "fitted", "message"),
    [
        (
            ScheduleRequest(FITTED, 64),
            FITS,
            r"no fitted schedule of 64 steps; there are some of 2, 4 steps; `lutdeploy tune-steps "
            r"--steps 64` fits one",
        ),
        (ScheduleRequest(FITTED), [], r"this model has none; `lutdeploy tune-steps` fits one"),
        (ScheduleRequest(FITTED, 2, 1.5), FITS, "--shift warps a uniform grid"),
    ],
)
def test_fitted_schedules_that_are_not_there(
    request_: ScheduleRequest, fitted: list[Schedule], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        request_.resolve(None, lambda: fitted)


def test_a_schedule_can_be_given(denoiser: TorchDenoiser) -> None:
    schedule = FIT_4
    end = list(trajectory(denoiser, batch_noise(4, range(2), SHAPE), schedule))[-1].x
    assert np.array_equal(sample(denoiser, 2, seed=4, schedule=schedule), end)
    with pytest.raises(UsageError, match="give either"):
        sample(denoiser, 2, steps=3, schedule=schedule)


def test_only_folders_of_fits_say_their_rows() -> None:
    """Folders of earlier versions go on; other rows are other pictures."""
    uniform = sample_folder.settings({}, solver_schedule("euler", 2), 0, "png")
    assert uniform == {"solver": "euler", "steps": 2, "shift": 1, "seed": 0, "format": "png"}
    one, other = (
        sample_folder.settings({}, schedule, 0, "png") for schedule in (FIT_2, OTHER_FIT_2)
    )
    assert one["grid"] == other["grid"] == "tuned"
    assert one != other


@pytest.mark.parametrize(("n", "batch"), [(0, 1), (1, 0), (-3, 1)])
def test_impossible_counts_raise(denoiser: TorchDenoiser, n: int, batch: int) -> None:
    with pytest.raises(UsageError, match="at least 1"):
        sample(denoiser, n, batch=batch)


class Poisoned(TorchDenoiser):
    """Turns one image to NaN at one timestep."""

    def step(self, x: Images, row: Step, x0_prev: Images | None) -> tuple[Images, Images]:
        x_next, x0 = super().step(x, row, x0_prev)
        if row.t == 0.5:
            x_next[1, 0, 3, 3] = np.nan
        return x_next, x0


def test_nan_is_named_with_step_and_image(tmp_path: Path) -> None:
    denoiser = Poisoned(golden_model("static-tanh-64"))
    schedule = solver_schedule("euler", 4)
    with pytest.raises(NonFiniteError, match="after step 3 in image 1"):
        sample(denoiser, 2, steps=4)
    made = sample_folder.settings({"backend": "test"}, schedule, 0, "png")
    with (
        sample_folder.open_folder(tmp_path / "s", made) as folder,
        pytest.raises(NonFiniteError, match="after step 3 in image 3"),
    ):
        made_before = np.zeros((2, 64, 64, 3), np.uint8)
        folder.writer.store(folder.writer.prepare([0, 1], made_before))
        list(sample_folder.fill(folder, denoiser, schedule, 6, batch=2))


def test_public_names() -> None:
    assert lutdeploy.sample is sample
    assert set(lutdeploy.__all__) == {"ModelConfig", "__version__", "load", "sample"}
    with pytest.raises(AttributeError, match="nothing"):
        lutdeploy.nothing  # noqa: B018


def test_uint8_is_rounded_and_clipped() -> None:
    values = np.array([-2, -1, 0, 1, 3], np.float32).reshape(1, 1, 5)
    assert images.to_uint8(values).ravel().tolist() == [0, 0, 128, 255, 255]


@settings(max_examples=20)
@given(n=st.integers(1, 12), columns=st.integers(1, 5), gap=st.integers(0, 2))
def test_grid_places_every_picture(n: int, columns: int, gap: int) -> None:
    numbers = np.arange(1, n + 1, dtype=np.uint8)[:, None, None, None]
    pixels = np.tile(numbers, (1, 3, 2, 3))
    sheet = images.grid(pixels, columns, gap)
    for k in range(n):
        row, column = divmod(k, columns)
        tile = sheet[row * (3 + gap) :, column * (2 + gap) :][:3, :2]
        assert (tile == k + 1).all()


@pytest.mark.parametrize(
    ("n", "shape"),
    [(1, (1, 1)), (5, (2, 3)), (8, (2, 4)), (10, (2, 5)), (30, (5, 6)), (64, (8, 8))],
)
def test_grid_is_full_where_it_can_be(n: int, shape: tuple[int, int]) -> None:
    assert images.grid(np.zeros((n, 1, 1, 3), np.uint8)).shape[:2] == shape


def test_png_round_trip() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
    assert np.array_equal(images.decode_png(images.encode_png(pixels)), pixels)
    assert images.encode_png(pixels) == images.encode_png(pixels)


@settings(max_examples=30)
@given(
    shape=st.tuples(*[st.integers(1, 9)] * 3, st.sampled_from([1, 3, 4])),
    seed=st.integers(0, 99),
)
def test_many_pictures_round_trip(shape: tuple[int, ...], seed: int) -> None:
    pixels = np.random.default_rng(seed).integers(0, 256, shape, np.uint8)
    encoded = images.encode_pictures(pixels)
    assert encoded == [images.encode_pictures(picture[None])[0] for picture in pixels]
    for picture, data in zip(pixels, encoded, strict=True):
        assert np.array_equal(images.decode_png(data), picture)


def test_small_photographs_are_not_much_larger_for_being_written_fast() -> None:
    """A smooth picture with the grain of a photograph, beside Pillow's own encoding."""
    y, x = np.mgrid[:64, :64] / 64
    smooth = np.stack([x, y, np.sin(3 * x + y)], axis=-1)
    grain = np.random.default_rng(0).normal(0, 0.03, (8, 64, 64, 3))
    pixels = np.rint(255 * np.clip(smooth + grain, 0, 1)).astype(np.uint8)
    fast = sum(map(len, images.encode_pictures(pixels)))
    assert fast < 1.15 * sum(len(images.encode_png(picture)) for picture in pixels)


def test_trajectory_picture_has_noise_on_top_and_every_fourth_step() -> None:
    states = [np.full((2, 3, 4, 4), k / 64, np.float32) for k in range(65)]
    picture = images.trajectory_rows(states)
    assert picture.shape == (17 * 4, 2 * 4, 3)
    expected = images.to_uint8(np.float32(np.arange(0, 65, 4) / 64).reshape(17, 1, 1, 1))
    assert np.array_equal(picture[::4, 0, 0], expected[:, 0, 0, 0])
