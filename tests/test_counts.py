"""What decides the speed and does not vary with the machine: multiply-adds, bytes, memory.

The operators of every graph are counted in test_export.
"""

from __future__ import annotations

import math
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest

from lutdeploy.artefacts import sample_folder
from lutdeploy.artefacts.manifest import read_manifest
from lutdeploy.config import ModelConfig
from lutdeploy.sampling import Images, batch_noise, trajectory
from lutdeploy.schedule import Schedule, Step, solver_schedule

Exported = Callable[..., Path]
TIME = ("time/", "time.")  # the time branch: once per step, left out of the formula


def multiply_adds(graph: onnx.GraphProto) -> int:
    """Of all matmuls and convolutions of a graph at batch 1, from the shapes that ONNX infers."""
    shapes = {
        value.name: [d.dim_value or 1 for d in value.type.tensor_type.shape.dim]
        for value in (*graph.input, *graph.output, *graph.value_info)
    } | {tensor.name: list(tensor.dims) for tensor in graph.initializer}
    total = 0
    for node in graph.node:
        out = shapes.get(node.output[0], [])
        if node.op_type == "MatMul":
            total += math.prod(out) * shapes[node.input[0]][-1]
        elif node.op_type == "Conv":
            total += math.prod(out) * math.prod(shapes[node.input[1]][1:])
        else:
            assert node.op_type != "Gemm" or node.name.startswith(TIME), node.name
    return total


@pytest.mark.parametrize("graph", ["step", "loop"])
def test_a_graph_multiplies_what_the_formula_says(
    exported: Exported, preset: str, graph: str
) -> None:
    folder = exported(preset, graph)
    manifest = read_manifest(folder)
    model = onnx.load(folder / manifest.graphs[0])
    for value in (*model.graph.input, *model.graph.output):  # one image
        value.type.tensor_type.shape.dim[0].dim_value = 1
    del model.graph.value_info[:]
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)
    steps = manifest.schedule.steps if manifest.schedule else 1
    assert multiply_adds(inferred.graph) == steps * manifest.config.multiply_adds()


def weight_bytes(config: ModelConfig, body: int, matmuls: int) -> int:
    """Bytes of the network's tensors of 1 KiB and more, which the weights file holds.

    Args:
        config: of a static model.
        body: bytes of a number in the body: 4 or 2.
        matmuls: bytes of a number in the blocks' matrices: as ``body``, or 1.
    """
    d, n, k = config.width, config.image_tokens, config.entries
    tensors = [(d * config.entry_values, body), (n * d, body), (n * d, body)]  # kernel, cos, sin
    tensors += [(d * 2 * config.time_frequencies, 4), (k * config.entry_values, body)]
    tensors += [(d * k, body)]
    for width in (3, 1, 2):
        tensors += config.depth * [(d * d * width, matmuls)]
    return sum(count * size for count, size in tensors if count * size >= 1024)


@pytest.mark.parametrize(
    ("precision", "body", "matmuls"), [("fp32", 4, 4), ("fp16", 2, 2), ("int8", 4, 1)]
)
def test_the_weights_take_the_bytes_of_their_precision(
    exported: Exported, precision: str, body: int, matmuls: int
) -> None:
    folder = exported(precision=precision)
    manifest = read_manifest(folder)
    graph = onnx.load(folder / manifest.graphs[0], load_external_data=False).graph
    stored = sum(
        int(entry.value)
        for tensor in graph.initializer
        if "bias" not in tensor.name and "scale" not in tensor.name
        for entry in tensor.external_data
        if entry.key == "length"
    )
    assert stored == weight_bytes(manifest.config, body, matmuls)


class Still:
    """A denoiser that computes nothing, so that what is measured is the pipeline."""

    config = ModelConfig(image_size=16, width=64, depth=1)
    schedule: Schedule | None = None
    whole_trajectory = False

    def predict_x0(self, x: Images, t: object) -> Images:
        raise NotImplementedError

    def step(self, x: Images, row: Step, x0_prev: Images | None) -> tuple[Images, Images]:
        return x, x

    def run(self, noise: Images) -> Images:
        raise NotImplementedError


def peak_bytes(folder: Path, n: int, file_format: str) -> int:
    schedule = solver_schedule("euler", 1)
    settings = {"seed": 0, "format": file_format}
    tracemalloc.start()
    try:
        with sample_folder.open_folder(folder, settings) as opened:
            assert sum(sample_folder.fill(opened, Still(), schedule, n, 16)) == n
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("file_format", sample_folder.FORMATS)
def test_the_memory_of_sampling_does_not_grow_with_the_pictures(
    file_format: str, tmp_path: Path
) -> None:
    """What grows with them is their numbers, not their pixels."""
    peak_bytes(tmp_path / "warm", 32, file_format)  # imports, pools
    few, many = (peak_bytes(tmp_path / str(n), n, file_format) for n in (256, 3072))
    per_picture = (many - few) / (3072 - 256)
    assert per_picture < 300, "its pixels alone would be 768 bytes, its noise 3 KiB"


def test_a_step_allocates_its_results_and_no_more() -> None:
    noise = batch_noise(0, range(1024), Still.config.image_shape)
    states = trajectory(Still(), noise, solver_schedule("euler", 4))
    next(states)
    next(states)
    tracemalloc.start()
    for _ in states:
        pass
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < noise.nbytes / 4
