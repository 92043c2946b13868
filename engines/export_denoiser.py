"""The Denoiser protocol over an export's graphs, for runtimes that take and give host arrays."""

from __future__ import annotations

import abc
import contextlib
import weakref
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from lutdeploy.artefacts.manifest import Manifest
from lutdeploy.errors import BackendError, UsageError
from lutdeploy.machine import int8_weight_bits
from lutdeploy.sampling import Images, held_row, predict_by_row
from lutdeploy.schedule import Step
from lutdeploy.signature import Signature, graph_signature


class ExportDenoiser(abc.ABC):
    """An export whose graphs take and give host arrays; a context manager.

    Args:
        manifest: of the export folder, whose files are verified by size and hash.

    Raises:
        BackendError: an int8 export whose sums would saturate on this processor.
    """

    backend: str

    def __init__(self, manifest: Manifest) -> None:
        opened = contextlib.ExitStack()
        self._folder = opened.enter_context(manifest.verified())
        weakref.finalize(self, opened.close)
        quantization = manifest.quantization
        if quantization is not None and quantization.weight_bits > int8_weight_bits():
            raise BackendError(
                f"{manifest.folder} has weights of {quantization.weight_bits} bits, whose products "
                "saturate on this processor, which has no VNNI; `lutdeploy export --int8` here "
                "makes one that does not"
            )
        self.manifest, self.config, self.schedule = manifest, manifest.config, manifest.schedule
        self.whole_trajectory = manifest.graph == "loop"

    def graph_file(self, k: int) -> Path:
        """Graph k, its weights beside it."""
        return self._folder / self.manifest.graphs[k]

    @property
    @abc.abstractmethod
    def place(self) -> str:
        """Where it computes, for manifests and verdicts: a device, an execution provider."""

    @abc.abstractmethod
    def infer(self, k: int, feed: dict[str, Images]) -> list[Images]:
        """Run graph k.

        Args:
            feed: its inputs by name, contiguous and checked.

        Returns:
            Its outputs in the signature's order, in memory that no later call changes.
        """

    @abc.abstractmethod
    def close(self) -> None:
        """Free the sessions or compiled graphs."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: Any) -> None:
        self.close()

    @property
    def identity(self) -> dict[str, Any]:
        """What made a picture: backend, device, export and hashes."""
        return {
            "backend": self.backend,
            "device": self.place,
            "export": self.manifest.name,
            "engine_sha256": self.manifest.weights_sha256,
            "model_sha256": self.manifest.source_sha256,
        }

    def signature(self, k: int) -> Signature:
        """Inputs and outputs of graph k."""
        return graph_signature(self.config, self.manifest.graph, self.schedule, k)

    def predict_x0(self, x: Images, t: NDArray[np.float32]) -> Images:
        """See :class:`lutdeploy.sampling.Denoiser`."""
        if self.schedule is not None:
            return predict_by_row(self, x, t)
        zeros, ones = np.zeros(len(x), np.float32), np.ones(len(x), np.float32)
        feed = {"x": x, "t": np.asarray(t, np.float32), "a": zeros, "b": ones, "c": zeros}
        return self._infer(0, {**feed, "x0_prev": x})[1]

    def step(self, x: Images, row: Step, x0_prev: Images | None) -> tuple[Images, Images]:
        """See :class:`lutdeploy.sampling.Denoiser`."""
        previous = x if x0_prev is None else x0_prev
        if self.schedule is None:
            values = {"t": row.t, "a": row.a, "b": row.b, "c": row.c}
            feed = {name: np.full(len(x), v, np.float32) for name, v in values.items()}
            x_next, x0 = self._infer(0, {"x": x, "x0_prev": previous, **feed})
            return x_next, x0
        feed = {"x": x, "x0_prev": previous} if row.c else {"x": x}
        x_next, x0 = self._infer(held_row(self.schedule, row), feed)
        return x_next, x0

    def run(self, noise: Images) -> Images:
        """See :class:`lutdeploy.sampling.Denoiser`."""
        if not self.whole_trajectory:
            raise UsageError(f"a {self.manifest.graph} export holds steps, no whole trajectory")
        return self._infer(0, {"noise": noise})[0]

    def _infer(self, k: int, feed: dict[str, Images]) -> list[Images]:
        feed = {name: np.ascontiguousarray(value) for name, value in feed.items()}
        self.signature(k).check_feed(feed)
        return self.infer(k, feed)
