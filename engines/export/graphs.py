"""From a PyTorch model to ONNX, in three kinds of graph.

``step``      one step of any schedule: x, t, a, b, c, x0_prev → x_next, x0
``per-step``  a graph for each step of one schedule, with t and the coefficients inside
``loop``      a whole schedule in one graph: noise → image

All kinds share one network, :class:`lutdeploy.fused.FusedNetwork`, traced by torch.export. The
graphs of an export share one external weights file.
"""

from __future__ import annotations

import datetime
import hashlib
import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxscript
import torch
from torch import Tensor, nn

import lutdeploy
from lutdeploy.artefacts import files
from lutdeploy.artefacts.manifest import Manifest, hash_files
from lutdeploy.artefacts.quantization_record import Quantization
from lutdeploy.artefacts.run import Run
from lutdeploy.engines.export.metadata import describe_graphs
from lutdeploy.errors import ArtefactError, ConfigError, first_line
from lutdeploy.fused import FixedStepGraph, StepGraph, TimeBias
from lutdeploy.model import LutTransformer
from lutdeploy.schedule import Schedule, Step
from lutdeploy.signature import (
    BATCH,
    GRAPHS,
    PRECISIONS,
    Signature,
    fixed_step_signature,
    loop_signature,
    step_signature,
)

OPSET = 20
WEIGHTS = "weights.bin"
ALIGNMENT = 4096  # of each tensor in the weights file, so that it can be mapped

# Initializers of the "per-step" graphs that differ from step to step.
STEP_VALUES = ("time_bias", "a", "b", "c")

# What stays float32 in an fp16 export. A test reads the dtypes back from the graph.
ISLANDS = (
    "graph inputs and outputs",
    "time: embedding and projection",
    "LayerNormalization",
    "head: tanh or softmax",
    "lut: outer products of a dynamic LUT",
    "sampler: a·x + b·x0 + c·x0_prev",
)
# What stays float32 in an int8 export, besides the matmuls that its manifest names.
INT8_ISLANDS = (
    *(island for island in ISLANDS if not island.startswith(("head", "lut"))),
    "lut: entries, outer products of a dynamic LUT, product with the weights",
    "stem: patch convolution",
    "attention: scores and weighted values",
    "head: product, tanh or softmax",
)

OnPhase = Callable[[str], None]  # told what is done now


@dataclass(frozen=True)
class ExportPlan:
    """What to export. Impossible combinations raise a ConfigError."""

    graph: str = "step"
    precision: str = "fp32"
    schedule: Schedule | None = None  # None for "step", which follows any schedule

    def __post_init__(self) -> None:
        if self.graph not in GRAPHS:
            raise ConfigError(f"no graph kind {self.graph!r}; there are {', '.join(GRAPHS)}")
        if self.precision not in PRECISIONS:
            raise ConfigError(f"no precision {self.precision!r}; there are {', '.join(PRECISIONS)}")
        if self.precision == "int8" and self.graph != "step":
            raise ConfigError(f"int8 is for graph step, which follows any solver, not {self.graph}")
        if (self.schedule is None) != (self.graph == "step"):
            raise ConfigError(
                f"graph {self.graph} {'needs' if self.schedule is None else 'has no'} steps"
            )

    @property
    def name(self) -> str:
        """The export folder's name: ``step-fp16``, ``per-step-fp16-euler-64``, …"""
        schedule = f"-{self.schedule.describe()}" if self.schedule else ""
        return f"{self.graph}-{self.precision}{schedule}"


