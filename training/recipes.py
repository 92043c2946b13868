"""How a model is trained: every number of a run in one frozen dataclass."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from lutdeploy.config import ModelConfig
from lutdeploy.errors import ConfigError

# What a field may hold, by how it is written below; JSON does not tell 1 from 1.0.
KINDS: dict[Any, Any] = {
    "ModelConfig": ModelConfig,
    "str": str,
    "int": int,
    "bool": bool,
    "float": (int, float),
    "float | None": (int, float, type(None)),
    "tuple[float, ...]": tuple,
    "tuple[float, float]": tuple,
}


@dataclass(frozen=True)
class TrainSettings:
    """Everything that decides the numbers of a training run; kept in train.json.

    Raises:
        ConfigError: values that cannot be, with the values.
    """

    model: ModelConfig
    data: str
    recipe: str
    steps: int
    batch: int
    seed: int
    precision: str  # "fp32" or "bf16" autocast
    compile: bool  # torch.compile
    held_out: float  # fraction of the images
    perceptual: str  # "none" or "lpips"
    perceptual_weight: float
    perceptual_from: float  # smallest t at which it counts
    lr: float
    weight_decay: float
    betas: tuple[float, float]
    start: str  # "noise", or "copy": x0 = x_t (lutdeploy.training.start)
    optimizer: str  # "adamw", or "muon" for the blocks' matrices and AdamW for the rest
    flip: float  # share of the images mirrored
    affine: float  # share of the images scaled, shifted and turned, which the network is told
    dropout: float  # of what each block adds
    gram_weight: float
    dct_weight: float  # of the error weighted as JPEG weights frequencies
    velocity_floor: float | None  # loss weight 1/max(1−t, floor)²; None: weight 1
    t_mean: float | None  # logit t ~ N(t_mean, t_std²); None: t ~ U(0, 1)
    t_std: float
    clip_norm: float | None
    warmup: int  # steps of linear warm-up
    cosine: bool  # decay to zero at the last step
    ema: tuple[float, ...]  # decays of the averages that are kept
    ema_warmup: bool

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, KINDS[field.type]) or (
                isinstance(value, bool) and field.type != "bool"
            ):
                raise ConfigError(f"{field.name} cannot be {value!r}")
        checks = {
            "steps": self.steps >= 1,
            "batch": self.batch >= 1,
            "seed": 0 <= self.seed < 2**64,
            "precision": self.precision in ("fp32", "bf16"),
            "held_out": 0 <= self.held_out < 1,
            "perceptual": self.perceptual in ("none", "lpips"),
            "perceptual_weight": self.perceptual_weight >= 0,
            "perceptual_from": 0 <= self.perceptual_from <= 1,
            "lr": self.lr > 0 and math.isfinite(self.lr),
            "weight_decay": self.weight_decay >= 0,
            "betas": len(self.betas) == 2
            and all(isinstance(beta, int | float) and 0 <= beta < 1 for beta in self.betas),
            "velocity_floor": self.velocity_floor is None or 0 < self.velocity_floor <= 1,
            "clip_norm": self.clip_norm is None or self.clip_norm > 0,
            "warmup": self.warmup >= 0,
            "start": self.start in ("noise", "copy"),
            "optimizer": self.optimizer in ("adamw", "muon"),
            "flip": 0 <= self.flip <= 1,
            "affine": 0 <= self.affine <= 1,
            "dropout": 0 <= self.dropout < 1,
            "gram_weight": self.gram_weight >= 0,
            "dct_weight": self.dct_weight >= 0,
            "t_std": self.t_std > 0,
            "ema": bool(self.ema)
            and all(isinstance(decay, int | float) and 0 <= decay < 1 for decay in self.ema)
            and len(set(self.ema)) == len(self.ema),
        }
        for name, good in checks.items():
            if not good:
                raise ConfigError(f"{name} cannot be {getattr(self, name)!r}")
        if self.start == "copy" and self.model.stem_channels < self.model.channels:
            raise ConfigError(
                f"start copy needs stem_channels of {self.model.channels} at least, not "
                f"{self.model.stem_channels}; there is start noise"
            )
        if self.start == "copy" and (self.model.lut, self.model.weights) == ("dynamic", "softmax"):
            raise ConfigError(
                "start copy is for tanh weights or a static LUT, not for softmax weights of a "
                "dynamic one; there is start noise"
            )
        if self.perceptual == "lpips" and self.model.channels != 3:
            raise ConfigError(f"perceptual lpips needs 3 channels, not {self.model.channels}")
        if self.dct_weight and self.model.image_size % 8:
            raise ConfigError(
                f"dct_weight needs images of whole 8×8 blocks, not {self.model.image_size} pixels"
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrainSettings:
        """The inverse of :meth:`to_dict`.

        Raises:
            ConfigError: unknown or missing fields.
        """
        try:
            model = ModelConfig.from_dict(values["model"])
            listed = {name: tuple(values[name]) for name in ("betas", "ema")}
            return cls(**{**values, "model": model, **listed})
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"not the settings of a training run: {error}") from error

    def learning_rate(self, step: int) -> float:
        """The rate at a step counted from 0: linear warm-up, then constant or cosine."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        if not self.cosine:
            return self.lr
        progress = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.lr * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))

    def ema_decay(self, decay: float, step: int) -> float:
        """An average's decay at a step counted from 0; warm-up as min(decay, (1+n)/(10+n))."""
        return min(decay, (1 + step) / (10 + step)) if self.ema_warmup else decay

    def training_flops(self) -> int:
        """FLOP of one image: forward, and twice as many backward; optimiser and terms aside."""
        return 6 * self.model.multiply_adds()


