"""Names and shapes of the graphs' inputs and outputs, declared once.

The export names its tensors by them, TensorRT's builder makes its profiles of them, and runtimes
check what they are fed and what they have loaded against them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lutdeploy.config import ModelConfig
from lutdeploy.errors import ArtefactError, UsageError
from lutdeploy.schedule import Schedule, Step

if TYPE_CHECKING:  # the command line imports this module and should not wait for numpy
    import numpy as np
    from numpy.typing import NDArray

BATCH = "batch"
GRAPHS = ("step", "per-step", "loop")
PRECISIONS = ("fp32", "fp16", "int8")


@dataclass(frozen=True)
class TensorSpec:
    """One input or output. Every tensor is float32 and its first axis is the batch."""

    name: str
    row: tuple[int, ...]  # the shape without the batch axis

    @property
    def shape(self) -> tuple[str | int, ...]:
        return (BATCH, *self.row)


@dataclass(frozen=True)
class Signature:
    """The inputs and outputs of one graph, in order."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    def check_feed(self, feed: Mapping[str, NDArray[np.float32]]) -> None:
        """Raise a UsageError unless names, dtypes and shapes fit and agree on the batch."""
        names = [spec.name for spec in self.inputs]
        if set(feed) != set(names):
            raise UsageError(f"got inputs {sorted(feed)}, expected {sorted(names)}")
        batch = feed[names[0]].shape[0] if feed[names[0]].ndim else 0
        for spec in self.inputs:
            array = feed[spec.name]
            if str(array.dtype) != "float32":
                raise UsageError(f"input {spec.name}: got {array.dtype}, expected float32")
            if array.shape != (batch, *spec.row) or batch < 1:
                raise UsageError(
                    f"input {spec.name}: got shape {array.shape}, expected "
                    f"{(batch or 'at least 1', *spec.row)}"
                )

    def check_graph(
        self,
        inputs: Iterable[tuple[str, str, tuple[str | int | None, ...]]],
        outputs: Iterable[tuple[str, str, tuple[str | int | None, ...]]],
        what: str,
    ) -> None:
        """Raise an ArtefactError unless a graph has these inputs and outputs.

        Args:
            inputs, outputs: (name, dtype, shape) of each, as the runtime reports them.
            what: the graph, for the message.
        """
        for kind, specs, found in (
            ("input", self.inputs, inputs),
            ("output", self.outputs, outputs),
        ):
            given = list(found)
            expected = [spec.name for spec in specs]
            if [name for name, _, _ in given] != expected:
                raise ArtefactError(
                    f"{what}: got {kind}s {[name for name, _, _ in given]}, expected {expected}"
                )
            for spec, (name, dtype, shape) in zip(specs, given, strict=True):
                if dtype != "float32" or tuple(shape[1:]) != spec.row or isinstance(shape[0], int):
                    raise ArtefactError(
                        f"{what}: {kind} {name} is {dtype}{list(shape)}, "
                        f"expected float32{list(spec.shape)}"
                    )


def step_signature(config: ModelConfig) -> Signature:
    """The ``step`` graph: one step of any schedule, with its coefficients for each image."""
    image = config.image_shape
    return Signature(
        inputs=(
            TensorSpec("x", image),
            TensorSpec("t", ()),
            TensorSpec("a", ()),
            TensorSpec("b", ()),
            TensorSpec("c", ()),
            TensorSpec("x0_prev", image),
        ),
        outputs=(TensorSpec("x_next", image), TensorSpec("x0", image)),
    )


def fixed_step_signature(config: ModelConfig, row: Step) -> Signature:
    """A ``per-step`` graph: t, a, b, c are inside; x0_prev is an input only where c ≠ 0."""
    step = step_signature(config)
    wanted = ("x", "x0_prev") if row.c else ("x",)
    return Signature(tuple(s for s in step.inputs if s.name in wanted), step.outputs)


def loop_signature(config: ModelConfig) -> Signature:
    """The ``loop`` graph: noise in, image out."""
    image = config.image_shape
    return Signature((TensorSpec("noise", image),), (TensorSpec("image", image),))


def graph_signature(
    config: ModelConfig, graph: str, schedule: Schedule | None, k: int = 0
) -> Signature:
    """The signature of an export's k-th graph.

    Args:
        config: of the model inside.
        graph: "step", "per-step" or "loop".
        schedule: the export's own; None for "step".
        k: which of its graphs.
    """
    if graph == "loop":
        return loop_signature(config)
    if schedule is None:
        return step_signature(config)
    return fixed_step_signature(config, schedule.rows[k])
