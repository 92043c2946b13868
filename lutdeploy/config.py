"""The hyper-parameters of a model, the presets and the sizes.

Every constant of the specification is a field here and nowhere else.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from lutdeploy.errors import ConfigError


@dataclass(frozen=True)
class ModelConfig:
    """Hyper-parameters of a :class:`lutdeploy.model.LutTransformer`.

    Impossible combinations raise a ConfigError with the values.
    """

    image_size: int = 64  # S, pixels
    patch_size: int = 8  # P, pixels
    channels: int = 3  # C
    width: int = 512  # D
    depth: int = 16
    heads: int = 8
    lut: str = "static"  # "static": a parameter; "dynamic": computed from extra tokens
    entries: int = 64  # K; with a dynamic LUT also the number of extra tokens
    weights: str = "tanh"  # activation of the LUT weights: "tanh" or "softmax"
    stem_channels: int = 16
    time_frequencies: int = 8  # h
    time_base: float = 10000.0
    position_base: float = 10000.0
    layer_norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type == "int" and (isinstance(value, bool) or not isinstance(value, int)):
                raise ConfigError(f"{field.name} must be an integer, not {value!r}")
            if field.type == "int" and value < 1:
                raise ConfigError(f"{field.name} must be at least 1, not {value}")
            if field.type == "float":
                if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
                    raise ConfigError(f"{field.name} must be a positive number, not {value!r}")
                object.__setattr__(self, field.name, float(value))
        if self.lut not in ("static", "dynamic"):
            raise ConfigError(f"lut must be 'static' or 'dynamic', not {self.lut!r}")
        if self.weights not in ("tanh", "softmax"):
            raise ConfigError(f"weights must be 'tanh' or 'softmax', not {self.weights!r}")
        if self.image_size % self.patch_size:
            raise ConfigError(
                f"image_size {self.image_size} is not divisible by patch_size {self.patch_size}"
            )
        if self.width % self.heads:
            raise ConfigError(f"width {self.width} is not divisible by heads {self.heads}")
        if self.width % 4:
            raise ConfigError(f"width {self.width} is not divisible by 4 (rotary halves of pairs)")
        if self.time_frequencies < 2:
            raise ConfigError(f"time_frequencies must be at least 2, not {self.time_frequencies}")

    @property
    def grid_size(self) -> int:
        """Patches along one side of the image."""
        return self.image_size // self.patch_size

    @property
    def image_tokens(self) -> int:
        """Patches of one image."""
        return self.grid_size**2

    @property
    def tokens(self) -> int:
        """Tokens in the blocks: the image's and, of a dynamic LUT, the LUT's."""
        return self.image_tokens + (self.entries if self.lut == "dynamic" else 0)

    @property
    def entry_values(self) -> int:
        """Numbers in one LUT entry, C·P·P."""
        return self.channels * self.patch_size**2

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, S, S)."""
        return (self.channels, self.image_size, self.image_size)

    def multiply_adds(self) -> int:
        """Multiply-adds of one image and one step, after the exact rewrites (spec "Cost")."""
        d, n, m = self.width, self.tokens, self.image_tokens
        blocks = n * self.depth * (4 * d * d + 2 * d * d + 2 * n * d)
        ends = m * (self.entry_values * d + d * self.entries + self.entries * self.entry_values)
        factors = 2 * self.channels * self.patch_size
        return blocks + ends + (self.entries * d * factors if self.lut == "dynamic" else 0)

    def preset(self) -> str:
        """The preset's name, such as ``static-tanh-64``."""
        if self.lut == "dynamic" and self.weights == "tanh":
            return f"dynamic-{self.entries}"
        return f"{self.lut}-{self.weights}-{self.entries}"

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Any) -> ModelConfig:
        """The inverse of :meth:`to_dict`. An unknown or missing field is a ConfigError."""
        if not isinstance(values, dict):
            raise ConfigError(f"a model config is a JSON object, not {type(values).__name__}")
        names = {field.name for field in dataclasses.fields(cls)}
        for problem, keys in (("unknown", set(values) - names), ("missing", names - set(values))):
            if keys:
                raise ConfigError(f"model config with {problem} field {sorted(keys)[0]!r}")
        return cls(**values)


PRESETS: dict[str, dict[str, Any]] = {
    "static-softmax-512": {"lut": "static", "entries": 512, "weights": "softmax"},
    "static-tanh-64": {"lut": "static", "entries": 64, "weights": "tanh"},
    "dynamic-64": {"lut": "dynamic", "entries": 64, "weights": "tanh"},
}
SIZES: dict[str, dict[str, int]] = {
    "seed": {"width": 512, "depth": 16, "heads": 8},
    "small": {"width": 256, "depth": 8, "heads": 4},
    "tiny": {"width": 64, "depth": 2, "heads": 4},
}


def model_config(preset: str, size: str = "seed", **overrides: Any) -> ModelConfig:
    """The config of a preset at a size, with any field overridden."""
    if preset not in PRESETS:
        raise ConfigError(f"no preset {preset!r}; there are {', '.join(PRESETS)}")
    if size not in SIZES:
        raise ConfigError(f"no size {size!r}; there are {', '.join(SIZES)}")
    return ModelConfig.from_dict(
        {**ModelConfig().to_dict(), **PRESETS[preset], **SIZES[size], **overrides}
    )