def penalises_gram(model: ModelConfig) -> bool:
    """Whether the preset has the Gram penalty: a static LUT with unnormalised weights."""
    return model.lut == "static" and model.weights == "tanh"


def post(model: ModelConfig) -> dict[str, Any]:
    """The post's recipe (spec "Training as in the post")."""
    return {
        "perceptual": "lpips",
        "perceptual_weight": 1.0,
        "perceptual_from": 0.0,
        "lr": 3e-4,
        "weight_decay": 1e-2,
        "betas": (0.9, 0.999),
        "start": "noise",
        "optimizer": "adamw",
        "flip": 0.25,
        "affine": 0.0,
        "dropout": 0.0,
        "gram_weight": 0.2 if penalises_gram(model) else 0.0,
        "dct_weight": 0.0,
        "velocity_floor": None,
        "t_mean": None,
        "t_std": 0.8,
        "clip_norm": None,
        "warmup": 0,
        "cosine": False,
        "ema": (0.99,),
        "ema_warmup": False,
    }


def modern(model: ModelConfig) -> dict[str, Any]:
    """What won side by side: docs/training.md has the table."""
    return {
        "perceptual": "none",
        "perceptual_weight": 0.2,
        "perceptual_from": 0.3,
        "lr": 2e-3,
        "weight_decay": 1e-2,
        "betas": (0.9, 0.99),
        "start": "noise" if (model.lut, model.weights) == ("dynamic", "softmax") else "copy",
        "optimizer": "muon",
        "flip": 0.5,
        "affine": 0.0,
        "dropout": 0.0,
        "gram_weight": 0.02 if penalises_gram(model) else 0.0,
        "dct_weight": 0.0,
        "velocity_floor": 0.05,
        "t_mean": -0.6,
        "t_std": 1.2,
        "clip_norm": 1.0,
        "warmup": 200,
        "cosine": True,
        "ema": (0.99, 0.998, 0.9998),
        "ema_warmup": True,
    }


RECIPES = {"modern": modern, "post": post}
RECIPE_FIELDS = frozenset(modern(ModelConfig()))  # what a recipe decides


def train_settings(
    model: ModelConfig,
    recipe: str = "modern",
    *,
    data: str,
    steps: int,
    batch: int = 64,
    seed: int = 0,
    precision: str = "fp32",
    compile: bool = False,
    held_out: float = 0.05,
    **overrides: Any,
) -> TrainSettings:
    """A recipe's settings with overrides; an override of None keeps the recipe's value.

    Raises:
        ConfigError: unknown recipe, or values that cannot be.
    """
    if recipe not in RECIPES:
        raise ConfigError(f"no recipe {recipe!r}; there are {', '.join(RECIPES)}")
    given = {name: value for name, value in overrides.items() if value is not None}
    return TrainSettings(
        model=model,
        data=data,
        recipe=recipe,
        steps=steps,
        batch=batch,
        seed=seed,
        precision=precision,
        compile=compile,
        held_out=held_out,
        **{**RECIPES[recipe](model), **given},
    )