def _trace(module: nn.Module, signature: Signature, constants: dict[str, Tensor]) -> ir.Model:
    """Export a module to ONNX. Only the batch axis is dynamic.

    Args:
        module: takes the inputs of the signature and ``constants`` as keyword arguments.
        signature: names and shapes of inputs and outputs.
        constants: arguments that become initializers of the graph, and their values.
    """
    batch = torch.export.Dim(BATCH)
    inputs = {spec.name: torch.rand(2, *spec.row) for spec in signature.inputs}
    axes: dict[str, Any] = {name: {0: batch} for name in inputs} | dict.fromkeys(constants)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations inside the exporter itself
        logger = logging.getLogger("torch.onnx._internal.exporter._registration")
        level = logger.level
        logger.setLevel(logging.ERROR)  # it warns of every optional package that is absent
        try:
            program = torch.onnx.export(
                module.eval(),
                (),
                kwargs={**inputs, **constants},
                dynamo=True,
                opset_version=OPSET,
                output_names=[spec.name for spec in signature.outputs],
                dynamic_shapes=axes,
                verbose=False,
            )
        finally:
            logger.setLevel(level)
    if program is None:
        raise ArtefactError("the exporter returned no graph")
    model: ir.Model = program.model
    graph = model.graph
    given = {str(value.name): value for value in graph.inputs}
    for name, tensor in constants.items():
        given[name].const_value = ir.tensor(tensor.numpy(), name=name)
        graph.register_initializer(given[name])
    graph.inputs[:] = [given[spec.name] for spec in signature.inputs]
    _tidy(model, {*module.state_dict(), *constants})
    return model


def _scope(node: ir.Node) -> str:
    """The path of the module that made a node: ``blocks.3``, ``head``, …"""
    parts = node.metadata_props.get("namespace", "").split("/")  # "root: …/path: class/…/operator"
    paths = [part.split(":")[0].strip() for part in parts[1:-1]]
    deepest = paths[-1] if paths else ""
    return deepest.removeprefix("network").lstrip(".")


def _tidy(model: ir.Model, kept: set[str]) -> None:
    """Name nodes after their modules and drop what the exporter recorded about this machine.

    Args:
        model: changed in place.
        kept: names of the initializers that are weights; the others are the exporter's constants.
    """
    scope, counts, lut = "", dict[str, int](), None
    for node in model.graph:
        scope = _scope(node) or scope
        kind = f"{scope}/{node.op_type}" if scope else node.op_type
        counts[kind] = counts.get(kind, 0) + 1
        node.name = f"{kind}_{counts[kind]}"
        node.metadata_props.clear()
        if scope == "lut":  # the last output of this scope is the dynamic LUT
            lut = node.outputs[0]
        for value in node.outputs:
            value.metadata_props.clear()
            value.shape = value.shape if value.is_graph_output() else None
    if lut is not None:
        lut.name = "lut"
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
    for name, value in list(model.graph.initializers.items()):
        if name in kept:
            value.name = name.removeprefix("network.")
        elif value.const_value is not None:  # name it by its content, alike in every graph
            tensor = value.const_value
            text = f"{tensor.dtype} {tensor.shape}".encode() + tensor.tobytes()
            value.name = f"constant_{hashlib.sha256(text).hexdigest()[:12]}"
    model.graph.metadata_props.clear()
    model.metadata_props.clear()
    model.graph.name = "lutdeploy"
    model.producer_name, model.producer_version = "lutdeploy", lutdeploy.__version__


