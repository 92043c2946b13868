"""What surrounds the loop of a training run: its settings, its folder, its end by a signal."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import json
import os
import signal
import warnings
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any

import msgspec
import torch

from lutdeploy.artefacts import files, shipped
from lutdeploy.artefacts.metadata import read_metadata
from lutdeploy.artefacts.run import Run, require_text
from lutdeploy.artefacts.target import find_model
from lutdeploy.config import PRESETS, SIZES, ModelConfig, model_config
from lutdeploy.device import find_device
from lutdeploy.errors import BackendError, LutDeployError, Terminated, UsageError
from lutdeploy.machine import compile_problem
from lutdeploy.training.data import SYNTHETIC, ImageSet, read_list
from lutdeploy.training.processes import Processes, launch
from lutdeploy.training.recipes import (
    RECIPE_FIELDS,
    TrainSettings,
    field_problem,
    read_settings,
    train_settings,
)
from lutdeploy.training.state import read_position

COMPILES_FROM = 1000  # steps; fewer do not repay the compiler's minute
MODEL_FIELDS = frozenset(field.name for field in dataclasses.fields(ModelConfig))
NAMED_FILES = 20  # unreadable files that are named

Note = Callable[[str], None]


@dataclass(frozen=True)
class Request:
    """What the command line of `lutdeploy train` asks for."""

    given: frozenset[str]  # options that stand there; the others have their defaults
    preset: str
    size: str
    overrides: tuple[str, ...]  # FIELD=VALUE of --set
    compile: str  # "auto", "on" or "off"
    warm_restart: bool  # see extended()
    fields: dict[str, Any]  # of TrainSettings; None or () is the recipe's value


def choose_device(name: str) -> str:
    """The torch device for --device, which may be "auto"."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    find_device(name)
    return name


@contextlib.contextmanager
def hold_folder(run: Run, resume: bool, command: str = "train") -> Iterator[None]:
    """Hold the folder of a new or a resumed run; of several processes the first does so."""
    if not launch().is_first:
        yield
        return
    require_text(run.path)
    if not resume and (run.settings.exists() or run.model.exists()):
        raise UsageError(
            f"{run.path} already holds a run: --resume continues it, or choose another --out"
        )
    if resume and not run.settings.exists():
        raise UsageError(f"{run.path} holds no training run to resume")
    new = not run.path.exists()
    files.output_folder(run.path)
    with files.lock(run.path, f"`lutdeploy {command}`"):
        try:
            yield
        except BaseException:
            if new:  # a mistake found late leaves no empty run
                files.remove_if_empty(run.path)
            raise


