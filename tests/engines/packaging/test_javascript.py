"""The page's noise, sampling loop and pixels against NumPy and lutdeploy, in Node."""

from __future__ import annotations

import base64
from functools import cache
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from lutdeploy import images
from lutdeploy.engines.packaging.web import schedule_facts
from lutdeploy.sampling import Images, image_noise, trajectory
from lutdeploy.schedule import Schedule, Step, solver_schedule
from tests.engines.packaging.javascript import run_module

R = np.float32(3.654152885361009)  # beyond it is the ziggurat's tail
SHAPE = (3, 64, 64)
MOST = 2**64 - 1
KEYS = [
    (seed, index)
    for seed in (0, 1, 2**32 - 1, 2**32, 2**53 + 1, 2**63, MOST)
    for index in (0, 1, 2**32, 2**63 + 3, MOST)
] + [(20_251_123, index) for index in range(40)]


def floats(text: str) -> NDArray[np.float32]:
    return np.frombuffer(base64.b64decode(text), np.float32)


BASE64 = "const base64 = (array) => Buffer.from(array.buffer).toString('base64');\n"


def test_noise_is_numpys_bit_for_bit() -> None:
    """But for the last bit of numbers in the tail, where NumPy asks the C library for log1pf."""
    made = run_module(
        "import { imageNoise } from 'PAGE/noise.js';"
        + BASE64
        + "print(input.map(([s, i]) => base64(imageNoise(BigInt(s), BigInt(i), 3 * 64 * 64))));",
        [[str(seed), str(index)] for seed, index in KEYS],
    )
    ours = np.stack([floats(text) for text in made])
    numpys = np.stack([image_noise(seed, index, SHAPE).ravel() for seed, index in KEYS])
    tail = abs(numpys) > R
    assert tail.sum() > 100
    assert np.array_equal(ours[~tail].view(np.uint32), numpys[~tail].view(np.uint32))
    apart = ours[tail].view(np.int32).astype(np.int64) - numpys[tail].view(np.int32)
    assert abs(apart).max() <= 1


@cache
def untempered(output: int) -> int:
    """The state of MT19937 whose next output this is: its output function (1998) turned around."""
    output ^= output >> 18
    output ^= output << 15 & 0xEFC60000
    value = output
    for _ in range(4):  # each time seven more bits are right
        value = output ^ (value << 7 & 0x9D2C5680)
    output = value = value & 0xFFFFFFFF
    for _ in range(2):
        value = output ^ (value >> 11)
    return value


def numpys_normal(source: Any, bits: list[int]) -> tuple[float, int]:
    """What NumPy's ziggurat makes of 32-bit numbers given to its MT19937, and how many it takes."""
    key = np.zeros(624, np.uint32)
    key[: len(bits)] = [untempered(value) for value in bits]
    source.state = {**source.state, "state": {"key": key, "pos": 0}}
    made = np.random.Generator(source).standard_normal(dtype=np.float32)
    return made, source.state["state"]["pos"]


def test_every_strip_of_the_ziggurat_is_numpys() -> None:
    """The last place surely under the curve and the first beyond it, low and high beside it."""
    inside = run_module("import { STRIPS } from 'PAGE/noise.js'; print([...STRIPS.inside]);", None)
    rest = np.random.default_rng(0).integers(0, 2**32, 40, np.uint64).tolist()
    drawn = [
        [place << 9 | sign << 8 | strip, beside, *rest]
        for strip, end in enumerate(inside)
        for place in (end - 1, end, (end + 2**23) // 2)
        for sign in (0, 1)
        for beside in (0, 2**31, 2**32 - 1)
        if 0 <= place < 2**23
    ]
    assert len(drawn) > 4000
    made = run_module(
        "import { normal } from 'PAGE/noise.js';" + BASE64 + "const taken = [];"
        "const one = (bits) => {"
        " let k = 0; const x = normal(() => bits[k++]); taken.push(k); return x; };"
        "print([base64(Float32Array.from(input.map(one))), taken]);",
        drawn,
    )
    source = np.random.MT19937(0)
    expected = [numpys_normal(source, bits) for bits in drawn]
    assert made[1] == [taken for _, taken in expected]
    numpys = np.array([value for value, _ in expected], np.float32)
    apart = floats(made[0]).view(np.int32).astype(np.int64) - numpys.view(np.int32)
    assert not apart[abs(numpys) <= R].any()
    assert abs(apart).max() <= 1


class Linear:
    """A denoiser that JavaScript can be, in float32, operation by operation."""

    whole_trajectory, schedule = False, None

    def step(self, x: Images, row: Step, x0_prev: Images | None) -> tuple[Images, Images]:
        a, b, c, t = (np.float32(value) for value in (row.a, row.b, row.c, row.t))
        x0 = x * np.float32(0.5) + t
        return a * x + b * x0 + c * (x if x0_prev is None else x0_prev), x0


STEP = """
import { trajectory, toPixels } from 'PAGE/sampler.js';
const f = Math.fround;
const step = async (x, row, before) => {
  const [t, a, b, c] = row.map(f);
  const x0 = x.map((value) => f(value * f(0.5)) + t);
  return [x.map((value, k) => f(f(a * value) + f(b * x0[k])) + f(c * before[k])), x0];
};
"""


@pytest.mark.parametrize(
    "schedule",
    [solver_schedule("euler", 3), solver_schedule("dpmpp-2m", 6), solver_schedule("dpmpp-3m", 8)],
    ids=Schedule.describe,
)
def test_the_loop_is_lutdeploys(schedule: Schedule) -> None:
    noise = image_noise(3, 1, (1, 4, 4))[None]
    denoiser: Any = Linear()
    made = run_module(
        STEP + BASE64 + "const states = [];"
        "for await (const x of trajectory(step, Float32Array.from(input.noise), input.rows))"
        " states.push(base64(x));"
        "print(states);",
        {"noise": noise.ravel().tolist(), "rows": schedule_facts(schedule)["rows"]},
    )
    states = [state.x.ravel() for state in trajectory(denoiser, noise, schedule)][1:]
    assert np.array_equal([floats(text) for text in made], states)


def test_a_state_that_is_not_finite_is_an_error() -> None:
    code = (
        STEP + "const none = async (x) => [x.map(() => NaN), x];"
        "const said = [];"
        "try { for await (const x of trajectory(none, new Float32Array(4), [[0, 0, 1, 0, 0]])); }"
        "catch (error) { said.push(error.message); }"
        "print(said);"
    )
    assert run_module(code, None) == ["NaN or Inf after step 1"]


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_pixels_are_lutdeploys(channels: int) -> None:
    halves = (np.arange(256, dtype=np.float32) - np.float32(127)) / np.float32(127.5)
    noise = image_noise(0, 0, (2 * channels * 256 - 256, 1, 1)).ravel()
    x = np.concatenate([halves, noise]).reshape(2, channels, 16, 16)
    code = STEP + "print([...toPixels(Float32Array.from(input), CHANNELS, 16)]);"
    made = run_module(code.replace("CHANNELS", str(channels)), x.ravel().tolist())
    rgba = np.array(made, np.uint8).reshape(2, 16, 16, 4)
    pixels = images.to_uint8(x)
    assert np.array_equal(rgba[..., :channels], pixels)
    if channels == 1:
        assert np.array_equal(rgba[..., :3], pixels.repeat(3, axis=-1))
    if channels < 4:
        assert (rgba[..., 3] == 255).all()
