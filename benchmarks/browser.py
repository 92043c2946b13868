"""The web page of a model in headless Chromium: opening time, pictures per second, correctness.

    python -m benchmarks.browser SITE --run runs/NAME

SITE was written by `lutdeploy package web RUN --out SITE --runtime DIR`. It is served from here,
without and with the headers that let WebAssembly use threads. Processor time is that of all of the
browser's processes, and tells what an idle machine would do where this one is busy.
"""

from __future__ import annotations

import contextlib
import functools
import http.server
import re
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import click
import numpy as np
import psutil
from playwright.sync_api import Page, sync_playwright

import lutdeploy
from lutdeploy import images
from lutdeploy.artefacts import files
from lutdeploy.artefacts.run import Run
from lutdeploy.artefacts.tuned_steps import fitted_schedules
from lutdeploy.machine import this_machine

COUNT, ROUNDS = 8, 3
ISOLATED = {
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Embedder-Policy": "require-corp",
}


@contextlib.contextmanager
def served(folder: Path, headers: dict[str, str]) -> Iterator[str]:
    class Handler(http.server.SimpleHTTPRequestHandler):
        def end_headers(self) -> None:
            for name, value in headers.items():
                self.send_header(name, value)
            super().end_headers()

        def log_message(self, *arguments: Any) -> None:
            pass

    handler = functools.partial(Handler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


def processor_seconds() -> float:
    """What this process's children have used so far."""
    total = 0.0
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            times = child.cpu_times()
            total += times.user + times.system
    return total


def press(page: Page) -> tuple[float, float]:
    """Seconds from the press to the end, and pictures per second as the page says."""
    start = time.perf_counter()
    page.click("#make")
    page.wait_for_selector("#make:has-text('Make pictures')", timeout=300_000)
    took = time.perf_counter() - start
    found = re.search(r"in ([\d.]+) seconds, ([\d.]+) a second", page.inner_text("#status"))
    if found is None:
        raise click.ClickException(page.inner_text("#status"))
    return took, float(found[2])


@click.command()
@click.argument("site", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--run", required=True, type=click.Path(path_type=Path, exists=True))
@click.option("--screenshots", type=click.Path(path_type=Path), help="Folder for three of them.")
def main(site: Path, run: Path, screenshots: Path | None) -> None:
    """Measure SITE and compare its pictures with lutdeploy's."""
    click.echo(f"{this_machine().describe()}; medians of {ROUNDS}")
    size = sum(path.stat().st_size for path in site.rglob("*") if path.is_file())
    click.echo(f"folder: {size / 1e6:.1f} MB")
    denoiser = lutdeploy.load(Run(run).export_folder("step-fp32"), "onnxruntime")
    schedule = fitted_schedules(run, files.sha256(Run(run).model))[0]
    expected = images.to_uint8(lutdeploy.sample(denoiser, COUNT, schedule=schedule))
    with sync_playwright() as started:
        path = shutil.which("chromium")
        browser = started.chromium.launch(executable_path=path, args=["--no-sandbox"])
        for headers in ({}, ISOLATED):
            with served(site, headers) as address:
                shown, opened, rates, processor = [], [], [], []
                for _ in range(ROUNDS):
                    page = browser.new_page(viewport={"width": 1200, "height": 900})
                    start = time.perf_counter()
                    page.goto(address)
                    page.wait_for_selector("#pictures canvas")
                    shown.append(time.perf_counter() - start)
                    took, rate = press(page)
                    opened.append(took - COUNT / rate)
                    before = processor_seconds()
                    rates.append(press(page)[1])
                    processor.append((processor_seconds() - before) / COUNT)
                    engine = page.inner_text("#engine")
                    values = page.evaluate(
                        "[...document.querySelectorAll('#pictures canvas')].map((canvas) =>"
                        " [...canvas.getContext('2d')"
                        ".getImageData(0, 0, canvas.width, canvas.height).data])"
                    )
                    page.close()
                drawn = np.array(values, np.int16).reshape(*expected.shape[:3], 4)[..., :3]
                click.echo(
                    f"{engine} page {median(shown):.2f} s, model {median(opened):.2f} s, "
                    f"{schedule.describe()}: {median(rates):.1f} pictures/s, "
                    f"{median(processor):.2f} s of processor time a picture, "
                    f"largest difference {abs(drawn - expected).max()} of 255"
                )
        if screenshots is not None:
            with served(site, {}) as address:
                for name, width, scheme in (
                    ("desktop", 1200, "light"),
                    ("dark", 1200, "dark"),
                    ("phone", 360, "light"),
                ):
                    context = browser.new_context(
                        viewport={"width": width, "height": 800}, color_scheme=scheme
                    )
                    page = context.new_page()
                    page.goto(address)
                    page.wait_for_selector("#pictures canvas")
                    press(page)
                    page.screenshot(path=screenshots / f"{name}.png", full_page=True)
                    context.close()
        browser.close()


if __name__ == "__main__":
    main()