def parse_overrides(
    pairs: tuple[str, ...], options: Collection[str]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Fields of the model and fields of the recipe, from FIELD=VALUE; VALUE is JSON or text.

    ``options``: fields that have an option of their own.
    """
    model: dict[str, Any] = {}
    recipe: dict[str, Any] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals:
            raise UsageError(f"--set {pair}: write FIELD=VALUE, such as --set width=96")
        try:
            value = json.loads(text)
        except ValueError:
            value = text
        if name in MODEL_FIELDS:
            model[name] = value
        elif name in RECIPE_FIELDS:
            if problem := field_problem(name, value):
                raise UsageError(f"--set {pair}: {problem}")
            recipe[name] = value
        else:
            raise UsageError(f"--set {pair}: {_other_name(name, text, options)}")
    return model, recipe


def _other_name(name: str, text: str, options: Collection[str]) -> str:
    """What to write in the place of a field that is neither the model's nor the recipe's."""
    word = name.lower().replace("-", "_")
    if word in {*options, "preset", "size", "compile"}:
        return f"it has an option of its own, --{word.replace('_', '-')} {text}"
    fields = sorted(MODEL_FIELDS | RECIPE_FIELDS)
    near = difflib.get_close_matches(word, fields, n=1)
    known = f"did you mean {near[0]}={text}?" if near else f"there are {', '.join(fields)}"
    return f"there is no field {name!r}; {known}"


def quiet_compiler() -> None:
    """Hide what torch.compile says that a user cannot mend."""
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.")
    warnings.filterwarnings("ignore", "TensorFloat32 tensor cores")  # advice to use it


def new_settings(request: Request, note: Note, device: str = "cpu") -> TrainSettings:
    """The settings of a new run."""
    fields = request.fields
    if not fields["data"]:
        raise UsageError("--data is needed: a folder of images, or 'synthetic'")
    if request.warm_restart:
        raise UsageError("--warm-restart is for a run that goes on: it needs --resume")
    of_model, of_recipe = parse_overrides(request.overrides, fields)
    fields = {**fields, "data": absolute(fields["data"]), "ema": fields["ema"] or None}
    if fields["init"] is None:
        model = model_config(request.preset, request.size, **of_model)
    else:
        path = find_model(fields["init"])
        fields["init"] = absolute_model(fields["init"])
        model, _ = read_metadata(path)
        fields["init_sha256"] = files.sha256(path)
        if of_model or request.given & {"preset", "size"}:
            raise UsageError(
                f"--init {fields['init']} decides the model; leave out --preset, --size and the "
                "model's fields of --set"
            )
        note(f"first weights: {path}")
    settings = train_settings(model, **fields).changed(**of_recipe)
    long = fields["steps"] >= COMPILES_FROM
    return settings.changed(compile=compiles(request.compile, long, device, note))


def absolute(data: str) -> str:
    """What --data names, wherever a later command is started."""
    if data == SYNTHETIC:
        return data
    return os.path.abspath(data)


def absolute_model(name: str) -> str:
    """What --init names, wherever a later command is started."""
    return name if name in shipped.names() else os.path.abspath(name)


def compiles(asked: str, worth_it: bool, device: str, note: Note) -> bool:
    """Whether to use torch.compile, for "auto", "on" or "off"; "auto" does if it is ``worth_it``.

    Raises:
        BackendError: --compile on, and it does not work on the device.
    """
    if asked == "off" or (asked == "auto" and not worth_it):
        return False
    problem = compile_problem(device)
    if problem is None:
        return True
    if asked == "on":
        raise BackendError(f"{problem}; --compile off trains without it, which is slower")
    note(f"{problem}; training without it, which is slower")
    return False


def resumed_settings(run: Run, request: Request, note: Note, device: str = "cpu") -> TrainSettings:
    """A run's own settings, if what is asked for agrees.

    The path of the data, the steps, and whether to compile may differ.
    """
    settings = read_settings(run)
    if settings.distilled is not None:
        raise UsageError(f"{run.path} was distilled; `lutdeploy distill --resume` continues it")
    values = json.loads(json.dumps(msgspec.to_builtins(settings)))
    of_model, of_recipe = parse_overrides(request.overrides, request.fields)
    of_preset = PRESETS[request.preset] if "preset" in request.given else {}
    of_size = SIZES[request.size] if "size" in request.given else {}
    model = {**of_preset, **of_size, **of_model}
    asked = [(name, value, values["model"].get(name)) for name, value in model.items()]
    asked += [(name, value, values[name]) for name, value in of_recipe.items()]
    given = {name: request.fields[name] for name in request.fields if name in request.given}
    data = absolute(given.pop("data")) if "data" in given else settings.data
    steps = given.pop("steps", settings.steps)
    if given.get("init") and values["init"]:
        given["init"], values["init"] = map(absolute_model, (given["init"], values["init"]))
    for name, value in given.items():
        plain = list(value) if isinstance(value, tuple) else value
        asked.append((f"--{name.replace('_', '-')}", plain, values[name]))
    for name, value, held in asked:
        if value != held:
            raise UsageError(f"{name} {value}: {run.path} was started with {held}")
    reached = read_position(run).step if run.training_state.is_file() else 0
    compiled = compiles(request.compile, settings.compile, device, note)
    settings = msgspec.structs.replace(settings, data=data, compile=compiled)
    return extended(settings, steps, reached, request.warm_restart, note)


def require_same_images(run: Run, data: ImageSet, source: str, note: Note) -> None:
    """Refuse other images, or another order, than those of the run that goes on.

    What is held out follows from their order: some that was trained on would be held out.
    """
    if not run.images.is_file():
        note(
            f"warning: an earlier version began {run.path} and noted no images: only their number "
            "is compared"
        )
        return
    known = read_list(run.images)
    if known == data.sha256:
        return
    new, gone = (len(set(a) - set(b)) for a, b in ((data.sha256, known), (known, data.sha256)))
    how = f"{new} are new and {gone} are gone" if new or gone else "they are in another order"
    raise UsageError(
        f"{source} holds {len(data.sha256)} images, {run.path} was trained on {len(known)}: {how} "
        f"({run.images.name} lists them). A resumed run needs the same files in the same order, "
        f"which --data may find elsewhere; `--init {run.path} --out …` begins a new run with others"
    )


def extended(
    settings: TrainSettings, steps: int, reached: int, warm_restart: bool, note: Note
) -> TrainSettings:
    """A run's settings with another last step; says what the learning rate does.

    By default the rate goes on as in a run that had this length from the beginning, which is a
    jump where the run had nearly ended. A warm restart (Loshchilov & Hutter 2017) goes through
    warm-up and decay again, over the steps that are left after those ``reached``. Asked for again
    at the same length, as by a command repeated after a kill, it changes nothing.
    """
    longer = steps > settings.steps
    if warm_restart and not settings.cosine:
        raise UsageError("--warm-restart needs a rate that falls; this run's is constant")
    if warm_restart and not longer and not settings.restart:
        raise UsageError(f"--warm-restart needs --steps beyond the run's {settings.steps}")
    restart = reached if warm_restart and longer else settings.restart
    changed = msgspec.structs.replace(settings, steps=steps, restart=restart)
    before, after = settings.learning_rate(reached), changed.learning_rate(reached)
    if before != after and reached < steps:
        how = f"the cosine decay now ends at step {steps}"
        if restart != settings.restart:
            how = f"warm-up and cosine decay begin again and end at step {steps}"
        elif longer:
            how += "; --warm-restart begins a new one instead"
        note(
            f"learning rate: {after:.3g} at step {reached + 1}, where the run of "
            f"{settings.steps} steps had {before:.3g}; {how}"
        )
    return changed


def describe(
    settings: TrainSettings,
    data: ImageSet,
    processes: Processes,
    bf16_speedup: Callable[[], float],
    note: Note,
) -> None:
    """Say what is trained on what, which files were skipped, and where bfloat16 does not pay.

    ``bf16_speedup`` measures the speed of bfloat16 on this CPU in multiples of float32's.
    """
    model, device = settings.model, processes.device.type
    note(
        f"data: {len(data.images)} images, {len(data.skipped)} unreadable; "
        f"model: {model.preset()}, width {model.width}, depth {model.depth}; "
        f"device: {processes.device}"
        + (f", {processes.count} processes" if processes.count > 1 else "")
        + ("; compiling, which takes a minute" if settings.compile else "")
    )
    for line in data.remarks:
        note(f"  {line}")
    for line in data.skipped[:NAMED_FILES]:
        note(f"  skipped {line}")
    if len(data.skipped) > NAMED_FILES:
        note(f"  … and {len(data.skipped) - NAMED_FILES} more")
    if settings.precision == "bf16" and device == "cpu" and (speedup := bf16_speedup()) < 1:
        note(
            f"warning: this CPU multiplies bfloat16 at {speedup:.2g} × the speed of float32; "
            "--precision fp32 trains faster here"
        )


def peak_of(
    processes: Processes, precision: str, matmul_peak: Callable[[str, str], float]
) -> float | None:
    """FLOP/s of matrix products, all processes together.

    None where they share a CPU, and on a device that ``matmul_peak`` cannot time. It measures
    the peak for one process, from device and precision.
    """
    kind = processes.device.type
    if kind == "mps" or (kind == "cpu" and processes.count > 1):
        return None
    return processes.count * matmul_peak(str(processes.device), precision)


@contextlib.contextmanager
def stoppable(run: Run, processes: Processes) -> Iterator[list[int]]:
    """Around the loop: the signals that ask it to stop, and help with a full disk.

    A second one does not wait for the end of the step, except under torchrun, which passes each
    on twice.
    """
    requests: list[int] = []

    def stop(number: int, frame: Any) -> None:
        if requests and processes.count == 1:
            raise Terminated if number == signal.SIGTERM else KeyboardInterrupt
        requests.append(number)

    handlers = {s: signal.signal(s, stop) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield requests
    except OSError as error:
        left = "nothing was saved yet; the same command begins again"
        if run.settings.is_file():
            left = f"what was saved before is kept, and --resume --out {run.path} continues from it"
        where = error.filename or run.path
        raise LutDeployError(f"{where}: {error.strerror or error}; {left}") from error
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
