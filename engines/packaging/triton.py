"""A model repository for NVIDIA's Triton Inference Server: `lutdeploy package triton`.

    DIR/
      NAME/           SEED, INDEX → IMAGE, in batches
      NAME_png/       SEED, INDEX → IMAGE_PNG, by asking NAME
      NAME_stream/    SEED, INDEX → STEP, IMAGE after every step, as a stream
      NAME_denoiser/  for GPUs: one step, in Triton's ONNX Runtime or TensorRT, asked by the others

Each has its config.pbtxt, and those in Python triton_model.py as ``1/model.py``.

Two things about Triton's response cache, seen in 2.51, shape this. It knows a request by its inputs
alone: of two outputs in one model, a request for one would be answered with the other that was
cached, so PNGs are a model of their own. And it keeps failures, as answers without any output: only
models that fail by nothing but their own inputs are open to it, and not those that ask a GPU.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec

import lutdeploy
from lutdeploy.artefacts import hub
from lutdeploy.artefacts.manifest import MANIFEST, Manifest, read_manifest
from lutdeploy.artefacts.run import Run, locate
from lutdeploy.artefacts.tuned_steps import resolve_schedule
from lutdeploy.artefacts.verdicts import read_verdicts
from lutdeploy.device import parse_device
from lutdeploy.engines import EngineRequest, choose_export, require_same_model
from lutdeploy.engines.onnxruntime import OnnxRuntimeDenoiser
from lutdeploy.engines.packaging.folder import require_ours, write_folder
from lutdeploy.engines.packaging.model_config import InstanceGroup, ModelConfig, Tensor
from lutdeploy.engines.tensorrt.library import TENSORRT
from lutdeploy.engines.tensorrt.plan import PlanRecord, survey
from lutdeploy.errors import ParityError, UsageError
from lutdeploy.schedule import Schedule, ScheduleRequest
from lutdeploy.signature import TensorSpec, step_signature

RECORD = "package.json"
README = "README.md"
SCHEDULE = "schedule.json"
MODEL = Path(__file__).with_name("triton_model.py")
NAMES = r"[A-Za-z0-9][A-Za-z0-9_.-]*"  # of models, which are folders and parts of addresses
ONE_OF_EACH = (Tensor("SEED", "UINT64", (1,)), Tensor("INDEX", "UINT64", (1,)))
ON_CPU = InstanceGroup("CPU")  # without it, one on each GPU


@dataclass(frozen=True)
class Denoiser:
    """The model NAME_denoiser: its configuration, and its files by their names."""

    config: ModelConfig
    files: dict[str, bytes]


def package_triton(
    request: EngineRequest,
    schedule: ScheduleRequest,
    out: Path,
    name: str | None,
    note: Callable[[str], None],
) -> str:
    """Write the repository; an earlier one of this command is replaced as a whole.

    Args:
        request: a run, or an export in one; ``backend`` "onnxruntime" or "tensorrt", ``device``
            "cpu" or "cuda:N", ``batch`` the most pictures in a batch.
        schedule: the steps; the model's best fitted ones where nothing is said.
        out: the folder.
        name: of the models; by default the run's, or that of a download from the Hub.
        note: told which schedule it is.

    Returns:
        The name.

    Raises:
        UsageError: no ``step`` export or engine, a bad name, or ``out`` holds something else.
        ArtefactError: files that are not what their manifest says.
        ParityError: the export or engine has no passed verdict.
    """
    require_ours(out, RECORD)
    run, manifest = _verified_step(request)
    if name is None:
        name = hub.snapshot_name(run.path) or run.path.resolve().name
    if not re.fullmatch(NAMES, name, re.ASCII):
        raise UsageError(f"{name!r} is no name for a model in Triton; --name takes A-Z a-z 0-9 _.-")
    denoiser = _denoiser(run, manifest, request, f"{name}_denoiser")
    with OnnxRuntimeDenoiser(manifest) as engine:  # verifies the files, and that they load
        followed = resolve_schedule(schedule, request.path, engine, note)
    configs = _python_configs(name, manifest, followed, request.batch or 64, denoiser)
    contents = {README: _readme(name, manifest, followed, denoiser).encode()}
    for config in configs:
        contents[f"{config.name}/1/model.py"] = MODEL.read_bytes()
        data = msgspec.json.format(msgspec.json.encode(followed), indent=1) + b"\n"
        contents[f"{config.name}/1/{SCHEDULE}"] = data
        if denoiser is None and config.parameters["makes"] != "png":
            for file in (*manifest.files, MANIFEST):
                data = (manifest.folder / file).read_bytes()
                contents[f"{config.name}/1/{manifest.name}/{file}"] = data
    if denoiser is not None:
        configs.append(denoiser.config)
        for file, data in denoiser.files.items():
            contents[f"{denoiser.config.name}/1/{file}"] = data
    for config in configs:
        contents[f"{config.name}/config.pbtxt"] = config.text().encode()
    write_folder(out, RECORD, {"lutdeploy": lutdeploy.__version__, "name": name}, contents)
    return name


def _verified_step(request: EngineRequest) -> tuple[Run, Manifest]:
    """The run, and its ``step`` export that is asked for, else the newest one that is verified."""
    located = locate(request.path)
    run = located.run
    if run is None:
        raise UsageError(
            f"{request.path} lies in no run folder, where the verdicts on its exports are"
        )
    folder = choose_export(located, request.export)
    if located.export is None and request.export is None:
        steps = (export for export in run.exports() if read_manifest(export).graph == "step")
        folder = next(steps, None)
    if folder is None:
        raise UsageError(f"{run.path} has no step export; run `lutdeploy export {run.path}` first")
    manifest = read_manifest(folder)
    if manifest.graph != "step":
        raise UsageError(
            f"{folder} is a {manifest.graph} export; Triton needs a step export, which follows any "
            "schedule and shows its steps"
        )
    require_same_model(manifest, located.model)
    verdicts = [
        verdict
        for verdict in read_verdicts(run)
        if verdict.engine_sha256 == manifest.weights_sha256
        and verdict.backend == OnnxRuntimeDenoiser.backend
    ]
    if not verdicts or not all(verdict.passed for verdict in verdicts):
        what = "failed parity" if verdicts else "has no verdict"
        raise ParityError(
            f"export {manifest.name} {what}; `lutdeploy parity {run.path} --backend onnxruntime "
            f"--export {manifest.name}` judges it, and what has not passed is not packaged"
        )
    return run, manifest


def _denoiser(run: Run, manifest: Manifest, request: EngineRequest, name: str) -> Denoiser | None:
    """NAME_denoiser; None where ONNX Runtime computes on the CPU, within the Python models."""
    tensorrt = request.backend == TENSORRT
    device = parse_device(request.device or ("cuda" if tensorrt else "cpu"))
    if device.kind == "cpu" and not tensorrt:
        return None
    if device.kind != "cuda":
        raise UsageError(
            f"--device {device}: Triton computes with {request.backend} on "
            f"{'cuda' if tensorrt else 'cpu or cuda'}"
        )
    if manifest.precision == "int8":
        raise UsageError(f"{manifest.name} is an int8 export, which is for CPUs, not {device}")
    (graph,) = manifest.graphs
    signature = step_signature(manifest.config)
    config = ModelConfig(
        name=name,
        platform="onnxruntime_onnx",
        max_batch_size=request.batch or 64,
        inputs=[_tensor(spec) for spec in signature.inputs],
        outputs=[_tensor(spec) for spec in signature.outputs],
        instances=InstanceGroup("GPU", (device.index,)),
        file=graph,
        parameters=_facts(manifest),
    )
    if not tensorrt:
        return Denoiser(
            config, {file: (manifest.folder / file).read_bytes() for file in manifest.files}
        )
    record = _engine(run, manifest)
    built = {key: record.fields[key] for key in ("tensorrt", "compute_capability")}
    config = replace(
        config,
        platform="tensorrt_plan",
        max_batch_size=min(config.max_batch_size, record.profiles[0].max),
        file="",
        parameters={**config.parameters, **built, "plan_sha256": record.plan_sha256},
    )
    return Denoiser(config, {"model.plan": record.read_plan()})


def _tensor(spec: TensorSpec) -> Tensor:
    return Tensor(spec.name, "FP32", spec.row or (1,), scalar=not spec.row)


def _engine(run: Run, manifest: Manifest) -> PlanRecord:
    """The newest TensorRT engine of an export that has passed its check and takes any batch."""
    usable = [
        state.record
        for state in survey(run, {})
        if state.record is not None
        and state.record.backend == TENSORRT
        and state.record.export == manifest.name
        and not state.reasons
        and state.outcome == "passed"
        and [profile.min for profile in state.record.profiles] == [1]
    ]
    if not usable:
        raise UsageError(
            f"export {manifest.name} has no checked TensorRT engine with one profile from batch 1; "
            f"run `lutdeploy build {run.path} --export {manifest.name} --batch 1:64:256` first"
        )
    return max(usable, key=lambda record: record.created)


def _facts(manifest: Manifest) -> dict[str, str]:
    """What a model is made of, for its parameters."""
    return {
        "lutdeploy": lutdeploy.__version__,
        "model_sha256": manifest.source_sha256,
        "export": manifest.name,
        "export_sha256": manifest.weights_sha256,
    }


def _python_configs(
    name: str, manifest: Manifest, schedule: Schedule, batch: int, denoiser: Denoiser | None
) -> list[ModelConfig]:
    """NAME, NAME_png and NAME_stream; ``batch`` is the most pictures at once."""
    if denoiser is not None:
        batch = min(batch, denoiser.config.max_batch_size)
    facts = {**_facts(manifest), "schedule": schedule.describe()}
    computes = facts | ({"denoiser": denoiser.config.name} if denoiser else {})
    channels, height, width = manifest.config.image_shape
    image = Tensor("IMAGE", "UINT8", (height, width, channels))
    pictures = ModelConfig(
        name=name,
        backend="python",
        max_batch_size=batch,
        inputs=ONE_OF_EACH,
        outputs=[image],
        instances=ON_CPU,
        dynamic_batching=True,
        response_cache=denoiser is None,
        parameters={**computes, "makes": "pictures"},
    )
    png = replace(
        pictures,
        name=f"{name}_png",
        outputs=[Tensor("IMAGE_PNG", "STRING", (1,))],
        parameters={**facts, "makes": "png", "pictures": name},
    )
    stream = replace(
        pictures,
        name=f"{name}_stream",
        max_batch_size=1,
        outputs=[Tensor("STEP", "UINT32", (1,)), image],
        dynamic_batching=False,
        decoupled=True,
        response_cache=False,
        parameters={**computes, "makes": "stream"},
    )
    return [pictures, png, stream]


def _readme(name: str, manifest: Manifest, schedule: Schedule, denoiser: Denoiser | None) -> str:
    """How to start a server on the repository and ask it."""
    gpus, needs = "", "The server's Python needs lutdeploy"
    if denoiser is not None:
        told = denoiser.config.parameters
        gpus, needs = "--gpus all ", "The server needs lutdeploy in its Python, and a GPU"
        if "tensorrt" in told:
            needs += (
                f" of compute capability {told['compute_capability']} with "
                f"TensorRT {told['tensorrt']}, which {denoiser.config.name} was built for"
            )
    return f"""\
# {name}

A model repository for Triton, written by lutdeploy {lutdeploy.__version__}: {manifest.name} of
model {manifest.source_sha256[:12]}…, {schedule.describe()}. {needs}.

```sh
docker run {gpus}--rm --shm-size 1g -p 8000:8000 -p 8001:8001 -v "$PWD:/models:ro" \\
  nvcr.io/nvidia/tritonserver:25.06-py3 sh -c 'pip install lutdeploy "numpy<2" &&
  tritonserver --model-repository /models --cache-config local,size=268435456 \\
  --disable-auto-complete-config'
```

Picture INDEX of SEED as a PNG:

```sh
curl -sS localhost:8000/v2/models/{name}_png/infer -D headers -o answer -d '{{
  "inputs": [{{"name": "SEED", "datatype": "UINT64", "shape": [1, 1], "data": [0]}},
             {{"name": "INDEX", "datatype": "UINT64", "shape": [1, 1], "data": [0]}}],
  "outputs": [{{"name": "IMAGE_PNG", "parameters": {{"binary_data": true}}}}]}}'
JSON=$(grep -i inference-header-content-length headers | tr -dc 0-9)
tail -c +$((JSON + 5)) answer > picture.png  # after the JSON and the PNG's length in four bytes
```
"""
