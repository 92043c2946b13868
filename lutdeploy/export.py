"""From a PyTorch model to ONNX: exact rewrites, FP16 islands, three kinds of graph.

``step``      one row of any solver table: x, t, a, b, c, x0_prev → x_next, x0
``per-step``  one graph per row of one table, t and the coefficients inside
``loop``      a whole table in one graph: noise → image

Every kind shares one network, ``FusedNetwork``, traced by torch.export; all the graphs of
an export share one external weights file. The rewrites are those of the specification
("Exact rewrites for inference"); they are folded in float64 and then rounded once.
"""

from __future__ import annotations

import datetime
import hashlib
import logging
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import onnxscript
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lutdeploy
from lutdeploy import bundle
from lutdeploy.config import ModelConfig
from lutdeploy.errors import ArtefactError, ConfigError
from lutdeploy.lut import DynamicLut, StaticLut, activate_weights, outer_entries, tiles_to_image
from lutdeploy.model import Block, LutTransformer, Stem
from lutdeploy.signature import (
    BATCH,
    GRAPHS,
    PRECISIONS,
    Signature,
    fixed_step_signature,
    loop_signature,
    step_signature,
)
from lutdeploy.solvers import Step, StepTable

OPSET = 20
WEIGHTS = "weights.bin"
ALIGNMENT = 4096  # of each tensor in the weights file, so that it can be mapped

ROW = ("time_bias", "a", "b", "c")  # initializers of a fixed step graph that differ by step

# What stays float32 in an fp16 export. A test reads the dtypes back from the graph.
ISLANDS = (
    "graph inputs and outputs",
    "time: embedding and projection",
    "LayerNormalization",
    "head: tanh or softmax",
    "lut: entries, outer products of a dynamic LUT, product with the weights",
    "sampler: a·x + b·x0 + c·x0_prev",
)


@dataclass(frozen=True)
class ExportPlan:
    """What to export. ``table`` is None for the ``step`` graph, which follows any table.

    Raises:
        ConfigError: unknown kind or precision, or a table where none belongs.
    """

    graph: str = "step"
    precision: str = "fp32"
    table: StepTable | None = None

    def __post_init__(self) -> None:
        if self.graph not in GRAPHS:
            raise ConfigError(f"no graph kind {self.graph!r}; there are {', '.join(GRAPHS)}")
        if self.precision not in PRECISIONS:
            raise ConfigError(f"no precision {self.precision!r}; there are {', '.join(PRECISIONS)}")
        if (self.table is None) != (self.graph == "step"):
            raise ConfigError(
                f"graph {self.graph} {'needs' if self.table is None else 'has no'} steps"
            )

    @property
    def name(self) -> str:
        """The export folder's name: ``step-fp16``, ``per-step-fp16-euler-64``, …"""
        table = f"-{self.table.describe()}" if self.table else ""
        return f"{self.graph}-{self.precision}{table}"


# The network in its inference form. Weights are stored [in, out].


def _constant(value: Tensor, dtype: torch.dtype) -> nn.Parameter:
    return nn.Parameter(value.detach().to(dtype).contiguous(), requires_grad=False)


