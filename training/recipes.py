"""How a model is trained: every number of a run in one typed record."""

from __future__ import annotations

import json
import math
import re
import sys
from typing import Annotated, Any, Literal, get_args, get_origin

import msgspec
from msgspec import Meta

from lutdeploy.artefacts import files
from lutdeploy.artefacts.run import Run, decay_name
from lutdeploy.artefacts.tuned_steps import Origin
from lutdeploy.config import ModelConfig
from lutdeploy.errors import ArtefactError, ConfigError
from lutdeploy.schedule import Schedule, Step

Count = Annotated[int, Meta(ge=1)]
Weight = Annotated[float, Meta(ge=0)]
Positive = Annotated[float, Meta(gt=0, le=sys.float_info.max)]
Share = Annotated[float, Meta(ge=0, le=1)]
BelowOne = Annotated[float, Meta(ge=0, lt=1)]

# Fields of earlier versions. Both lost their comparison (docs/training.md, "Recipes side by side").
REMOVED = ("affine", "dct_weight")


class DataSplit(msgspec.Struct, frozen=True):
    """The images that a model was trained on, and which of them were held out."""

    held_out: float  # fraction and
    seed: int  # seed of their split
    data: str | None = None  # their folder or "synthetic"; None where only the images can tell
    images: int | None = msgspec.field(name="training_images", default=None)  # trained on, if known


