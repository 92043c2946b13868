"""A model as a static web page: `lutdeploy package web`.

The page's own files are those of ``page/``, as they are. ``page.json`` tells them all that is about
the model: the engines in the order in which a browser tries them, every file's size and hash, the
schedules as rows of coefficients. The model's files are those of verified exports, byte for byte.
"""

from __future__ import annotations

import base64
import hashlib
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import lutdeploy
from lutdeploy import images
from lutdeploy.artefacts import files, sample_folder, shipped
from lutdeploy.artefacts.manifest import Manifest
from lutdeploy.artefacts.picture_text import text_before_seed
from lutdeploy.artefacts.run import Run
from lutdeploy.artefacts.tuned_steps import usable_schedules
from lutdeploy.config import ModelConfig
from lutdeploy.engines.onnxruntime import OnnxRuntimeDenoiser
from lutdeploy.engines.packaging.exports import verified_step
from lutdeploy.engines.packaging.folder import require_ours, write_folder
from lutdeploy.errors import ArtefactError, BackendError, ParityError, UsageError, needing
from lutdeploy.sampling import State, batch_noise, trajectory
from lutdeploy.schedule import DISTILLED, FITTED, Schedule, solver_schedule

PAGE = Path(__file__).parent / "page"
FACTS = "page.json"
LUT = "lut.png"
README = "README.txt"
RUNTIME_FOLDER = "runtime"

RUNTIME_VERSION = "1.30.0"
CDN = f"https://cdn.jsdelivr.net/npm/onnxruntime-web@{RUNTIME_VERSION}/dist/"
# Size and integrity of the files of onnxruntime-web that the page uses.
RUNTIME = {
    "ort.wasm.bundle.min.mjs": (
        73054,
        "sha384-PLWz+nHEVHpjwBsO0YVdvQj6n5814Iv8E3b8FG0Rp/uIAtjFMCKOpP66iPzedrIG",
    ),
    "ort-wasm-simd-threaded.wasm": (
        14239897,
        "sha384-vjBJ1z7qrhkTyYsNqKeF6c7N+nOJSU94czEo+tvZcu8G75JparGq9kB+kTnEUNVM",
    ),
    "ort.webgpu.bundle.min.mjs": (
        117732,
        "sha384-1ntMeyj+z5diX6vBR5h+zlJBPc4iNvhCxE6nlammh8daBYcLBZkzrwDkuJjhwI+f",
    ),
    "ort-wasm-simd-threaded.asyncify.wasm": (
        26781914,
        "sha384-EPVDLTxuO663dkZO/pcKJF6vOyyfq/5z9FY1oksN0UWFX2ABH4wDDZQHeNoUleWR",
    ),
}


@dataclass(frozen=True)
class WebEngine:
    """A way to run the model in a browser: what computes, what it computes with, what it needs."""

    backend: str  # an execution provider of onnxruntime-web
    precision: str  # of the ``step`` export
    features: tuple[str, ...]  # of the WebGPU adapter
    script: str
    wasm: str


# In the order in which a browser tries them.
ENGINES = (
    WebEngine(
        "webgpu",
        "fp16",
        ("shader-f16",),
        "ort.webgpu.bundle.min.mjs",
        "ort-wasm-simd-threaded.asyncify.wasm",
    ),
    WebEngine("wasm", "fp32", (), "ort.wasm.bundle.min.mjs", "ort-wasm-simd-threaded.wasm"),
)

# Offered beside the model's fitted schedules.
REFERENCE = ("euler", 64)
FORMULAS = (("dpmpp-2m", 16), ("dpmpp-2m", 32), REFERENCE)
SOLVER_NAMES = {
    "euler": "Euler",
    "dpmpp-2m": "DPM-Solver++(2M)",
    "dpmpp-3m": "DPM-Solver++(3M)",
}