class Product(nn.Module):
    """x·W + b, with W [in, out]."""

    def __init__(self, weight: Tensor, bias: Tensor, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = _constant(weight.T, dtype)
        self.bias = _constant(bias, dtype)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


def _fold_norm(norm: nn.LayerNorm, linear: nn.Linear) -> tuple[Tensor, Tensor]:
    """A LayerNorm's affine folded into the product behind it: (weight, bias) in float64."""
    weight, bias = linear.weight.double(), linear.bias.double()
    return weight * norm.weight.double(), bias + weight @ norm.bias.double()


class TimeBias(nn.Module):
    """The whole time branch: t [B] to what it adds to every token, float32 [B, D]."""

    frequencies: Tensor

    def __init__(self, stem: Stem) -> None:
        super().__init__()
        assert stem.patch.bias is not None and stem.expand.bias is not None
        summed = stem.patch.weight.double().sum(dim=(2, 3))  # [D, stem]
        inner = stem.time.bias.double() + stem.expand.bias.double()
        self.weight = _constant(summed @ stem.time.weight.double(), torch.float32)
        self.bias = _constant(summed @ inner + stem.patch.bias.double(), torch.float32)
        self.register_buffer("frequencies", stem.frequencies.clone())

    def forward(self, t: Tensor) -> Tensor:
        angles = t[:, None] * self.frequencies
        return F.linear(torch.cat([angles.sin(), angles.cos()], dim=-1), self.weight, self.bias)


class FusedStem(nn.Module):
    """One convolution, the time bias, the position; LUT tokens appended where there are."""

    cos: Tensor
    sin: Tensor

    def __init__(self, model: LutTransformer, dtype: torch.dtype) -> None:
        super().__init__()
        self.config, self.dtype = model.config, dtype
        stem, quarter = model.stem, model.config.width // 4
        kernel = torch.einsum(
            "dsij,sc->dcij", stem.patch.weight.double(), stem.expand.weight.double().flatten(1)
        )
        self.kernel = _constant(kernel, dtype)
        # rot(u) = [−u_b, u_a]: the sign moves into the table, what is left swaps quarters.
        sign = torch.tensor([-1.0, 1.0, -1.0, 1.0]).repeat_interleave(quarter)
        self.register_buffer("cos", stem.cos.to(dtype))
        self.register_buffer("sin", (stem.sin * sign).to(dtype))
        if isinstance(model.lut, DynamicLut):
            tokens = F.pad(model.lut.tokens.detach(), (0, 0, self.config.image_tokens, 0))
            self.lut_tokens = _constant(tokens, dtype)  # [N + K, D], zero on the image's rows

    def forward(self, x: Tensor, time_bias: Tensor) -> Tensor:
        z = F.conv2d(x.to(self.dtype), self.kernel, stride=self.config.patch_size)
        u = z.flatten(2).transpose(1, 2) + time_bias.to(self.dtype)[:, None]  # [B, N, D]
        row_a, row_b, column_a, column_b = u.chunk(4, dim=-1)
        swapped = torch.cat([row_b, row_a, column_b, column_a], dim=-1)
        tokens = u * self.cos + swapped * self.sin
        if self.config.lut == "static":
            return tokens
        # Padding and a sum append the tokens without asking the graph for its batch size.
        return F.pad(tokens, (0, 0, 0, self.config.entries)) + self.lut_tokens


class FusedBlock(nn.Module):
    """A transformer block as matmul-softmax-matmul with pre-scaled q and k."""

    def __init__(self, block: Block, config: ModelConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self.heads, self.dtype = config.heads, dtype
        self.width, self.eps = config.width, config.layer_norm_eps
        weight, bias = _fold_norm(block.norm1, block.qkv)
        scale = torch.ones(3 * config.width, dtype=torch.float64)
        scale[: 2 * config.width] = (config.width // config.heads) ** -0.25
        self.qkv = Product(weight * scale[:, None], bias * scale, dtype)
        self.out = Product(block.out.weight, block.out.bias, dtype)
        self.gated = Product(*_fold_norm(block.norm2, block.gated), dtype)

    def normalise(self, x: Tensor) -> Tensor:
        return F.layer_norm(x.float(), (self.width,), eps=self.eps).to(self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            part.unflatten(-1, (self.heads, -1))  # [B, N, heads, D/heads]
            for part in self.qkv(self.normalise(x)).chunk(3, dim=-1)
        )
        scores = q.permute(0, 2, 1, 3) @ k.permute(0, 2, 3, 1)  # [B, heads, N, N]
        attended = scores.softmax(-1) @ v.permute(0, 2, 1, 3)
        y = x + self.out(attended.permute(0, 2, 1, 3).flatten(2))
        value, gate = self.gated(self.normalise(y)).chunk(2, dim=-1)
        return y + value * F.silu(gate)


class FusedHead(nn.Module):
    """Tokens and LUT to pixels; float32 from the logits on."""

    def __init__(self, model: LutTransformer, dtype: torch.dtype) -> None:
        super().__init__()
        self.config = model.config
        self.logits = Product(model.head.weight, model.head.bias, dtype)

    def forward(self, tokens: Tensor, lut: Tensor) -> Tensor:
        weights = activate_weights(self.logits(tokens).float(), self.config.weights)
        return tiles_to_image(weights @ lut, self.config)


class FusedLut(nn.Module):
    """A dynamic LUT [B, K, C·P·P] from its tokens; float32 from the factors on."""

    def __init__(self, lut: DynamicLut, dtype: torch.dtype) -> None:
        super().__init__()
        self.config = lut.config
        self.factors = Product(lut.factors.weight, lut.factors.bias, dtype)

    def forward(self, tokens: Tensor) -> Tensor:
        return outer_entries(self.factors(tokens).float(), self.config)


class FusedNetwork(nn.Module):
    """x0 from x and the time bias; what every graph is made of."""

    def __init__(self, model: LutTransformer, precision: str) -> None:
        super().__init__()
        dtype = torch.float16 if precision == "fp16" else torch.float32
        self.config = model.config
        self.stem = FusedStem(model, dtype)
        blocks = (block for block in model.blocks if isinstance(block, Block))
        self.blocks = nn.ModuleList(FusedBlock(b, model.config, dtype) for b in blocks)
        self.head = FusedHead(model, dtype)
        if isinstance(model.lut, StaticLut):
            self.lut: nn.Module | nn.Parameter = _constant(model.lut(), torch.float32)
        else:
            self.lut = FusedLut(model.lut, dtype)

    def forward(self, x: Tensor, time_bias: Tensor) -> Tensor:
        tokens = self.stem(x, time_bias)
        for block in self.blocks:
            tokens = block(tokens)
        if isinstance(self.lut, nn.Parameter):
            return self.head(tokens, self.lut)
        n, k = self.config.image_tokens, self.config.entries
        image_tokens, lut_tokens = tokens.split([n, k], dim=1)
        return self.head(image_tokens, self.lut(lut_tokens))


class Sampler(nn.Module):
    """x' = a·x + b·x0 + c·x0_prev, each coefficient [B] or [1]."""

    def forward(
        self,
        x: Tensor,
        x0: Tensor,
        a: Tensor,
        b: Tensor,
        c: Tensor | None,
        x0_prev: Tensor | None,
    ) -> Tensor:
        following = a.reshape(-1, 1, 1, 1) * x + b.reshape(-1, 1, 1, 1) * x0
        if c is None or x0_prev is None:
            return following
        return following + c.reshape(-1, 1, 1, 1) * x0_prev


class StepGraph(nn.Module):
    """The ``step`` graph, see :func:`lutdeploy.signature.step_signature`."""

    def __init__(self, model: LutTransformer, precision: str) -> None:
        super().__init__()
        self.time = TimeBias(model.stem)
        self.network = FusedNetwork(model, precision)
        self.sampler = Sampler()

    def forward(
        self, x: Tensor, t: Tensor, a: Tensor, b: Tensor, c: Tensor, x0_prev: Tensor
    ) -> tuple[Tensor, Tensor]:
        x0 = self.network(x, self.time(t))
        return self.sampler(x, x0, a, b, c, x0_prev), x0


class FixedStepGraph(nn.Module):
    """A ``per-step`` graph. Its row of the table comes in as arguments while it is traced
    (as constants they would be folded away) and as initializers afterwards."""

    def __init__(self, model: LutTransformer, precision: str) -> None:
        super().__init__()
        self.network = FusedNetwork(model, precision)
        self.sampler = Sampler()

    def forward(
        self,
        x: Tensor,
        time_bias: Tensor,
        a: Tensor,
        b: Tensor,
        c: Tensor | None = None,
        x0_prev: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        x0 = self.network(x, time_bias)
        return self.sampler(x, x0, a, b, c, x0_prev), x0


# PyTorch to ONNX.


def _trace(module: nn.Module, signature: Signature, constants: dict[str, Tensor]) -> ir.Model:
    """Export a module with the signature's names; the batch is the only dynamic axis.

    Args:
        module: takes the inputs of the signature and ``constants`` as keyword arguments.
        signature: names of inputs and outputs.
        constants: arguments that become initializers of the graph, with their first values.
    """
    batch = torch.export.Dim(BATCH)
    inputs = {spec.name: torch.rand(2, *spec.row) for spec in signature.inputs}
    axes: dict[str, Any] = {name: {0: batch} for name in inputs} | dict.fromkeys(constants)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations inside the exporter itself
        logger = logging.getLogger("torch.onnx._internal.exporter._registration")
        level = logger.level
        logger.setLevel(logging.ERROR)  # it reports every optional package that is absent
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
    """The module path of a node, as the exporter recorded it: ``blocks.3``, ``head``, …"""
    parts = node.metadata_props.get("namespace", "").split("/")
    paths = [part.split(":")[0].strip() for part in parts[1:-1]]  # without root and operator
    deepest = paths[-1] if paths else ""
    return deepest.removeprefix("network").lstrip(".")


def _tidy(model: ir.Model, kept: set[str]) -> None:
    """Name nodes after the module they come from and drop traces of the exporting machine.

    Args:
        model: changed in place.
        kept: names of initializers that are weights; the others are the exporter's constants.
    """
    scope, counts, lut = "", dict[str, int](), None
    for node in model.graph:
        scope = _scope(node) or scope
        kind = f"{scope}/{node.op_type}" if scope else node.op_type
        counts[kind] = counts.get(kind, 0) + 1
        node.name = f"{kind}_{counts[kind]}"
        node.metadata_props.clear()
        if scope == "lut":  # the last value of this scope is the dynamic LUT
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
        elif value.const_value is not None:  # by content: one name is one value in every graph
            tensor = value.const_value
            text = f"{tensor.dtype} {tensor.shape}".encode() + tensor.tobytes()
            value.name = f"constant_{hashlib.sha256(text).hexdigest()[:12]}"
    model.graph.metadata_props.clear()
    model.metadata_props.clear()
    model.graph.name = "lutdeploy"
    model.producer_name, model.producer_version = "lutdeploy", lutdeploy.__version__


class WeightsFile:
    """The one file of large tensors that all graphs of an export point into, by name."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.placed: dict[str, ir.ExternalTensor] = {}
        self.file = path.open("wb")

    def __enter__(self) -> WeightsFile:
        return self

    def __exit__(self, *exception: object) -> None:
        self.file.close()

    def move(self, model: ir.Model) -> None:
        """Move a graph's large initializers here; one that is here already is pointed to."""
        for name, value in sorted(model.graph.initializers.items()):
            tensor = value.const_value
            if tensor is None or tensor.nbytes < 1024 or name.endswith(ROW):
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


def _row_values(time: TimeBias, row: Step) -> dict[str, Tensor]:
    """The initializers of a fixed step graph; c only where it is used."""
    with torch.no_grad():
        values = {"time_bias": time(torch.tensor([row.t], dtype=torch.float32))}
    for name in ("a", "b", "c") if row.c else ("a", "b"):
        values[name] = torch.tensor([getattr(row, name)], dtype=torch.float32)
    return values


def _unroll(steps: Iterable[ir.Model], signature: Signature) -> ir.Model:
    """Chain fixed step graphs into one graph; equal initializers are shared.

    Each is copied before the next is asked for, so they may be one graph that changes.
    """
    (noise,), (image,) = signature.inputs, signature.outputs
    floats = ir.TensorType(ir.DataType.FLOAT)
    source = ir.Value(name=noise.name, type=floats, shape=ir.Shape(noise.shape))
    shared: dict[str, ir.Value] = {}
    nodes: list[ir.Node] = []
    x, x0 = source, source
    opsets: dict[str, int] = {}
    for k, step in enumerate(steps):
        opsets, ir_version = dict(step.graph.opset_imports), step.ir_version
        prefix = f"step_{k:02d}/"
        values = dict(zip(step.graph.inputs, (x, x0), strict=False))
        for name, value in step.graph.initializers.items():
            key = prefix + name if name in ROW else name
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


def _fixed_steps(model: LutTransformer, precision: str, table: StepTable) -> Iterator[ir.Model]:
    """The graph of each row; the network is traced once per signature.

    What is yielded is the traced graph itself, which takes the next row's values afterwards.
    """
    time = TimeBias(model.stem)
    fixed = FixedStepGraph(model, precision)
    traced: dict[bool, ir.Model] = {}
    for row in table.rows:
        previous, values = bool(row.c), _row_values(time, row)
        if previous not in traced:
            signature = fixed_step_signature(model.config, row)
            traced[previous] = _trace(fixed, signature, values)
        for name, value in values.items():
            initializer = traced[previous].graph.initializers[name]
            initializer.const_value = ir.tensor(value.numpy(), name=name)
        yield traced[previous]


def write_graphs(model: LutTransformer, plan: ExportPlan, folder: Path) -> tuple[str, ...]:
    """Write the graphs of a plan and their weights file into an empty folder.

    Returns:
        The graphs' file names, in step order.

    Raises:
        ArtefactError: a graph that the ONNX checker refuses.
    """
    config, names = model.config, list[str]()
    with WeightsFile(folder / WEIGHTS) as weights:

        def write(graph: ir.Model, name: str) -> None:
            weights.move(graph)
            ir.save(graph, folder / name)
            names.append(name)

        if plan.table is None:
            write(_trace(StepGraph(model, plan.precision), step_signature(config), {}), "step.onnx")
        elif plan.graph == "per-step":
            for k, graph in enumerate(_fixed_steps(model, plan.precision, plan.table)):
                write(graph, f"step-{k:03d}.onnx")
        else:
            steps = _fixed_steps(model, plan.precision, plan.table)
            write(_unroll(steps, loop_signature(config)), "loop.onnx")
    for name in names:
        check_graph(folder / name)
    return tuple(names)


def check_graph(path: Path) -> None:
    """The ONNX checker with strict shape inference, weights file included.

    Raises:
        ArtefactError: what the checker says.
    """
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ArtefactError(f"{path}: {str(error).splitlines()[0]}") from error


def export_model(
    model: LutTransformer,
    plan: ExportPlan,
    run: bundle.Run,
    source_sha256: str,
    verify: Callable[[Path], Any] = lambda folder: None,
) -> Path:
    """Export into the run folder, beside its other exports; an export of this name is replaced.

    Args:
        model: the float32 model, on the CPU.
        plan: what to export.
        run: the run that gets the export.
        source_sha256: of the model file, for the manifest.
        verify: called with the finished folder before it takes its place; what it raises
            ends the export and leaves the run as it was.

    Returns:
        The export folder.
    """
    target = run.export_folder(plan.name)
    with bundle.staged(target) as stage:
        graphs = write_graphs(model, plan, stage)
        manifest = bundle.Manifest(
            folder=stage,
            config=model.config,
            graph=plan.graph,
            precision=plan.precision,
            table=plan.table,
            islands=ISLANDS if plan.precision == "fp16" else (),
            opset=OPSET,
            created=datetime.datetime.now(datetime.UTC).isoformat(timespec="microseconds"),
            versions={
                "lutdeploy": lutdeploy.__version__,
                "torch": torch.__version__,
                "onnx": onnx.__version__,
                "onnxscript": onnxscript.__version__,
                "onnx_ir": ir.__version__,
            },
            source_sha256=source_sha256,
            graphs=graphs,
            files=bundle.hash_files(stage),
        )
        bundle.write_json(stage / bundle.MANIFEST, manifest.to_dict())
        verify(stage)
    return target
