"""See :mod:`tests.doubles`."""

import os
import sys

import pytest

from lutdeploy.cli import cli
from tests.doubles import install
from tests.doubles.tensorrt_double import Controls

if __name__ == "__main__":
    step_seconds = float(os.environ.get("DOUBLE_STEP_SECONDS", "0"))
    install(pytest.MonkeyPatch(), sys.argv.pop(1), Controls(step_seconds=step_seconds))
    cli()
