"""What NVIDIA's compiler makes of the models of the package, without a GPU.

    python -m benchmarks.tensorrt_rtx [--steps 4] > table.md

Exports every preset in every kind of graph and both precisions, builds each with TensorRT for RTX
for one architecture at a time, and prints the plan's size in MB and the seconds of the build, or
why it was refused. docs/tensorrt.md quotes the table.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

from lutdeploy.artefacts import files, shipped
from lutdeploy.artefacts.checkpoint import load_model
from lutdeploy.artefacts.manifest import Manifest, read_manifest
from lutdeploy.artefacts.run import Run
from lutdeploy.engines.export.graphs import ExportPlan, export_model
from lutdeploy.engines.tensorrt.builder import BuildTarget, GraphBuild
from lutdeploy.engines.tensorrt.engine import this_machine
from lutdeploy.engines.tensorrt.library import RTX
from lutdeploy.engines.tensorrt.plan import BatchProfile, BuildOptions
from lutdeploy.errors import BackendError
from lutdeploy.schedule import solver_schedule
from lutdeploy.signature import GRAPHS, graph_signature

ARCHITECTURES = ("7.5", "8.0", "8.6", "8.9", "12.0", "12.1")
OPTIONS = BuildOptions(profiles=(BatchProfile(1, 64, 64),))


def build_cell(manifest: Manifest, architecture: str) -> str:
    """Size and seconds of the first graph's plan, or the reason why there is none."""
    target = BuildTarget(this_machine(RTX), (architecture,))
    signature = graph_signature(manifest.config, manifest.graph, manifest.schedule, 0)
    path = manifest.folder / manifest.graphs[0]
    build = GraphBuild(path, OPTIONS, target, lambda _: None, print)
    start = time.perf_counter()
    try:
        _, data = build.build(manifest.precision, signature, None)
    except BackendError as error:
        return "refused: FP32 matmul" if "FP32 GEMM" in str(error) else f"refused: {error}"
    return f"{len(data) / 1e6:.1f} MB, {time.perf_counter() - start:.1f} s"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=4, help="of per-step and loop graphs")
    steps = parser.parse_args().steps
    print("| model | graph | " + " | ".join(f"SM {a}" for a in ARCHITECTURES) + " |")
    print("|---|---|" + "---|" * len(ARCHITECTURES))
    with tempfile.TemporaryDirectory() as folder:
        for name in shipped.names():
            path = shipped.model_path(name)
            run, model = Run(Path(folder) / name), load_model(path)
            for graph in GRAPHS:
                for precision in ("fp16", "fp32"):
                    schedule = None if graph == "step" else solver_schedule("euler", steps)
                    plan = ExportPlan(graph, precision, schedule)
                    manifest = read_manifest(export_model(model, plan, run, files.sha256(path)))
                    cells = [build_cell(manifest, a) for a in ARCHITECTURES]
                    print(f"| {name} | {plan.name} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
