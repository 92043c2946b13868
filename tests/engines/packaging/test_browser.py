"""The page in a browser: its pictures are lutdeploy's, and every failure is a line in words."""

from __future__ import annotations

import base64
import contextlib
import functools
import http.server
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import pytest
from numpy.typing import NDArray

import lutdeploy
from lutdeploy import images
from lutdeploy.artefacts import files, sample_folder
from lutdeploy.artefacts.picture_text import picture_chunks, read_picture_text
from lutdeploy.artefacts.run import MODEL, Run
from lutdeploy.engines.packaging import web
from lutdeploy.errors import ArtefactError
from lutdeploy.schedule import solver_schedule
from tests.command import succeed
from tests.engines.packaging.javascript import chromium, onnxruntime_web

playwright = pytest.importorskip("playwright.sync_api", reason="needs pip install playwright")

SOLVER, STEPS, COUNT, SEED = "dpmpp-2m", 16, 8, 2**63 + 5
ADDRESS = f"#seed={SEED}&pictures={COUNT}&steps={SOLVER}-{STEPS}"
ISOLATED = {
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Embedder-Policy": "require-corp",
}
# A GPU in software, without float16.
FLAGS = ("--no-sandbox", "--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader")

# Records which steps of the first picture are drawn.
WATCH = """
window.steps = [];
const seen = () => {
  const step = Number(document.querySelector('#pictures canvas').dataset.step);
  if (window.steps.at(-1) !== step) window.steps.push(step);
};
new MutationObserver(seen).observe(document.querySelector('#pictures'),
  { subtree: true, childList: true, attributes: true, attributeFilter: ['data-step'] });
"""

Serve = Callable[..., str]