class WeightsFile:
    """The file of large tensors that all graphs of an export share."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.placed: dict[str, ir.ExternalTensor] = {}
        self.file = path.open("wb")

    def __enter__(self) -> WeightsFile:
        return self

    def __exit__(self, *exception: object) -> None:
        self.file.close()

    def move(self, model: ir.Model) -> None:
        """Move a graph's large initializers here; a name that is here already is not repeated."""
        for name, value in sorted(model.graph.initializers.items()):
            tensor = value.const_value
            if tensor is None or tensor.nbytes < 1024 or name.endswith(STEP_VALUES):
                continue
            if name not in self.placed:
                offset = -(-self.file.tell() // ALIGNMENT) * ALIGNMENT
                self.file.write(b"\0" * (offset - self.file.tell()))
                self.file.write(tensor.tobytes())
                self.placed[name] = ir.ExternalTensor(
                    self.path.name,
                    offset,
                    tensor.nbytes,
                    tensor.dtype,
                    shape=ir.Shape(tensor.shape.numpy()),
                    name=name,
                    base_dir=str(self.path.parent),
                )
            value.const_value = self.placed[name]
        self.file.flush()


def _step_values(time: TimeBias, row: Step) -> dict[str, Tensor]:
    """The values of ``STEP_VALUES`` for a step: [1, D] and [1]; c only where it is not 0."""
    with torch.no_grad():
        values = {"time_bias": time(torch.tensor([row.t], dtype=torch.float32))}
    for name in ("a", "b", "c") if row.c else ("a", "b"):
        values[name] = torch.tensor([getattr(row, name)], dtype=torch.float32)
    return values


def _compose(
    prefix: str, row: Step, x0: ir.Value, x0_prev: ir.Value, shared: dict[str, ir.Value]
) -> tuple[list[ir.Node], ir.Value]:
    """:func:`lutdeploy.sampling.history` as nodes: x0 + (d/c)·x0_prev; the nodes and their value.

    The constant d/c joins ``shared``.
    """
    floats = ir.TensorType(ir.DataType.FLOAT)
    name = f"{prefix}history_ratio"
    ratio = ir.tensor(np.array([row.history_ratio], np.float32), name=name)
    shared[name] = ir.Value(name=name, type=floats, shape=ir.Shape((1,)), const_value=ratio)
    scaled = ir.Node("", "Mul", [shared[name], x0_prev], name=f"{prefix}sampler/history_Mul")
    summed = ir.Node("", "Add", [x0, *scaled.outputs], name=f"{prefix}sampler/history_Add")
    for node in (scaled, summed):
        node.outputs[0].name, node.outputs[0].type = f"{node.name}_output", floats
    return [scaled, summed], summed.outputs[0]


def _unroll(steps: Iterable[ir.Model], schedule: Schedule, signature: Signature) -> ir.Model:
    """Chain "per-step" graphs into one graph that shares their weights.

    Each is copied before the next is taken, so ``steps`` may yield one graph that it changes.
    """
    (noise,), (image,) = signature.inputs, signature.outputs
    floats = ir.TensorType(ir.DataType.FLOAT)
    source = ir.Value(name=noise.name, type=floats, shape=ir.Shape(noise.shape))
    shared: dict[str, ir.Value] = {}
    nodes: list[ir.Node] = []
    x, x0, x0_prev = source, source, source
    opsets: dict[str, int] = {}
    for k, (row, step) in enumerate(zip(schedule.rows, steps, strict=True)):
        opsets, ir_version = dict(step.graph.opset_imports), step.ir_version
        prefix = f"step_{k:02d}/"
        history = x0
        if row.d:
            composed, history = _compose(prefix, row, x0, x0_prev, shared)
            nodes += composed
        values = dict(zip(step.graph.inputs, (x, history), strict=False))
        for name, value in step.graph.initializers.items():
            key = prefix + name if name in STEP_VALUES else name
            if key not in shared:
                shared[key] = ir.Value(
                    name=key, type=value.type, shape=value.shape, const_value=value.const_value
                )
            values[value] = shared[key]
        for node in step.graph:
            copy = ir.Node(
                node.domain,
                node.op_type,
                [values[value] if value is not None else None for value in node.inputs],
                list(node.attributes.values()),
                num_outputs=len(node.outputs),
                name=prefix + str(node.name),
            )
            for ours, theirs in zip(copy.outputs, node.outputs, strict=True):
                ours.name, ours.type = prefix + str(theirs.name), theirs.type
                values[theirs] = ours
            nodes.append(copy)
        x0_prev = x0
        x, x0 = (values[value] for value in step.graph.outputs)
    x.name, x.shape, x.type = image.name, ir.Shape(image.shape), floats
    graph = ir.Graph(
        [source],
        [x],
        nodes=nodes,
        initializers=list(shared.values()),
        opset_imports=opsets,
        name="lutdeploy",
    )
    return ir.Model(
        graph,
        ir_version=ir_version,
        producer_name="lutdeploy",
        producer_version=lutdeploy.__version__,
    )


def _fixed_steps(model: LutTransformer, precision: str, schedule: Schedule) -> Iterator[ir.Model]:
    """The graph of each step. The network is traced once with and once without x0_prev.

    It yields the traced graph itself, and gives it the next step's values afterwards.
    """
    time = TimeBias(model.stem)
    fixed = FixedStepGraph(model, precision)
    traced: dict[bool, ir.Model] = {}
    for row in schedule.rows:
        previous, values = bool(row.c), _step_values(time, row)
        if previous not in traced:
            signature = fixed_step_signature(model.config, row)
            traced[previous] = _trace(fixed, signature, values)
        for name, value in values.items():
            initializer = traced[previous].graph.initializers[name]
            initializer.const_value = ir.tensor(value.numpy(), name=name)
        yield traced[previous]


def trace_graphs(model: LutTransformer, plan: ExportPlan) -> Iterator[tuple[str, ir.Model]]:
    """The file names and graphs of a plan, in step order."""
    if plan.schedule is None:
        graph = StepGraph(model, plan.precision)
        yield "step.onnx", _trace(graph, step_signature(model.config), {})
        return
    steps = _fixed_steps(model, plan.precision, plan.schedule)
    if plan.graph == "per-step":
        yield from ((f"step-{k:03d}.onnx", graph) for k, graph in enumerate(steps))
    else:
        yield "loop.onnx", _unroll(steps, plan.schedule, loop_signature(model.config))


def write_graphs(
    model: LutTransformer, plan: ExportPlan, folder: Path, on_phase: OnPhase
) -> tuple[str, ...]:
    """Write the graphs of a plan and their weights file into an empty folder.

    Returns:
        The graphs' file names, in step order.
    """
    names = []
    with WeightsFile(folder / WEIGHTS) as weights:
        for name, graph in trace_graphs(model, plan):
            weights.move(graph)
            on_phase(f"write {name}")
            ir.save(graph, folder / name)
            names.append(name)
    for name in names:
        on_phase(f"check {name}")
        check_graph(folder / name)
    return tuple(names)


def check_graph(path: Path) -> None:
    """Run the ONNX checker with strict shape inference on a graph and its weights file."""
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ArtefactError(f"{path}: {first_line(error)}") from error


def export_model(
    model: LutTransformer,
    plan: ExportPlan,
    run: Run,
    source_sha256: str,
    verify: Callable[[Path], Any] = lambda folder: None,
    quantize: Callable[[Path], Quantization] | None = None,
    tuned: Sequence[Schedule] = (),
    on_phase: OnPhase = lambda phase: None,
    license: str | None = None,
) -> Path:
    """Export into the run folder, beside its other exports; one of the same name is replaced.

    Args:
        model: the float32 model, on the CPU.
        plan: what to export.
        run: the run that gets the export.
        source_sha256: of the model file, for the manifest.
        verify: is called with the finished folder before it takes its place. An error that it
            raises ends the export and leaves the run as it was.
        quantize: for int8, is called with the float32 graph's file before the manifest is written.
            It quantises the graph in place and returns the record for the manifest.
        tuned: the model's tuned schedules, for the manifest.
        on_phase: told what is done now, of what may take a minute.
        license: of the model, for the graphs.

    Returns:
        The export folder.
    """
    if (quantize is None) == (plan.precision == "int8"):
        raise ValueError(f"precision {plan.precision} does not go with quantize={quantize}")
    target = run.export_folder(plan.name)
    with files.staged(target) as stage:
        graphs = write_graphs(model, plan, stage, on_phase)
        quantization = None
        if quantize is not None:
            quantization = quantize(stage / graphs[0])
            check_graph(stage / graphs[0])
        describe_graphs(
            *(stage, graphs, plan.graph, plan.precision, model.config, plan.schedule),
            *(source_sha256, license),
        )
        describe_export(stage, model, plan, source_sha256, graphs, quantization, tuned).write()
        on_phase("compare with PyTorch")
        verify(stage)
    return target


def describe_export(
    folder: Path,
    model: LutTransformer,
    plan: ExportPlan,
    source_sha256: str,
    graphs: tuple[str, ...],
    quantization: Quantization | None = None,
    tuned: Sequence[Schedule] = (),
) -> Manifest:
    """The manifest of a folder that holds a plan's graphs and weights, all of which it hashes."""
    return Manifest(
        folder=folder,
        config=model.config,
        graph=plan.graph,
        precision=plan.precision,
        schedule=plan.schedule,
        islands={"fp32": (), "fp16": ISLANDS, "int8": INT8_ISLANDS}[plan.precision],
        opset=OPSET,
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="microseconds"),
        versions={
            "lutdeploy": lutdeploy.__version__,
            "torch": str(torch.__version__),
            "onnx": onnx.__version__,
            "onnxscript": onnxscript.__version__,
            "onnx_ir": ir.__version__,
        },
        source_sha256=source_sha256,
        graphs=graphs,
        files=hash_files(folder),
        quantization=quantization,
        tuned=tuple(tuned),
    )
