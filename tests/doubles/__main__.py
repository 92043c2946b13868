"""See :mod:`tests.doubles`."""

import os
import signal
import sys
from pathlib import Path

import pytest

from lutdeploy.cli import cli
from tests.doubles import install
from tests.doubles.tensorrt_double import Controls

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # tests in the background ignore it
    controls = Controls(
        step_seconds=float(os.environ.get("DOUBLE_STEP_SECONDS", "0")),
        building=Path(os.environ["DOUBLE_BUILDING"]),
    )
    install(pytest.MonkeyPatch(), sys.argv.pop(1), controls)
    cli()
