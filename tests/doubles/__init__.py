"""Doubles of what these machines lack: a GPU, and TensorRT's runtime on it."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from lutdeploy.artefacts.manifest import read_manifest
from lutdeploy.artefacts.run import Run
from lutdeploy.engines.tensorrt import plan
from lutdeploy.engines.tensorrt.builder import BuildTarget, GraphBuild, build_export
from lutdeploy.engines.tensorrt.engine import this_machine
from lutdeploy.engines.tensorrt.library import MODULES, RTX
from lutdeploy.engines.tensorrt.network import (
    CHECKED,
    NetworkTypes,
    TypedLayer,
    expected_type,
    read_graph,
)
from lutdeploy.signature import Signature
from tests.doubles.cpu_device import CpuDevice
from tests.doubles.tensorrt_double import Controls, make_plan, make_tensorrt


def install(
    patch: pytest.MonkeyPatch, version: str, controls: Controls, **device: Any
) -> ModuleType:
    """Put the doubles in place of one TensorRT and of every CUDA device; the other is not there.

    Builds make plans for the double: NVIDIA's parser and compiler are tested by themselves.

    Args:
        patch: what undoes it.
        version: of ``tests.doubles.tensorrt_double.VERSIONS``.
        controls: faults and observations.
        device: arguments of every :class:`CpuDevice`.
    """
    trt = make_tensorrt(version, controls)
    for name in MODULES.values():
        patch.setitem(sys.modules, name, trt if name == trt.__name__ else None)

    def make(name: str = "cuda") -> CpuDevice:
        return CpuDevice(name, **device)

    def build(
        self: GraphBuild, precision: str, signature: Signature, timing_cache: Path | None
    ) -> tuple[NetworkTypes, bytes]:
        controls.builds += 1
        return double_build(self, precision)

    for module in ("cuda.device", "tensorrt.job"):
        patch.setattr(f"lutdeploy.engines.{module}.CudaDevice", make)
    patch.setattr(GraphBuild, "build", build)
    return trt


def double_build(build: GraphBuild, precision: str) -> tuple[NetworkTypes, bytes]:
    """A plan for the double, and the types that NVIDIA's parser should give to the layers."""
    profiles = build.options.profiles
    static = profiles[0].max if len(profiles) == 1 and profiles[0].static else None
    model = read_graph(build.path, static)
    untyped = [
        TypedLayer(node.name, CHECKED[node.op_type], "")
        for node in model.graph.node
        if node.op_type in CHECKED
    ]
    layers = [replace(layer, dtype=expected_type(layer, precision)) for layer in untyped]
    shapes = [] if static else [(p.min, p.opt, p.max) for p in profiles]
    data = make_plan(build.trt.__name__, build.trt.__version__, model, profiles=shapes)
    return NetworkTypes(tuple(layers), ()), data


def write_plans(
    run: Run, backend: str, batch: str = "1:2:4", architectures: tuple[str, ...] = ("8.9",)
) -> list[plan.PlanRecord]:
    """Engines of a run's newest export that were compiled and never run."""
    machine = this_machine(backend, None if backend == RTX else CpuDevice())
    target = BuildTarget(machine, architectures if backend == RTX else ())
    options = plan.BuildOptions(plan.parse_batches(batch))
    manifest = read_manifest(run.exports()[0])
    built = build_export(
        run, manifest, options, target, None, False, lambda k, phase: None, lambda text: None
    )
    return [record for record, _ in built]
