"""What a picture says of itself, in the text of its PNG: enough to make it again.

``Software`` is lutdeploy and its version; ``lutdeploy`` is JSON: the model's hash, the schedule,
the seed and the index. What else may have a say in the last bits, such as the device, is in
manifest.jsonl. So the bytes of picture i depend on the model, the schedule, the seed and i alone,
where its pixels do.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import msgspec
from PIL import Image

from lutdeploy import __version__, images
from lutdeploy.errors import ArtefactError, ran_out_of_memory
from lutdeploy.schedule import DISTILLED, FITTED, SOLVERS

SOFTWARE = "Software"  # of the keywords that PNG defines: https://www.w3.org/TR/png-3/#11keywords
KEYWORD = "lutdeploy"
MADE_BY = f"lutdeploy {__version__}"
# Of a sample folder's settings, those that a picture follows from.
SETTINGS = ("model_sha256", "solver", "steps", "shift", "grid", "times_sha256", "seed")

Hash = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]
Index = Annotated[int, msgspec.Meta(ge=0)]


class Made(msgspec.Struct, frozen=True):
    """What the text ``lutdeploy`` says. ``index`` is that of a picture; ``images`` of several."""

    model_sha256: Hash
    solver: str
    steps: Annotated[int, msgspec.Meta(ge=1)]
    shift: float
    seed: Annotated[int, msgspec.Meta(ge=0)]
    grid: str = "uniform"
    times_sha256: Hash | None = None  # of a grid that is not uniform
    index: Index | None = None
    images: tuple[Index, Index] | None = None  # the first and the last
    trajectory: bool = False  # from their noise on

    def __post_init__(self) -> None:
        if self.solver not in (*SOLVERS, FITTED, DISTILLED):
            raise ValueError(f"no solver {self.solver!r}")
        if (self.index is None) == (self.images is None):
            raise ValueError("neither one picture nor several")


def picture_chunks(settings: Mapping[str, Any], indices: Sequence[int]) -> list[bytes]:
    """The PNG chunks of each picture, for :func:`lutdeploy.images.encode_pictures`.

    Args:
        settings: of the sample folder.
        indices: of the pictures.
    """
    software, shared = images.text_chunk(SOFTWARE, MADE_BY), _shared(settings)
    return [
        software + images.text_chunk(KEYWORD, json.dumps({**shared, "index": index}))
        for index in indices
    ]


def text_before_seed(settings: Mapping[str, Any]) -> str:
    """How the text ``lutdeploy`` of a picture begins, for who adds the seed and the index itself.

    ``settings``: of a sample folder; what they say of the seed is left out.
    """
    told = _shared(settings)
    told.pop("seed", None)
    return json.dumps(told).removesuffix("}")


def sheet_texts(settings: Mapping[str, Any], last: int, trajectory: bool = False) -> dict[str, str]:
    """The texts of a PNG of pictures 0 to ``last``, for :func:`lutdeploy.images.encode_png`.

    Args:
        settings: of the sample folder.
        last: index of the last picture.
        trajectory: whether it shows their noise and steps as well.
    """
    told = {**_shared(settings), "images": [0, last]}
    if trajectory:
        told["trajectory"] = True
    return {SOFTWARE: MADE_BY, KEYWORD: json.dumps(told)}


def _shared(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {name: settings[name] for name in SETTINGS if name in settings}


def read_picture_text(path: Path) -> tuple[Made, str]:
    """What a PNG says of its making, and the software that it names.

    Raises:
        ArtefactError: no PNG, or none that says so.
    """
    try:
        with Image.open(path, formats=["PNG"]) as picture:
            texts = dict(getattr(picture, "text", {}))
    except FileNotFoundError:
        raise
    except Exception as error:  # decoders raise almost anything on bad bytes
        if ran_out_of_memory(error):
            raise
        raise ArtefactError(f"{path} is no PNG, or a damaged one") from error
    if KEYWORD not in texts:
        raise ArtefactError(
            f"{path} does not say what made it: it comes from elsewhere, or from an earlier "
            "version, or a program that saved it again left that out; manifest.jsonl beside it may "
            "say more"
        )
    try:
        made = msgspec.json.decode(texts[KEYWORD], type=Made)
    except (ValueError, RecursionError) as error:
        raise ArtefactError(f"{path}: its text {KEYWORD!r} is damaged: {error}") from error
    return made, str(texts.get(SOFTWARE, ""))
