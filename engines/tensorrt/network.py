"""From an exported graph to TensorRT's network, and what its layers really compute in.

Networks are strongly typed: the types that the parser gives to layers are the precision of the
engine. So they are held against the export before anything is built.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx

from lutdeploy.engines.tensorrt.library import RTX, TITLES, last_error, load_tensorrt
from lutdeploy.errors import ArtefactError, BackendError, ParityError, first_line

# Layers whose type decides precision and speed: TensorRT's LayerType by ONNX operator.
CHECKED = {
    "MatMul": "MATRIX_MULTIPLY",
    "Gemm": "MATRIX_MULTIPLY",
    "Einsum": "EINSUM",
    "Conv": "CONVOLUTION",
    "Softmax": "SOFTMAX",
    "LayerNormalization": "NORMALIZATION",
    "Tanh": "ACTIVATION",
    "Sigmoid": "ACTIVATION",
    "Sin": "UNARY",
    "Cos": "UNARY",
}
TYPES = {"HALF": "float16", "FLOAT": "float32", "BF16": "bfloat16"}
NAMED = 3  # layers that a message lists


@dataclass(frozen=True)
class TypedLayer:
    """A layer of the parsed network that decides precision."""

    node: str  # of the ONNX graph
    kind: str  # of TensorRT's LayerType
    dtype: str  # of its output: "float16", "float32" or TensorRT's name


@dataclass(frozen=True)
class NetworkTypes:
    """What a graph's layers compute in, and where that is not what its export says."""

    layers: tuple[TypedLayer, ...]
    problems: tuple[str, ...]

    def counts(self) -> dict[str, int]:
        """How many layers there are of each kind and type: {"MATRIX_MULTIPLY float16": 43, …}."""
        return dict(sorted(Counter(f"{layer.kind} {layer.dtype}" for layer in self.layers).items()))


class Messages(logging.Handler):
    """The errors that TensorRT and Polygraphy logged."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.errors: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Called by Polygraphy's logger, which puts a mark before each message."""
        text = record.getMessage().removeprefix("[E]").removeprefix("[!]").strip()
        self.errors.append(text)

    def reason(self) -> str:
        """Why the last call failed: the last error that TensorRT gave, in one line."""
        given = [text for text in self.errors if not text.startswith(("Could not", "Invalid Eng"))]
        return last_error(given)


@contextlib.contextmanager
def polygraphy(backend: str) -> Iterator[tuple[Any, Messages]]:
    """Polygraphy's loaders over the TensorRT of a backend, and what it logs meanwhile.

    Polygraphy binds one TensorRT when it is first imported, for the whole process.

    Raises:
        BackendError: one of them is not installed, or the process has the other TensorRT.
    """
    load_tensorrt(backend)
    bound = "polygraphy.backend.trt" in sys.modules
    try:
        from polygraphy import config
        from polygraphy.logger import G_LOGGER

        if bound and config.USE_TENSORRT_RTX != (backend == RTX):
            raise BackendError(
                f"this process builds for the other TensorRT already; build for {TITLES[backend]} "
                "in a process of its own"
            )
        config.USE_TENSORRT_RTX = backend == RTX
        from polygraphy.backend import trt as loaders
    except ImportError as error:
        raise BackendError(
            f"Polygraphy does not load here ({first_line(error)}); pip install "
            f"'lutdeploy[{backend}]'"
        ) from error
    messages, log = Messages(), logging.getLogger("Polygraphy")
    G_LOGGER.colors = False  # or it prints that a package for colours is missing
    G_LOGGER.use_python_logging_system = True
    propagate, log.propagate = log.propagate, False
    log.addHandler(messages)
    try:
        with warnings.catch_warnings():
            # Polygraphy sets a timing cache, which TensorRT for RTX is about to remove.
            warnings.simplefilter("ignore", DeprecationWarning)
            yield loaders, messages
    finally:
        log.removeHandler(messages)
        log.propagate = propagate


def read_graph(path: Path, batch: int | None = None) -> onnx.ModelProto:
    """A graph with its weights; ``batch`` makes its batch axis static."""
    try:
        model = onnx.load(path)
    except Exception as error:  # protobuf and onnx raise several kinds
        raise ArtefactError(f"{path} is no readable ONNX graph: {first_line(error)}") from error
    if batch is not None:
        for value in (*model.graph.input, *model.graph.output):
            value.type.tensor_type.shape.dim[0].dim_value = batch
    return model


def parse(loaders: Any, messages: Messages, model: onnx.ModelProto, what: str) -> Any:
    """The builder, the network and the parser, which owns the weights until the build is done.

    Raises:
        BackendError: TensorRT cannot parse the graph; names the node.
    """
    from polygraphy.exception import PolygraphyException

    try:
        return loaders.NetworkFromOnnxBytes(model.SerializeToString(), strongly_typed=True)()
    except PolygraphyException as error:
        raise BackendError(f"TensorRT cannot parse {what}: {messages.reason()}") from error


def network_types(network: Any, model: onnx.ModelProto, precision: str) -> NetworkTypes:
    """Read the types of a parsed network's layers and hold them against the export.

    Args:
        network: ``trt.INetworkDefinition``.
        model: the graph that it was parsed from.
        precision: of the export, "fp16" or "fp32".
    """
    kinds = set(CHECKED.values())
    layers = []
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if layer.type.name in kinds:
            dtype = layer.get_output(0).dtype.name
            layers.append(TypedLayer(layer.name, layer.type.name, TYPES.get(dtype, dtype)))
    problems = [
        f"{layer.node} ({layer.kind}) computes in {layer.dtype}, not {wanted}"
        for layer in layers
        if layer.dtype != (wanted := expected_type(layer, precision))
    ]
    found = {layer.node for layer in layers}
    problems += [
        f"{node.name} ({node.op_type}) is no layer of its kind in the network: its type is unknown"
        for node in model.graph.node
        if node.op_type in CHECKED and node.name not in found
    ]
    for number, get in (
        (network.num_inputs, network.get_input),
        (network.num_outputs, network.get_output),
    ):
        for index in range(number):
            tensor = get(index)
            if tensor.dtype.name != "FLOAT":
                problems.append(f"{tensor.name} is {tensor.dtype.name}, inputs and outputs float32")
    return NetworkTypes(tuple(layers), tuple(problems))


def expected_type(layer: TypedLayer, precision: str) -> str:
    """What a layer computes in: float16 in an fp16 export, but for its islands.

    The islands (``engines.export.graphs.ISLANDS``) are the timestep embedding, LayerNorm and the
    activation of the LUT's weights.
    """
    scope = layer.node.rpartition("/")[0].rpartition("/")[2]
    island = layer.kind in ("UNARY", "NORMALIZATION") or (
        scope == "head" and layer.kind in ("SOFTMAX", "ACTIVATION")
    )
    return "float32" if precision == "fp32" or island else "float16"


def require_types(types: NetworkTypes, path: Path, precision: str) -> None:
    """Refuse a graph whose layers compute in other types than its export's precision says.

    Raises:
        ParityError: names the first of them.
    """
    if types.problems:
        more = len(types.problems) - NAMED
        named = "; ".join(types.problems[:NAMED]) + (f" and {more} more" if more > 0 else "")
        raise ParityError(f"{path} is not what its export says, {precision}: {named}")