def package_web(run: Run, out: Path, runtime: Path | None, note: Callable[[str], None]) -> int:
    """Write the page of a run's model; an earlier page of this command is replaced as a whole.

    Args:
        run: its ``step`` exports are used, and made where there are none.
        out: the folder.
        runtime: where the files of onnxruntime-web are, to be copied; None leaves them to a CDN.
        note: told which exports are used, and what is left out.

    Returns:
        The bytes of the folder.

    Raises:
        UsageError: ``out`` holds something else, or a model whose images are no pictures.
        ArtefactError: a file of the runtime that is missing or another one.
        ParityError: the float32 export is not what PyTorch computes.
    """
    out = Path(os.path.abspath(out))
    require_ours(out, FACTS)
    copied = read_runtime(runtime) if runtime is not None else {}
    exports = _exports(run, note)
    float32 = exports["fp32"]
    if float32.config.channels not in images.PNG_COLOURS:
        raise UsageError(f"images of {float32.config.channels} channels are no pictures to show")
    schedules = offered(usable_schedules(run.path, float32.source_sha256, note))
    states = _example(float32, schedules[0])
    contents = {path.name: path.read_bytes() for path in sorted(PAGE.iterdir())}
    contents |= {f"{RUNTIME_FOLDER}/{name}": data for name, data in copied.items()}
    for manifest in exports.values():
        for name in manifest.files:
            contents[f"{manifest.name}/{name}"] = (manifest.folder / name).read_bytes()
    contents[LUT] = images.encode_png(_lut_picture(run, float32.config, schedules[0], states))
    contents[README] = readme(run.path.resolve().name, bool(copied)).encode()
    facts = page_facts(run, exports, schedules, states, contents)
    write_folder(out, FACTS, facts, contents)
    return sum(path.stat().st_size for path in out.rglob("*") if path.is_file())


def _exports(run: Run, note: Callable[[str], None]) -> dict[str, Manifest]:
    """The exports by precision. Without a float16 one that passes, WebAssembly has to do."""
    exports = {"fp32": verified_step(run, "fp32", note)}
    try:
        with needing("a float16 export, which is not there yet,"):
            exports["fp16"] = verified_step(run, "fp16", note)
    except (BackendError, ParityError) as error:
        note(f"warning: {error}; the page computes in WebAssembly alone")
    return exports


def offered(fitted: Sequence[Schedule]) -> list[Schedule]:
    """The schedules to choose from. The first is the one that `lutdeploy sample` follows."""
    if fitted and fitted[0].solver == DISTILLED:
        return [*fitted]
    formulas = [solver_schedule(solver, steps) for solver, steps in FORMULAS]
    if not fitted:
        formulas.sort(key=lambda schedule: schedule.describe() != "-".join(map(str, REFERENCE)))
    return [*fitted, *formulas]


def _example(manifest: Manifest, schedule: Schedule) -> list[State]:
    """The trajectory of picture 0 of seed 0, in ONNX Runtime."""
    with OnnxRuntimeDenoiser(manifest) as engine:
        noise = batch_noise(0, [0], manifest.config.image_shape)
        return list(trajectory(engine, noise, schedule))


def _lut_picture(
    run: Run, config: ModelConfig, schedule: Schedule, states: Sequence[State]
) -> images.Pixels:
    """The LUT as tiles; a dynamic one as computed for the example at the step nearest to t = ½."""
    if config.lut == "static":
        from safetensors import safe_open

        with safe_open(run.model, "np") as file:
            entries: NDArray[np.float32] = file.get_tensor("lut.entries").astype(np.float32)
        return images.lut_sheet(entries, factor=4)
    import torch

    from lutdeploy.artefacts.checkpoint import load_model

    k = min(range(schedule.steps), key=lambda k: abs(schedule.rows[k].t - 0.5))
    at = torch.tensor([schedule.rows[k].t], dtype=torch.float32)
    patches = load_model(run.model).lut_patches(torch.from_numpy(states[k].x), at)
    return images.lut_sheet(patches.numpy(), factor=4)


def page_facts(
    run: Run,
    exports: dict[str, Manifest],
    schedules: Sequence[Schedule],
    states: Sequence[State],
    contents: dict[str, bytes],
) -> dict[str, Any]:
    """What ``page.json`` holds besides the list of files."""
    from safetensors import safe_open

    with safe_open(run.model, "np") as file:
        shapes = [file.get_slice(name).get_shape() for name in file.keys()]
    config, model = exports["fp32"].config, exports["fp32"].source_sha256
    name = run.path.resolve().name
    is_shipped = name in shipped.names() and files.sha256(shipped.model_path(name)) == model
    check = images.to_uint8(states[-1].x[0])
    return {
        "lutdeploy": lutdeploy.__version__,
        "runtime": RUNTIME_VERSION,
        "model": {"name": name, "sha256": model, "parameters": sum(map(math.prod, shapes))},
        "source": f"--model {name}" if is_shipped else f"runs/{name}",
        "config": config.to_dict(),
        "engines": [
            _engine_facts(engine, exports[engine.precision], contents)
            for engine in ENGINES
            if engine.precision in exports
        ],
        "schedules": [
            {**schedule_facts(schedule), "text": _text_before_seed(model, schedule)}
            for schedule in schedules
        ],
        # Picture 0 of seed 0 by the first schedule, uint8 [S, S, C]: what a GPU must paint first.
        "check": base64.b64encode(check.tobytes()).decode(),
    }


