"""`lutdeploy` with a clock around the engine.

    python -m benchmarks.engine_clock FILE.json sample RUN …

Runs the command line as it is, and writes the seconds spent inside the engine's calls.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lutdeploy import engines
from lutdeploy.artefacts import files
from lutdeploy.cli import cli


class Clock:
    """Adds up the time inside the calls that it wraps."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def around(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any, **options: Any) -> Any:
            start = time.perf_counter()
            try:
                return call(*arguments, **options)
            finally:
                self.seconds += time.perf_counter() - start

        return timed


def main() -> None:
    clock, report, opened = Clock(), Path(sys.argv.pop(1)), engines.open_engine

    def open_engine(*arguments: Any, **options: Any) -> Any:
        engine: Any = opened(*arguments, **options)
        for name in ("step", "run", "predict_x0"):
            setattr(engine, name, clock.around(getattr(engine, name)))
        return engine

    engines.open_engine = open_engine
    try:
        cli()
    finally:
        files.write_json(report, {"engine_seconds": clock.seconds})


if __name__ == "__main__":
    main()
