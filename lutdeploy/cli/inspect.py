"""`lutdeploy inspect`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from lutdeploy.artefacts.run import Run
from lutdeploy.artefacts.target import resolve
from lutdeploy.cli.console import answer, note


@click.command("inspect")
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def command(path: Path, as_json: bool) -> None:
    """Say what a run, an export or a model file is, and verify its files.

    Of a PNG that `lutdeploy sample` wrote, say what made it.
    """
    from lutdeploy.engines.inspection import inspect_path

    path = resolve(path, note)
    machines = {}
    if path.is_dir() and Run(path).plan_records():
        from lutdeploy.engines import tensorrt_machines

        machines = tensorrt_machines()
    found = inspect_path(path, machines)
    if as_json:
        answer(json.dumps(found, indent=1))
        return
    for line in _describe(found):
        answer(line)


def _describe(found: dict[str, Any], indent: str = "") -> Iterator[str]:
    if found["kind"] == "run":
        yield f"{indent}run {found['path']}"
        yield from _describe(found["model"], indent + "  ")
        for part in found["exports"]:
            yield from _describe(part, indent + "  ")
        for engine in found["engines"]:
            yield from _describe_engine(engine, indent + "  ")
        for verdict in found["verdicts"]:
            word = "passed" if verdict["passed"] else "FAILED"
            engine = f"{verdict['export'] or 'model'} {verdict['backend']} {verdict['device']}"
            yield f"{indent}  {verdict['check']} {engine}: {word} ({verdict['solver']})"
        if tuned := found["tuned_steps"]:
            names = ", ".join(tuned["schedules"]) or "none"
            yield f"{indent}  fitted schedules: {tuned['problem'] or names}"
        return
    if found["kind"] == "picture":
        yield from _describe_picture(found, indent)
        return
    config = found["config"]
    if found["kind"] == "model":
        yield f"{indent}model {found['path']}"
        yield (
            f"{indent}  {found['preset']}, {found['parameters'] / 1e6:.3f} M parameters, "
            f"{'/'.join(found['dtypes'])}, {found['bytes'] / 1e6:.1f} MB"
        )
        if found["unverified"]:
            yield f"{indent}  not verified: {found['unverified']}"
        if origin := found["distilled"]:
            yield (
                f"{indent}  distilled to {len(origin['schedule']['rows'])} steps from "
                f"{origin['teacher']} ({origin['teacher_steps']} steps), sha256 "
                f"{origin['teacher_sha256'][:12]}…"
                + (f", guided with weight {origin['guidance']:g}" if origin["guidance"] else "")
            )
    else:
        solver = f", {found['solver']}" if found["solver"] else ""
        stale = "; STALE: the model has changed since" if found.get("stale") else ""
        yield f"{indent}export {found['path']}"
        yield (
            f"{indent}  {found['preset']}, {found['graph']}, {found['precision']}{solver}, "
            f"{found['graphs']} graph(s), opset {found['opset']}, {found['bytes'] / 1e6:.1f} MB"
        )
        yield f"{indent}  files verified by sha256; exported {found['created']}{stale}"
        if found["quantization"]:
            narrow, kept = (
                found["quantization"][f"{kind}_products"] for kind in ("int8", "float32")
            )
            also = f", for their sensitivity in float32: {', '.join(kept)}" if kept else ""
            yield f"{indent}  {len(narrow)} of {len(narrow) + len(kept)} matmuls in int8{also}"
        if found["islands"]:
            yield f"{indent}  float32 islands: {'; '.join(found['islands'])}"
    yield (
        f"{indent}  {config['image_size']}×{config['image_size']}×{config['channels']}, width "
        f"{config['width']}, depth {config['depth']}, {config['heads']} heads, K "
        f"{config['entries']}; {found['gflop_per_image_and_step']} GFLOP per image and step"
    )


def _describe_picture(found: dict[str, Any], indent: str) -> Iterator[str]:
    what = f"image {found['index']}"
    if found["images"] is not None:
        steps = "the noise and steps of " * found["trajectory"]
        what = f"{steps}images {found['images'][0]} to {found['images'][1]}"
    warp = f", shift {found['shift']:g}" if found["shift"] != 1 else ""
    yield f"{indent}picture {found['path']}"
    yield f"{indent}  {what} of seed {found['seed']}, {found['solver']}-{found['steps']}{warp}"
    known = f" ({found['model']})" if found["model"] else ", which is neither in the package nor"
    known += "" if found["model"] else " under runs/"
    yield f"{indent}  model sha256 {found['model_sha256']}{known}"
    # From a file of anybody's: as text without control characters.
    software = ascii(found["software"])[1:-1]
    yield f"{indent}  made with {software or 'software that it does not name'}"
    if found["command"]:
        yield f"{indent}  again: {found['command']}"


def _describe_engine(found: dict[str, Any], indent: str) -> Iterator[str]:
    yield f"{indent}engine {found['path']}"
    if "fields" in found:
        fields = found["fields"]
        yield (
            f"{indent}  of {found['export']}/{found['graph_file']}, batch {fields['batch']}, "
            f"{fields['precision']}, {found['bytes'] / 1e6:.1f} MB, checks: {found['verdict']}"
        )
        place = (
            f"architectures {', '.join(fields['architectures'])}"
            if "architectures" in fields
            else f"CUDA {fields['cuda']}, {fields['gpu']}, compute capability "
            f"{fields['compute_capability']}"
        )
        yield f"{indent}  {fields['backend']} {fields['tensorrt']}, {place}"
        yield f"{indent}  {', '.join(f'{n} {kind}' for kind, n in found['types'].items())}"
    if not found["machine_compared"]:
        yield f"{indent}  not compared with this machine: TensorRT or the GPU is missing here"
    for reason in found["stale"]:
        yield f"{indent}  STALE: {reason}"
