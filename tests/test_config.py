"""Configs: presets, sizes, impossible combinations."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lutdeploy.config import PRESETS, SIZES, ModelConfig, model_config
from lutdeploy.errors import ConfigError
from lutdeploy.model import LutTransformer


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"width": 100, "heads": 8}, ("100", "8")),
        ({"width": 6, "heads": 3}, ("6", "4")),
        ({"image_size": 60}, ("60", "8")),
        ({"entries": 0}, ("entries", "0")),
        ({"depth": -1}, ("depth", "-1")),
        ({"heads": 0}, ("heads", "0")),
        ({"width": 64.0}, ("width", "64.0")),
        ({"channels": True}, ("channels", "True")),
        ({"lut": "rotating"}, ("rotating",)),
        ({"weights": "relu"}, ("relu",)),
        ({"time_frequencies": 1}, ("time_frequencies", "1")),
        ({"layer_norm_eps": 0.0}, ("layer_norm_eps", "0.0")),
        ({"time_base": float("nan")}, ("time_base", "nan")),
    ],
)
def test_impossible_values_raise_with_the_values(
    fields: dict[str, object], told: tuple[str, ...]
) -> None:
    with pytest.raises(ConfigError) as caught:
        ModelConfig(**fields)  # type: ignore[arg-type]
    assert all(word in str(caught.value) for word in told)


@pytest.mark.parametrize(
    ("size", "millions"), [("seed", 25.818), ("small", 3.458)]
)  # spec, table of sizes
def test_parameter_counts_are_the_specs(size: str, millions: float) -> None:
    model = LutTransformer(model_config("static-tanh-64", size))
    count = sum(parameter.numel() for parameter in model.parameters())
    assert round(count / 1e6, 3) == millions


def test_cost_is_the_specs() -> None:
    config = model_config("static-tanh-64", "seed")  # spec "Cost": 1.69 G, 3.37 GFLOP
    assert round(config.multiply_adds() / 1e9, 2) == 1.69
    assert round(2 * config.multiply_adds() / 1e9, 2) == 3.37
    d, depth, k = 512, 16, 64
    by_hand = 64 * (depth * (4 * d * d + 2 * d * d + 2 * 64 * d) + 192 * d + d * k + k * 192)
    assert config.multiply_adds() == by_hand


@given(
    preset=st.sampled_from(sorted(PRESETS)),
    size=st.sampled_from(sorted(SIZES)),
    image_size=st.sampled_from([16, 32, 64]),
    entries=st.integers(1, 600),
)
def test_json_round_trip(preset: str, size: str, image_size: int, entries: int) -> None:
    config = model_config(preset, size, image_size=image_size, entries=entries)
    assert ModelConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    ("change", "told"),
    [({"colour": 1}, "colour"), ({"width": None}, "width")],
)
def test_unknown_and_wrong_fields_are_named(change: dict[str, object], told: str) -> None:
    values = {**model_config("dynamic-64", "tiny").to_dict(), **change}
    with pytest.raises(ConfigError, match=told):
        ModelConfig.from_dict(values)


def test_missing_field_is_named() -> None:
    values = ModelConfig().to_dict()
    del values["depth"]
    with pytest.raises(ConfigError, match="depth"):
        ModelConfig.from_dict(values)


@pytest.mark.parametrize(("preset", "size"), [("static", "tiny"), ("dynamic-64", "huge")])
def test_unknown_preset_and_size_list_what_there_is(preset: str, size: str) -> None:
    with pytest.raises(ConfigError, match="there are"):
        model_config(preset, size)