@pytest.fixture(scope="module")
def run(exported: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = Run(tmp_path_factory.mktemp("runs") / "cats")
    for precision in ("fp32", "fp16"):
        source = exported("static-tanh-64", "step", precision)
        shutil.copytree(source, run.export_folder(source.name))
    shutil.copy(source.parent.parent / MODEL, run.model)
    return run


@pytest.fixture(scope="module")
def runtime(shared_folder: Path) -> Path:
    folder = shared_folder / "npm"
    with filelock.FileLock(shared_folder / "npm.lock"):
        if not (folder / "package").is_dir():
            folder.mkdir(exist_ok=True)
            onnxruntime_web(folder)
    return folder / "package"


@pytest.fixture(scope="module")
def site(run: Run, runtime: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page with its own runtime."""
    folder = tmp_path_factory.mktemp("site") / "site"
    succeed("package", "web", run.path, "--out", folder, "--runtime", runtime)
    return folder


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=chromium(), args=[*FLAGS])
        yield opened
        opened.close()


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Serve a folder; gives its address. ``headers`` go with every answer."""
    servers = []

    def start(folder: Path, headers: dict[str, str] | None = None) -> str:
        class Handler(http.server.SimpleHTTPRequestHandler):
            def end_headers(self) -> None:
                for name, value in (headers or {}).items():
                    self.send_header(name, value)
                super().end_headers()

            def copyfile(self, source: Any, outputfile: Any) -> None:
                with contextlib.suppress(ConnectionError):  # the page wants no more of it
                    super().copyfile(source, outputfile)

            def log_message(self, *arguments: Any) -> None:
                pass

        handler = functools.partial(Handler, directory=str(folder))
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}/"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    """A tab of a phone's width. A mistake in the page's scripts fails the test."""
    context = browser.new_context(viewport={"width": 360, "height": 740})
    opened = context.new_page()
    mistakes: list[str] = []
    opened.on("pageerror", lambda error: mistakes.append(str(error)))
    yield opened
    context.close()
    assert mistakes == []


def make(page: Any) -> str:
    """Press the button; what the page says in the end."""
    page.wait_for_selector("#pictures canvas")
    page.press("#make", "Enter")
    page.wait_for_selector("#make:has-text('Make pictures')", timeout=120_000)
    return str(page.inner_text("#status"))


def drawn(page: Any) -> NDArray[np.int16]:
    """The pictures as they are shown, [n, S, S, 3]."""
    values = page.evaluate(
        "[...document.querySelectorAll('#pictures canvas')].map((canvas) =>"
        " [...canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data])"
    )
    side = round((len(values[0]) / 4) ** 0.5)
    return np.array(values, np.int16).reshape(-1, side, side, 4)[..., :3]


def painted(run: Run, count: int = COUNT) -> NDArray[np.int16]:
    """The same pictures by lutdeploy."""
    denoiser = lutdeploy.load(run.export_folder("step-fp32"), "onnxruntime")
    schedule = solver_schedule(SOLVER, STEPS)
    made = lutdeploy.sample(denoiser, count, seed=SEED, schedule=schedule)
    return images.to_uint8(made).astype(np.int16)


def edited(site: Path, folder: Path, change: Callable[[Any], None]) -> Path:
    """A copy of the page with another page.json."""
    shutil.copytree(site, folder)
    facts = json.loads((folder / web.FACTS).read_text())
    change(facts)
    (folder / web.FACTS).write_text(json.dumps(facts))
    return folder


@pytest.mark.parametrize("threads", [1, 2])
def test_the_pictures_are_lutdeploys(
    threads: int, site: Path, run: Run, serve: Serve, page: Any, tmp_path: Path
) -> None:
    headers = ISOLATED if threads > 1 else {}
    page.goto(serve(site, headers) + ADDRESS)
    page.wait_for_selector("#pictures canvas")
    page.evaluate(WATCH)
    said = make(page)
    assert said.startswith(f"{COUNT} pictures in ")
    there = page.evaluate("Math.min(4, navigator.hardwareConcurrency)") if threads > 1 else 1
    assert page.inner_text("#engine") == (f"WebAssembly, {there} thread{'s' if there > 1 else ''}.")
    shown, expected = drawn(page), painted(run)
    assert expected.std() > 20
    assert abs(shown - expected).max() <= 2
    if threads > 1:
        return
    assert page.evaluate("steps") == [*range(STEPS + 1)], "from the noise, every step"
    # Looking back shows the way there, from the noise on.
    page.focus("#shown")
    page.keyboard.press("Home")
    noise = lutdeploy.sampling.batch_noise(SEED, range(COUNT), (3, 64, 64))
    assert np.array_equal(drawn(page), images.to_uint8(noise))
    page.keyboard.press("End")
    assert np.array_equal(drawn(page), shown)
    with page.expect_download() as saving:
        page.click("#pictures li:nth-child(4) button")
    assert saving.value.suggested_filename == f"{SEED}-3.png"
    saving.value.save_as(tmp_path / "saved.png")
    saved = images.decode_png(tmp_path / "saved.png")
    assert np.array_equal(saved[..., :3], shown[3])
    told, software = read_picture_text(tmp_path / "saved.png")
    expected_text = picture_chunks(
        sample_folder.settings(
            {"model_sha256": files.sha256(run.model)}, solver_schedule(SOLVER, STEPS), SEED, "png"
        ),
        [3],
    )
    assert expected_text[0] in (tmp_path / "saved.png").read_bytes(), "as `sample` writes it"
    assert (told.seed, told.index, software) == (SEED, 3, f"lutdeploy {lutdeploy.__version__}")
    assert f"image 3 of seed {SEED}" in succeed("inspect", tmp_path / "saved.png").stdout
    page.focus("#shown")
    page.keyboard.press("Home")
    with page.expect_download() as saving:
        page.click("#pictures li:nth-child(1) button")
    assert saving.value.suggested_filename == f"{SEED}-0-step0.png"
    saving.value.save_as(tmp_path / "noise.png")
    with pytest.raises(ArtefactError, match="does not say what made it"):
        read_picture_text(tmp_path / "noise.png")
    page.keyboard.press("End")
    assert f"--seed {SEED} --solver {SOLVER} --steps {STEPS}" in page.inner_text("#command")
    assert page.evaluate("document.documentElement.scrollWidth") == 360, "no sideways scrolling"
    page.emulate_media(reduced_motion="reduce")
    page.evaluate("steps.length = 0")
    make(page)
    assert page.evaluate("steps") == [0, STEPS], "no motion on the way"


def test_the_runtime_from_the_cdn(
    run: Run, runtime: Path, serve: Serve, page: Any, tmp_path: Path
) -> None:
    """Its files, answered from here: one with another byte, none, then the right ones."""
    succeed("package", "web", run.path, "--out", tmp_path / "site")
    changed, down = {"ort.wasm.bundle.min.mjs"}, False

    def answer(route: Any) -> None:
        if down:
            route.abort()
            return
        name = route.request.url.removeprefix(web.CDN)
        body = bytearray((runtime / "dist" / name).read_bytes())
        if name in changed:
            body[-1] ^= 1
        route.fulfill(body=bytes(body), headers={"access-control-allow-origin": "*"})

    page.context.route(f"{web.CDN}*", answer)
    page.goto(serve(tmp_path / "site") + f"#pictures=1&steps={SOLVER}-{STEPS}")
    line = "The runtime (ONNX Runtime Web) could not be loaded: cdn.jsdelivr.net"
    assert make(page).startswith(f"{line} sent another file")
    down = True
    assert make(page).startswith(f"{line} does not answer. Check the connection")
    down = False
    changed.clear()
    assert make(page).startswith("1 picture in "), "the next press tries again"


def test_files_that_are_missing_or_cut_off(
    site: Path, serve: Serve, page: Any, tmp_path: Path
) -> None:
    folder = tmp_path / "site"
    shutil.copytree(site, folder)
    weights = folder / "step-fp32" / "weights.bin"
    whole = weights.read_bytes()
    weights.unlink()
    page.goto(serve(folder))
    assert make(page).startswith("The model is missing: the server answered 404 for http")
    weights.write_bytes(whole[:-1])
    assert make(page).startswith("The model could not be loaded: 127.0.0.1")
    assert "sent another file than this page was made with" in page.inner_text("#status")
    (folder / web.FACTS).unlink()
    page.reload()
    page.wait_for_selector("#status:has-text('page.json could not be read')")
    assert page.inner_text("#status").endswith("Package the model again.")
    assert page.is_disabled("#make")


def require_gpu(page: Any) -> None:
    page.wait_for_selector("#pictures canvas")
    if not page.evaluate("navigator.gpu?.requestAdapter().then(Boolean)"):
        pytest.skip("this Chromium has no WebGPU, not even in software")


def test_a_gpu_that_fails_gives_way_and_says_so(
    site: Path, run: Run, serve: Serve, page: Any, tmp_path: Path
) -> None:
    def break_webgpu(facts: Any) -> None:
        facts["engines"][0]["features"] = []
        facts["engines"][0]["files"]["graph"]["url"] = "missing.onnx"

    page.goto(serve(edited(site, tmp_path / "site", break_webgpu)) + ADDRESS)
    require_gpu(page)
    page.fill("#count", "2")
    assert make(page).startswith("2 pictures in ")
    engine = page.inner_text("#engine")
    assert engine.startswith("WebAssembly, 1 thread. Not with webgpu: The model is missing")
    assert abs(drawn(page) - painted(run, 2)).max() <= 2


@pytest.mark.slow
@pytest.mark.parametrize("right", [True, False], ids=["right", "wrong"])
def test_a_gpu_must_paint_a_known_picture(
    right: bool, site: Path, run: Run, serve: Serve, page: Any, tmp_path: Path
) -> None:
    """In float32, which the GPU in software has, in two steps, which it makes soon."""
    schedule = solver_schedule("euler", 2)
    denoiser = lutdeploy.load(run.export_folder("step-fp32"), "onnxruntime")
    expected = images.to_uint8(lutdeploy.sample(denoiser, 1, schedule=schedule))
    known = expected if right else 255 - expected

    def in_float32(facts: Any) -> None:
        webgpu, wasm = facts["engines"]
        webgpu["features"] = []
        for kind in ("graph", "weights"):
            webgpu["files"][kind] = wasm["files"][kind]
        facts["schedules"] = [web.schedule_facts(schedule)]
        facts["check"] = base64.b64encode(known.tobytes()).decode()

    page.goto(serve(edited(site, tmp_path / "site", in_float32)) + "#pictures=1")
    require_gpu(page)
    assert make(page).startswith("1 picture in ")
    engine = page.inner_text("#engine")
    if right:
        assert engine == "WebGPU."
    else:
        assert engine.startswith("WebAssembly, 1 thread. Not with webgpu: its pictures differ")
    assert abs(drawn(page) - expected.astype(np.int16)).max() <= 2


def test_what_cannot_be_asked_for(site: Path, serve: Serve, page: Any) -> None:
    page.goto(serve(site))
    page.wait_for_selector("#pictures canvas")
    for box, wrong, line in (
        ("#seed", "-1", "The seed is a whole number from 0 to 2⁶⁴ − 1."),
        ("#seed", str(2**64), "The seed is a whole number from 0 to 2⁶⁴ − 1."),
        ("#count", "0", "Between 1 and 64 pictures, please."),
        ("#count", "65", "Between 1 and 64 pictures, please."),
    ):
        right = page.input_value(box)
        page.fill(box, wrong)
        page.press("#make", "Enter")
        assert page.inner_text("#problem") == line
        page.fill(box, right)
        page.dispatch_event(box, "change")
        assert page.is_hidden("#problem")
    page.fill("#seed", str(2**64 - 1))
    page.dispatch_event("#seed", "change")
    noise = lutdeploy.sampling.batch_noise(2**64 - 1, range(8), (3, 64, 64))
    assert np.array_equal(drawn(page), images.to_uint8(noise))
    page.click("#another")
    assert page.input_value("#seed") != str(2**64 - 1)


def test_stop(site: Path, serve: Serve, page: Any) -> None:
    page.goto(serve(site) + "#pictures=64&steps=euler-64")
    page.wait_for_selector("#pictures canvas")
    page.click("#make")
    page.wait_for_selector("#status:has-text('Step ')", timeout=60_000)
    page.click("#make")
    assert page.inner_text("#status") == "Stopped."
    page.fill("#count", "1")
    page.select_option("#schedule", "dpmpp-2m-16")
    assert make(page).startswith("1 picture in ")


def test_a_model_that_was_packaged_again_is_not_taken_from_the_cache(
    site: Path, serve: Serve, page: Any, tmp_path: Path
) -> None:
    """Its files have the old names, and an age at which a browser would not ask for news."""
    folder = tmp_path / "site"
    shutil.copytree(site, folder)
    for path in folder.rglob("*"):
        os.utime(path, (1e9, 1e9))
    page.goto(serve(folder) + f"#pictures=1&steps={SOLVER}-{STEPS}")
    assert make(page).startswith("1 picture in ")
    weights = folder / "step-fp32" / "weights.bin"
    data = weights.read_bytes() + bytes(4096)  # as good, under another hash
    weights.write_bytes(data)
    facts = json.loads((folder / web.FACTS).read_text())
    file = facts["engines"][1]["files"]["weights"]
    file |= {"bytes": len(data), "integrity": web.integrity(data)}
    facts["model"]["name"] = "again"
    (folder / web.FACTS).write_text(json.dumps(facts))
    page.reload()
    page.wait_for_selector("h1:has-text('again')")
    assert make(page).startswith("1 picture in ")
