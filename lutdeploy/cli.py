"""The command line: the commands together, and what becomes of their errors.

Heavy modules are imported inside the commands, so that --help is immediate.
"""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Iterator
from typing import Any

import click

from lutdeploy import __version__
from lutdeploy.commands.bench import bench
from lutdeploy.commands.build import build
from lutdeploy.commands.console import INTERRUPTED, stop_with
from lutdeploy.commands.doctor import doctor
from lutdeploy.commands.evaluate import evaluate
from lutdeploy.commands.export import export
from lutdeploy.commands.import_ import import_
from lutdeploy.commands.inspect import inspect
from lutdeploy.commands.models import models
from lutdeploy.commands.parity import parity
from lutdeploy.commands.sample import sample
from lutdeploy.commands.train import train
from lutdeploy.commands.tune_steps import tune_steps
from lutdeploy.errors import LutDeployError

OUT_OF_MEMORY = "out of memory; try a smaller --batch"


@contextlib.contextmanager
def _interrupts() -> Iterator[None]:
    """What libraries make of a Ctrl-C, an import error say, is a KeyboardInterrupt again."""
    pressed: list[int] = []

    def press(number: int, frame: Any) -> None:
        pressed.append(number)
        raise KeyboardInterrupt

    before = signal.getsignal(signal.SIGINT)
    if before is not signal.SIG_IGN:  # a shell's background job is told to ignore it
        signal.signal(signal.SIGINT, press)
    try:
        yield
    except Exception as error:
        if pressed:
            raise KeyboardInterrupt from error
        raise
    finally:
        signal.signal(signal.SIGINT, before)


class OneLineErrors(click.Group):
    """Errors as one line on stderr: exit code 2 for usage, 1 for failure, 130 for Ctrl-C."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        kwargs["standalone_mode"] = False
        try:
            with _interrupts():
                code = super().main(*args, **kwargs)
        except click.ClickException as error:
            stop_with(error.format_message(), error.exit_code)
        except LutDeployError as error:
            stop_with(str(error), error.exit_code)
        except (click.Abort, KeyboardInterrupt):
            stop_with("interrupted", INTERRUPTED)
        except BrokenPipeError:
            sys.stderr.close()  # nobody reads; the interpreter would complain at exit
            sys.exit(1)
        except OSError as error:
            where = f"{error.filename}: " if error.filename else ""
            stop_with(f"{where}{error.strerror or error}", 1)
        except MemoryError:
            stop_with(OUT_OF_MEMORY, 1)
        except RuntimeError as error:  # PyTorch's allocators raise nothing more telling
            if not ("memory" in str(error) and "allocate" in str(error)):
                raise
            stop_with(OUT_OF_MEMORY, 1)
        sys.exit(code if isinstance(code, int) else 0)


@click.group(
    cls=OneLineErrors,
    context_settings={"help_option_names": ["-h", "--help"]},
    invoke_without_command=True,
)
@click.version_option(__version__, prog_name="lutdeploy")
@click.pass_context
def cli(context: click.Context, /) -> None:
    """Train, export, verify and sample LUT denoisers.

    Commands that take a RUN use the newest run under runs/ when none is given, and the
    model that comes with the package when there is none.
    """
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


for command in (
    train,
    import_,
    export,
    build,
    parity,
    tune_steps,
    sample,
    evaluate,
    bench,
    inspect,
    models,
    doctor,
):
    cli.add_command(command)


if __name__ == "__main__":
    cli()
