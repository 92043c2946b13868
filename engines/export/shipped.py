"""The export that a model of the package brings: its graph reads the weights of the model itself.

It is a float32 ``step`` export whose large matrices are expressions of the float16 tensors in the
model's safetensors file: ONNX's external data may lie at any offset of any file beside the graph.
A runtime folds the expressions when it loads the graph, and then computes what it computes with
any other float32 export. So the package holds the weights once, and they cannot be other ones.

    python -m lutdeploy.engines.export.shipped static-tanh-64-small

makes it anew from the weights and fitted schedules that are in the package, in the root of the
checkout.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import click
import onnx_ir as ir

from lutdeploy.artefacts import files, shipped
from lutdeploy.artefacts.checkpoint import load_model
from lutdeploy.artefacts.manifest import MANIFEST, read_manifest
from lutdeploy.artefacts.run import Run
from lutdeploy.artefacts.tuned_steps import fitted_schedules
from lutdeploy.artefacts.verdicts import store_verdict, verdict_of
from lutdeploy.config import ModelConfig
from lutdeploy.engines.export.graphs import ExportPlan, check_graph, describe_export, trace_graphs
from lutdeploy.engines.export.metadata import describe_graphs
from lutdeploy.engines.onnxruntime import OnnxRuntimeDenoiser
from lutdeploy.errors import LutDeployError, ParityError
from lutdeploy.fused import attention_scale
from lutdeploy.model import LutTransformer
from lutdeploy.parity import compare
from lutdeploy.schedule import Schedule

PLAN = ExportPlan("step", "fp32")
FLOAT, HALF = ir.TensorType(ir.DataType.FLOAT), ir.TensorType(ir.DataType.FLOAT16)


def export_shipped(
    path: Path, tuned: Sequence[Schedule], note: Callable[[str], None] = lambda text: None
) -> Path:
    """Export a model of the package beside its weights, once it has passed parity.

    Args:
        path: the weights, float16, in the model's folder of the package.
        tuned: the schedules that were fitted to them, the best first, for the manifest.
        note: told what the comparison found.

    Returns:
        The model's folder, which now is an export folder.

    Raises:
        ParityError: the export differs from PyTorch. What was there is left as it was.
    """
    model = load_model(path)
    with tempfile.TemporaryDirectory(prefix="lutdeploy-") as scratch:
        stage = Path(scratch) / path.parent.name
        stage.mkdir()
        shutil.copyfile(path, stage / path.name)
        ((name, graph),) = trace_graphs(model, PLAN)
        read_from(graph, model, stage / path.name)
        ir.save(graph, stage / name)
        check_graph(stage / name)
        source = files.sha256(path)
        describe_graphs(
            *(stage, (name,), PLAN.graph, PLAN.precision, model.config, PLAN.schedule),
            *(source, shipped.LICENSE),
        )
        describe_export(stage, model, PLAN, source, (name,), tuned=tuned).write()
        with OnnxRuntimeDenoiser(read_manifest(stage)) as engine:
            # as `sample` follows it
            report = compare(model, engine, PLAN.precision, next(iter(tuned), None))
            verdict = verdict_of(report, engine.identity, "parity")
        if not report.passed:
            raise ParityError(f"{path.stem}: its export differs: {report.failures()[0]}")
        note(f"export: PSNR {report.final.psnr:.1f} dB, {report.schedule.describe()}")
        run = Run(path.parent)
        for old in run.verdicts.glob("*.json"):
            old.unlink()
        for file in (name, MANIFEST):
            files.write_atomic(path.parent / file, (stage / file).read_bytes())
        store_verdict(run, verdict)
    return path.parent


def read_from(graph: ir.Model, model: LutTransformer, weights: Path) -> None:
    """Let a float32 ``step`` graph read its large matrices from a model file beside it.

    Args:
        graph: of :func:`trace_graphs`, changed in place.
        model: what it computes.
        weights: the model's safetensors file, float16.
    """
    stored, state = _stored_tensors(weights), model.state_dict()
    initializers = graph.graph.initializers
    nodes: list[ir.Node] = []
    for name, key, norm in _matrices(model.config):
        factors = {}
        if norm is not None:  # of each row [D, 1], as fused.fold_norm multiplies
            factors["rows"] = state[norm].numpy()[:, None]
        if name.endswith("qkv.weight"):
            factors["columns"] = attention_scale(model.config).float().numpy()  # [3·D]
        half = ir.Value(
            name=f"{key}.float16", type=HALF, shape=stored[key].shape, const_value=stored[key]
        )
        graph.graph.register_initializer(half)
        made = [
            # [out, in] to [in, out], of half the bytes that it would be after the cast
            ir.Node("", "Transpose", [half], [ir.AttrInt64s("perm", (1, 0))]),
            ir.Node("", "Cast", [half], [ir.AttrInt64("to", ir.DataType.FLOAT)]),
        ]
        for kind, factor in factors.items():
            tensor = ir.tensor(factor, name=f"{name}.{kind}")
            value = ir.Value(
                name=tensor.name, type=FLOAT, shape=ir.Shape(factor.shape), const_value=tensor
            )
            graph.graph.register_initializer(value)
            made.append(ir.Node("", "Mul", [half, value]))
        for before, node in zip((None, *made), made, strict=False):
            if before is not None:
                node.replace_input_with(0, before.outputs[0])
            node.name = f"{name.replace('.', '/')}/{node.op_type}_{len(nodes)}"
            node.outputs[0].name = f"{node.name}_output"
            node.outputs[0].type = HALF if node.op_type == "Transpose" else FLOAT
            nodes.append(node)
        ir.convenience.replace_all_uses_with(initializers[name], made[-1].outputs[0])
        del initializers[name]
    graph.graph.insert_before(graph.graph[0], nodes)


def _matrices(config: ModelConfig) -> Iterator[tuple[str, str, str | None]]:
    """A matrix of the graph, the model's tensor that it is made of, and the norm folded into it."""
    yield "head.logits.weight", "head.weight", None
    for k in range(config.depth):
        for layer, norm in (("qkv", "norm1"), ("out", None), ("gated", "norm2")):
            key = f"blocks.{k}.{layer}.weight"
            yield key, key, f"blocks.{k}.{norm}.weight" if norm else None


def _stored_tensors(path: Path) -> dict[str, ir.ExternalTensor]:
    """The float16 tensors of a safetensors file: a length, a JSON header of it, then the bytes."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    found = {}
    for name, about in header.items():
        if about.get("dtype") == "F16":
            start, end = about["data_offsets"]
            found[name] = ir.ExternalTensor(
                path.name,
                8 + length + start,
                end - start,
                ir.DataType.FLOAT16,
                shape=ir.Shape(about["shape"]),
                name=f"{name}.float16",
                base_dir=str(path.parent),
            )
    return found


@click.command()
@click.argument("name", type=click.Choice(shipped.names()))
def main(name: str) -> None:
    """Export the model NAME of the package beside its weights."""
    path = shipped.model_path(name)
    try:
        export_shipped(path, fitted_schedules(path, files.sha256(path)), click.echo)
    except LutDeployError as error:
        raise click.ClickException(str(error)) from error


if __name__ == "__main__":
    main()