def _engine_facts(
    engine: WebEngine, manifest: Manifest, contents: dict[str, bytes]
) -> dict[str, Any]:
    (graph,) = manifest.graphs
    (weights,) = set(manifest.files) - {graph}

    def ours(name: str) -> dict[str, Any]:
        data = contents[name]
        return {"url": name, "bytes": len(data), "integrity": integrity(data)}

    def runtime(name: str) -> dict[str, Any]:
        size, told = RUNTIME[name]
        place = f"{RUNTIME_FOLDER}/{name}"
        return {"url": place if place in contents else CDN + name, "bytes": size, "integrity": told}

    return {
        "backend": engine.backend,
        "precision": engine.precision,
        "features": engine.features,
        "export_sha256": manifest.weights_sha256,
        "files": {
            "script": runtime(engine.script),
            "wasm": runtime(engine.wasm),
            "graph": ours(f"{manifest.name}/{graph}"),
            "weights": ours(f"{manifest.name}/{weights}"),
        },
    }


def _text_before_seed(model_sha256: str, schedule: Schedule) -> str:
    """What the PNGs say that the page saves, as those of `lutdeploy sample` do."""
    settings = sample_folder.settings({"model_sha256": model_sha256}, schedule, 0, "png")
    return text_before_seed(settings)


def schedule_facts(schedule: Schedule) -> dict[str, Any]:
    """A schedule for sampler.js, its name in an address, and its words for people."""
    told = f"{schedule.steps} steps"
    options = f"--solver {schedule.solver} --steps {schedule.steps}"
    if schedule.solver == FITTED:
        label = f"{told}, fitted to this model"
    elif schedule.solver == DISTILLED:
        label, options = f"{told}, the model's only ones", ""
    else:
        reference = ", the reference" if (schedule.solver, schedule.steps) == REFERENCE else ""
        label = f"{told}, {SOLVER_NAMES[schedule.solver]}{reference}"
    return {
        "name": schedule.describe(),
        "label": label,
        "options": options,
        "rows": [[row.t, row.a, row.b, row.c, row.history_ratio] for row in schedule.rows],
    }


def integrity(data: bytes) -> str:
    """A file's hash as `Subresource Integrity <https://www.w3.org/TR/SRI/>`_ writes it."""
    return "sha384-" + base64.b64encode(hashlib.sha384(data).digest()).decode()


def read_runtime(folder: Path) -> dict[str, bytes]:
    """The files of onnxruntime-web that the page needs, from a folder that has them.

    Args:
        folder: of an unpacked npm package, or its ``dist``.

    Raises:
        UsageError: no such folder.
        ArtefactError: a file is missing, or is not that of the pinned version.
    """
    if not folder.is_dir():
        raise UsageError(f"{folder}: no such folder; --runtime names one of onnxruntime-web")
    place = folder / "dist" if (folder / "dist").is_dir() else folder
    remedy = f"`npm pack onnxruntime-web@{RUNTIME_VERSION}` gets the right ones"
    found = {}
    for name, (_, told) in RUNTIME.items():
        path = place / name
        if not path.is_file():
            raise ArtefactError(f"{path} is missing; {remedy}")
        found[name] = path.read_bytes()
        if integrity(found[name]) != told:
            raise ArtefactError(
                f"{path} has another hash than that of onnxruntime-web {RUNTIME_VERSION}; {remedy}"
            )
    return found


def readme(name: str, offline: bool) -> str:
    """How to serve the folder."""
    runtime = f"ONNX Runtime Web {RUNTIME_VERSION}"
    where = "comes from this folder" if offline else f"comes from {CDN}"
    return (
        f"{name}: a page that makes the model's pictures in the browser.\n\n"
        "    python -m http.server 8000\n\n"
        "in this folder serves it at http://localhost:8000/. Any other web server does as well.\n"
        f"{runtime} {where}; the browser holds it against its hash.\n"
    )