class Guidance(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How a teacher is guided (:mod:`lutdeploy.training.few_steps.guidance`)."""

    guide: str  # the weaker model: a run or a model file
    weight: Annotated[float, Meta(gt=1)]
    interval: tuple[Share, Share]  # of t


class Distilled(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What a student learns from (:mod:`lutdeploy.training.few_steps.distill`)."""

    teacher: str  # a name, for people; path and hash are the settings' init
    engine: dict[str, Any]  # the identity of what walks the teacher's paths
    rows: tuple[Step, ...]  # the teacher's, as many for each row of the student's
    schedule: Schedule  # the student's
    paths: Count  # learnt from
    held_out: Count  # paths that the averages are compared on
    on_policy: Share  # of the steps, at the end, in which the student's own states are learnt from
    images: DataSplit | None  # the teacher's; None where it does not say
    guidance: Guidance | None = None  # of the teacher


class TrainSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Everything that decides the numbers of a training run; kept in train.json.

    The constructor does not check types and ranges: :func:`train_settings` and :meth:`changed` do.
    """

    model: ModelConfig
    data: str
    recipe: str
    steps: Count
    batch: Count
    seed: Annotated[int, Meta(ge=0)]
    precision: Literal["fp32", "bf16"]  # bf16: autocast
    compile: bool  # torch.compile
    held_out: BelowOne  # fraction of the images
    perceptual: Literal["none", "lpips"]
    perceptual_weight: Weight
    perceptual_from: Share  # smallest t at which it counts
    lr: Positive
    weight_decay: Weight
    betas: tuple[BelowOne, BelowOne]
    start: Literal["noise", "copy"]  # "copy": x0 = x_t (lutdeploy.training.start)
    optimizer: Literal["adamw", "muon"]  # Muon for the blocks' matrices, AdamW for the rest
    flip: Share  # of the images, mirrored
    dropout: BelowOne  # of what each block adds
    gram_weight: Weight
    velocity_floor: Annotated[float, Meta(gt=0, le=1)] | None  # weight 1/max(1−t, floor)²; None: 1
    t_mean: float | None  # logit t ~ N(t_mean, t_std²); None: t ~ U(0, 1)
    t_std: Positive
    clip_norm: Positive | None
    warmup: Annotated[int, Meta(ge=0)]  # steps of linear warm-up
    cosine: bool  # decay to zero at the last step
    ema: Annotated[tuple[BelowOne, ...], Meta(min_length=1)]  # decays of the averages
    ema_warmup: bool
    t_low: Share = 0.0  # of the timesteps that are log-uniform in LOW_T instead
    init: str | None = None  # run or model whose weights come first, in place of ``start``
    init_sha256: str | None = None  # of those weights
    restart: Annotated[int, Meta(ge=0)] = 0  # step at which warm-up and decay last began
    distilled: Distilled | None = None  # of a student, which learns from no images

    def __post_init__(self) -> None:
        if len(set(map(decay_name, self.ema))) < len(self.ema):
            raise ConfigError(
                f"ema cannot be {list(self.ema)}: each decay may stand there once, and needs a "
                "name of its own in six digits"
            )
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

    def changed(self, **values: Any) -> TrainSettings:
        """The same settings with other values."""
        return _checked({**msgspec.to_builtins(self), **values})

    def origin(self) -> dict[str, Any]:
        """What the metadata of the model say of where it comes from."""
        if self.distilled is None:
            return {"origin": "lutdeploy train"}
        of = self.distilled
        guidance = of.guidance.weight if of.guidance else None
        origin = Origin(of.teacher, str(self.init_sha256), len(of.rows), of.schedule, guidance)
        return {"origin": "lutdeploy distill", "distilled": msgspec.to_builtins(origin)}

    def learning_rate(self, step: int) -> float:
        """The rate at a step counted from 0: linear warm-up, then constant or cosine."""
        step, steps = step - self.restart, self.steps - self.restart
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        if not self.cosine:
            return self.lr
        progress = (step - self.warmup) / max(1, steps - self.warmup)
        return self.lr * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))

    def ema_decay(self, decay: float, step: int) -> float:
        """An average's decay at a step counted from 0; warm-up as min(decay, (1+n)/(10+n))."""
        return min(decay, (1 + step) / (10 + step)) if self.ema_warmup else decay

    def training_flops(self) -> int:
        """FLOP of one image: forward, and twice as many backward; optimiser and terms aside."""
        return 6 * self.model.multiply_adds()


def _checked(values: dict[str, Any]) -> TrainSettings:
    """Settings from plain JSON values, with every field checked."""
    model = values.get("model")
    if not isinstance(model, ModelConfig):  # msgspec would pass over missing and unknown fields
        values = {**values, "model": ModelConfig.from_dict(model)}
    try:
        return msgspec.convert(values, TrainSettings)
    except msgspec.ValidationError as error:
        found = re.fullmatch(r"(.*) - at `\$\.(\w+).*`", str(error))
        if found is None:  # a missing or unknown field
            raise ConfigError(f"not the settings of a training run: {error}") from error
        reason, name = found.groups()
        reason = reason[0].lower() + reason[1:]
        raise ConfigError(f"{name} cannot be {values[name]!r}: {reason}") from error


def field_problem(name: str, value: Any) -> str | None:
    """Why a field of a recipe cannot have a plain JSON value, and how one is written, or None."""
    (kind,) = (field.type for field in msgspec.structs.fields(TrainSettings) if field.name == name)
    try:
        msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        reason = str(error)[0].lower() + str(error)[1:]
        written = [json.dumps(modern(ModelConfig())[name], separators=(",", ":"))]
        if kind is bool:
            written = ["true", "false"]
        elif get_origin(kind) is Literal:
            written = list(get_args(kind))
        forms = " or ".join(f"{name}={form}" for form in written)
        return f"{name} cannot be {value!r}: {reason}; write {forms}"
    return None


def read_settings(run: Run) -> TrainSettings:
    """The settings that a run was started with, from its train.json."""
    values = files.read_json(run.settings)
    try:
        for name in REMOVED:
            if values.pop(name, 0):
                raise ArtefactError(
                    f"{run.settings}: {name} is not supported any more; train a new run, or "
                    "continue this one with the version of lutdeploy that started it"
                )
        return _checked(values)
    except (ConfigError, AttributeError, TypeError) as error:
        raise ArtefactError(f"{run.settings} is damaged: {error}") from error


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
        "dropout": 0.0,
        "gram_weight": 0.2 if penalises_gram(model) else 0.0,
        "velocity_floor": None,
        "t_mean": None,
        "t_std": 0.8,
        "t_low": 0.0,
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
        "dropout": 0.0,
        "gram_weight": 0.02 if penalises_gram(model) else 0.0,
        "velocity_floor": 0.05,
        "t_mean": -0.6,
        "t_std": 1.2,
        "t_low": 0.0,
        "clip_norm": 1.0,
        "warmup": 200,
        "cosine": True,
        "ema": (0.99, 0.998, 0.9998),
        "ema_warmup": True,
    }


DEFAULTS = {
    "batch": 64,
    "seed": 0,
    "precision": "fp32",
    "compile": False,
    "held_out": 0.05,
}
RECIPES = {"modern": modern, "post": post}
RECIPE_FIELDS = frozenset(modern(ModelConfig()))  # what a recipe decides


def train_settings(model: ModelConfig, recipe: str = "modern", **values: Any) -> TrainSettings:
    """A recipe's settings with other values; a value of None keeps the recipe's or the default.

    ``data`` and ``steps`` are needed.
    """
    if recipe not in RECIPES:
        raise ConfigError(f"no recipe {recipe!r}; there are {', '.join(RECIPES)}")
    given = {name: value for name, value in values.items() if value is not None}
    return _checked(
        {"model": model, "recipe": recipe, **DEFAULTS, **RECIPES[recipe](model), **given}
    )
