"""`lutdeploy parity`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import click

from lutdeploy.cli.console import answer, note, show_report
from lutdeploy.cli.requests import (
    ENGINE_BACKENDS,
    POSITIVE,
    SEED,
    engine_request,
    schedule_request,
)
from lutdeploy.engines import EngineRequest, open_engine
from lutdeploy.errors import ParityError, UsageError
from lutdeploy.schedule import ScheduleRequest


@click.command("parity")
@engine_request(
    backends=ENGINE_BACKENDS,
    default=None,
    backend_help="Default: onnxruntime.",
    leave_out=("batch", "unverified"),
)
@click.option("--all", "everything", is_flag=True, help="Every engine that can run here.")
@click.option("--fp16", is_flag=True, help="The newest fp16 export.")
@click.option("-n", "count", type=POSITIVE, default=4, show_default=True, help="Images.")
@SEED
@schedule_request
@click.option(
    "--save-polygraphy",
    "replay",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="DIR",
    help="Write inputs and reference outputs for Polygraphy, and print the commands that replay "
    "them on a machine with TensorRT.",
)
@click.pass_context
def command(
    context: click.Context,
    /,
    engine: EngineRequest,
    schedule: ScheduleRequest,
    everything: bool,
    fp16: bool,
    count: int,
    seed: int,
    replay: Path | None,
) -> None:
    """Compare a backend with PyTorch float32: step, trajectory, pictures.

    Exit code 1 when a limit is passed. The verdict is kept in the run, where `sample` looks for
    failures and `--backend auto` for what it may take.
    """
    from lutdeploy.engines.judge import (
        Judge,
        judge_everything,
        judged_precision,
        request_to_judge,
        save_replay,
    )

    if everything and replay is not None:
        raise UsageError("--save-polygraphy is for one export; leave out --all")
    if everything:
        named = ("backend", "export", "device", "provider", "precision")
        if fp16 or any(context.params.get(name) for name in named):
            raise UsageError("--all judges every engine that can run here; leave out which")
    judge = Judge(engine.path, schedule, count, seed, note)
    if everything:
        failed = []
        for judged in judge_everything(judge, engine.threads):
            if judged.report is None:
                answer(f"{judged.name}: not judged: {judged.refused}")
                continue
            report = judged.report
            verdict = f"PSNR {report.final.psnr:.1f} dB, {report.schedule.describe()}"
            if report.passed:
                answer(f"{judged.name}: passed, {verdict}")
            else:
                failed.append(judged.name)
                answer(f"{judged.name}: FAILED, {verdict}; {report.failures()[0]}")
        if failed:
            raise ParityError(f"parity failed: {', '.join(failed)}")
        return
    wanted = replace(engine, path=judge.path, batch=count, unverified=True)
    wanted = request_to_judge(judge, wanted, fp16)
    if replay is not None:
        if wanted.backend == "torch":
            raise UsageError("--save-polygraphy is for an export; --backend torch runs none")
        for line in save_replay(judge, wanted, replay):
            answer(line)
        return
    with open_engine(wanted, note) as denoiser:
        report = judge.judge(denoiser, judged_precision(wanted))
    show_report(report)
    if not report.passed:
        raise ParityError(f"parity failed: {'; '.join(report.failures()[:2])}")
    answer("parity: passed")
