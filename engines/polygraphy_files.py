"""Parity's cases in Polygraphy's files, so that they can be replayed where TensorRT is.

`polygraphy run` then needs no lutdeploy: it runs the graphs in TensorRT or ONNX Runtime and holds
their outputs against those of PyTorch in float32.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lutdeploy.artefacts import files
from lutdeploy.artefacts.manifest import Manifest
from lutdeploy.engines.tensorrt.library import MODULES, RTX
from lutdeploy.errors import BackendError, first_line
from lutdeploy.model import LutTransformer
from lutdeploy.parity import StepCase, limits_of, narrow_reference, step_cases, steps_to_check
from lutdeploy.reference import TorchDenoiser
from lutdeploy.sampling import Images, trajectory
from lutdeploy.signature import Signature, graph_signature

REFERENCE = "pytorch-float32"


def save_cases(
    model: LutTransformer, manifest: Manifest, noise: Images, folder: Path, backend: str
) -> list[str]:
    """Write ``NAME.inputs.json`` and ``NAME.outputs.json`` for each graph of an export.

    Args:
        model: what is right, in float32; its own half precision sets the tolerances.
        noise: [n, C, S, S].
        backend: which runtime the commands name: one of the TensorRTs, else ONNX Runtime.

    Returns:
        A command for each graph. A tolerance holds for all cases of an output, so it is the
        smallest of their limits.

    Raises:
        BackendError: Polygraphy is not installed.
    """
    try:
        from polygraphy.comparator import RunResults
        from polygraphy.json import save_json
        from polygraphy.logger import G_LOGGER
    except ImportError as error:
        raise BackendError(
            f"Polygraphy does not load here ({first_line(error)}); pip install polygraphy"
        ) from error
    files.output_folder(folder)
    commands = []
    for k, graph in enumerate(manifest.graphs):
        signature = graph_signature(manifest.config, manifest.graph, manifest.schedule, k)
        feeds, outputs, limits = _cases(model, manifest, noise, k, signature)
        stem = folder / Path(graph).stem
        inputs_file, outputs_file = f"{stem}.inputs.json", f"{stem}.outputs.json"
        results = RunResults()
        results.add(outputs, runner_name=REFERENCE)
        with G_LOGGER.verbosity(G_LOGGER.ERROR):  # it announces every file
            save_json(feeds, inputs_file, "inputs")
            results.save(outputs_file)
        commands.append(
            _command(manifest.folder / graph, inputs_file, outputs_file, limits, backend)
        )
    return commands


def _cases(
    model: LutTransformer, manifest: Manifest, noise: Images, k: int, signature: Signature
) -> tuple[list[dict[str, Images]], list[dict[str, Images]], dict[str, float]]:
    """Feeds of graph ``k``, the outputs that are right, and the limit of each output."""
    reference, narrow = TorchDenoiser(model), narrow_reference(model, manifest.precision)
    schedule = manifest.schedule
    if schedule is not None and manifest.graph == "loop":
        right = [state.x for state in trajectory(reference, noise, schedule)][-1]
        cost = [s.x for s in trajectory(narrow, noise, schedule)][-1] if narrow else None
        return [{"noise": noise}], [{"image": right}], {"image": limits_of(right, cost)[0]}
    rows = steps_to_check(None) if schedule is None else [schedule.rows[k]]
    cases = list(step_cases(reference, narrow, rows, noise))
    limits = {
        spec.name: min(case.limits[spec.name] for case in cases) for spec in signature.outputs
    }
    feeds = [_feed(case, signature, len(noise)) for case in cases]
    return feeds, [{name: case.expected[name] for name in limits} for case in cases], limits


def _feed(case: StepCase, signature: Signature, count: int) -> dict[str, Images]:
    """A case as a graph's inputs."""
    row = case.row
    values = {name: np.full(count, getattr(row, name), np.float32) for name in ("t", "a", "b", "c")}
    feed = {"x": case.x, "x0_prev": case.x0_prev, **values}
    return {spec.name: np.ascontiguousarray(feed[spec.name]) for spec in signature.inputs}


def _command(graph: Path, inputs: str, outputs: str, limits: dict[str, float], backend: str) -> str:
    tolerances = [f"{name}:{limit:.3g}" for name, limit in limits.items()]
    words: Sequence[str] = (
        *("polygraphy", "run", str(graph)),
        *(("--trt", "--strongly-typed") if backend in MODULES else ("--onnxrt",)),
        *("--load-inputs", inputs, "--load-outputs", outputs),
        *("--atol", *tolerances, "--rtol", "0"),
    )
    line = shlex.join(words)
    return f"POLYGRAPHY_USE_TENSORRT_RTX=1 {line}" if backend == RTX else line
