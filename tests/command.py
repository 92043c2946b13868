"""The command line, run in this process."""

from __future__ import annotations

from click.testing import CliRunner, Result

from lutdeploy.cli import cli

# What a command may say on stderr before it fails: notes and a progress bar.
NOTES = (
    "warning: ",
    "backend: ",
    "`lutdeploy parity` has not ",
    "machine: ",
    "model: ",
    "hub: ",
    "run: ",
    "data: ",
    "learning rate: ",
    "  skipped ",
    "inferred: ",
    "this export ",
    "export: ",
    "checking ",
    "their checks ",
    "layers: ",
    "auto: ",
    "measuring ",
    "step-int8 differs ",
    "pictures: ",
    "sample ",
    "train ",
    "tune ",
    "the teacher's schedule ",
    "fit ",
    "paths ",
    "read ",
    "data ",
    "evaluate ",
    "evaluate, ",
)


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


def succeed(*arguments: object) -> Result:
    result = invoke(*arguments)
    assert result.exit_code == 0, result.stderr
    return result


def fail(code: int, *arguments: object) -> str:
    """The one line with which a command that exits with ``code`` says why."""
    result = invoke(*arguments)
    assert result.stdout == ""
    assert result.exit_code == code, result.output
    return error_line(result.stderr)


def error_line(stderr: str) -> str:
    """The last line of stderr, the only one besides notes."""
    *before, last = [line for line in stderr.splitlines() if line.strip()]
    assert last.startswith("error: ")
    others = [line for line in before if not line.startswith(NOTES)]
    assert [line for line in others if " images are there already" not in line] == []
    return last
