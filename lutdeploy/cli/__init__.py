"""The command line: a lazy group of commands, and how their errors are shown.

A command is imported when it is run, so `lutdeploy --help` loads none of them.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import signal
import sys
from collections.abc import Iterator
from typing import Any

import click

from lutdeploy import __version__
from lutdeploy.cli.console import (
    discard_streams,
    interrupted_code,
    prepare_streams,
    stop_with,
)
from lutdeploy.errors import LutDeployError, Terminated, needing, ran_out_of_memory
from lutdeploy.machine import limit_threads

OUT_OF_MEMORY = "out of memory; try a smaller --batch"
# Command → its short help; module lutdeploy.cli.NAME holds it, with - as _.
COMMANDS = {
    "train": "Train a model on a folder of images.",
    "import": "Turn a checkpoint (.pth, .safetensors) into a run.",
    "export": "Export a run to ONNX and check it against PyTorch.",
    "build": "Build TensorRT engines from an export and check them.",
    "parity": "Compare a backend with float32 PyTorch.",
    "tune-steps": "Fit schedules of few steps to a model.",
    "distill": "Train a model that needs only a few steps.",
    "sample": "Sample images into a folder.",
    "evaluate": "Measure quality, diversity and memorisation.",
    "bench": "Measure images a second with every backend.",
    "inspect": "Describe a run, an export, a model file or a picture.",
    "package": "Package a model for Triton, browsers or the Hub.",
    "models": "List the trained models of the package.",
    "doctor": "Check what is installed and what runs here.",
}


@contextlib.contextmanager
def _interrupts() -> Iterator[None]:
    """Raise KeyboardInterrupt on Ctrl-C and Terminated on SIGTERM.

    They are raised even where a library turns them into another error.
    """
    caught: list[type[KeyboardInterrupt]] = []

    def stop(number: int, frame: Any) -> None:
        caught.append(Terminated if number == signal.SIGTERM else KeyboardInterrupt)
        raise caught[-1]

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:  # a shell's background job is told to ignore Ctrl-C
            signal.signal(number, stop)
    try:
        yield
    except Exception as error:
        if caught:
            raise caught[-1] from error
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class LazyGroup(click.Group):
    """Imports a command when it is run; prints each error as one line on stderr.

    Exit codes: 2 for wrong usage, 1 for a failure, 130 for Ctrl-C, 143 for SIGTERM.
    """

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        name = cmd_name.replace("-", "_")
        module = importlib.import_module(f"lutdeploy.cli.{name}{'_' * (name == 'import')}")
        command: click.Command = module.command
        return command

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; where a package for it is missing, say which extra brings it."""
        try:
            return super().invoke(ctx)
        except ImportError:
            with needing(f"lutdeploy {ctx.invoked_subcommand}"):
                raise

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def main(self, *args: Any, **kwargs: Any) -> Any:
        kwargs["standalone_mode"] = False
        # What is left at the end goes with the process: a search for rings takes 30 ms after numpy
        # and a runtime were imported.
        atexit.register(gc.freeze)
        prepare_streams()
        limit_threads()
        try:
            with _interrupts():
                code = super().main(*args, **kwargs)
            sys.stdout.flush()
        except click.ClickException as error:
            stop_with(error.format_message(), error.exit_code)
        except LutDeployError as error:
            stop_with(str(error), error.exit_code)
        except (click.Abort, KeyboardInterrupt) as stop:
            stop_with("interrupted", interrupted_code(stop))
        except BrokenPipeError:
            discard_streams()
            sys.exit(1)
        except OSError as error:
            where = f"{error.filename}: " if error.filename else ""
            stop_with(f"{where}{error.strerror or error}", 1)
        except Exception as error:
            if not ran_out_of_memory(error):
                raise
            stop_with(OUT_OF_MEMORY, 1)
        sys.exit(code if isinstance(code, int) else 0)


@click.group(
    cls=LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"]},
    invoke_without_command=True,
)
@click.version_option(__version__, prog_name="lutdeploy")
@click.pass_context
def cli(context: click.Context, /) -> None:
    """Train, export, verify and sample LUT denoisers.

    Commands that take a RUN use the newest run under runs/ when none is given, and the
    model that comes with the package when there is none. A model on the Hugging Face Hub is
    the RUN hf://OWNER/NAME.
    """
    if context.invoked_subcommand is None:
        click.echo(context.get_help())
