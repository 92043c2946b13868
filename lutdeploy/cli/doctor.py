"""`lutdeploy doctor`."""

from __future__ import annotations

import json

import click

from lutdeploy.cli.console import answer
from lutdeploy.errors import LutDeployError


@click.command("doctor")
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def command(as_json: bool) -> None:
    """Say what is installed, which backends and providers compute here, what is missing.

    Exit code 1 when something that every installation needs is missing.
    """
    import dataclasses

    from lutdeploy.engines.doctor import examine

    findings = examine()
    if as_json:
        answer(json.dumps([dataclasses.asdict(finding) for finding in findings], indent=1))
    else:
        for finding in findings:
            mark = "ok" if finding.works else ("MISSING" if finding.required else "-")
            answer(f"{mark:8}{finding.subject:39} {finding.detail}")
    broken = [finding.subject for finding in findings if finding.required and not finding.works]
    if broken:
        raise LutDeployError(f"missing or broken: {', '.join(broken)}")
