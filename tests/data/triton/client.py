"""Clients of a running Triton, for test_triton.py: what they were answered, as one JSON object.

Runs in the environment of requirements.txt: ``client.py HTTP_PORT GRPC_PORT PICTURES LOAD GROUP``.
Pictures are PNG or raw bytes in hexadecimal.
"""

from __future__ import annotations

import concurrent.futures
import itertools
import json
import queue
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tritonclient.grpc
from tritonclient.utils import InferenceServerException

HTTP, GRPC = (f"127.0.0.1:{port}" for port in sys.argv[1:3])
PICTURES, LOAD = map(int, sys.argv[3:5])
SEED = 3
CLIENT = tritonclient.grpc.InferenceServerClient(GRPC)


def http(path: str, body: Any = None) -> tuple[int, Any]:
    """Status and answer of a request, as curl would make it."""
    data = None if body is None else json.dumps(body).encode()
    try:
        with urllib.request.urlopen(f"http://{HTTP}/v2/{path}", data, timeout=60) as answer:
            return answer.status, json.loads(answer.read() or "null")
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def http_inputs(
    seed: list[float], index: list[float], datatype: str = "UINT64", shape: Sequence[int] = (1, 1)
) -> list[dict[str, Any]]:
    return [
        {"name": name, "datatype": datatype, "shape": shape, "data": data}
        for name, data in (("SEED", seed), ("INDEX", index))
    ]


def http_picture(model: str, seed: int, index: int) -> str:
    _, answer = http(f"models/{model}/infer", {"inputs": http_inputs([seed], [index])})
    return bytes(answer["outputs"][0]["data"]).hex()


def grpc_inputs(
    seeds: list[int], indices: list[int], dtype: type = np.uint64, datatype: str = "UINT64"
) -> list[Any]:
    inputs = []
    for name, values in (("SEED", seeds), ("INDEX", indices)):
        column: Any = np.array(values, dtype)[:, None]
        inputs.append(tritonclient.grpc.InferInput(name, column.shape, datatype))
        inputs[-1].set_data_from_numpy(column)
    return inputs


def grpc_pictures(
    model: str, seeds: list[int], indices: list[int], output: str = "IMAGE"
) -> list[str]:
    answer = CLIENT.infer(model, grpc_inputs(seeds, indices), client_timeout=60)
    rows = answer.as_numpy(output)
    return [(row[0] if output == "IMAGE_PNG" else row.tobytes()).hex() for row in rows]


def grpc_refusal(inputs: list[Any], model: str = "cats") -> str | None:
    try:
        CLIENT.infer(model, inputs, client_timeout=60)
    except InferenceServerException as error:
        return str(error.message())
    return None


def unlucky() -> int:
    """The first picture of SEED whose noise tests/data/triton/denoiser.py refuses."""
    for index in itertools.count():
        generator = np.random.Generator(np.random.Philox(key=SEED | index << 64))
        if generator.standard_normal(1, np.float32)[0] > 3:
            return index
    raise AssertionError


def stream_refusal(model: str, index: int) -> str | None:
    try:
        stream(model, index)
    except InferenceServerException as error:
        return str(error.message())
    return None


def stream(model: str, index: int) -> list[tuple[int, str]]:
    """(STEP, IMAGE) of every response, in order."""
    told: queue.Queue[tuple[Any, Any]] = queue.Queue()
    client = tritonclient.grpc.InferenceServerClient(GRPC)
    client.start_stream(lambda result, error: told.put((result, error)))
    client.async_stream_infer(model, grpc_inputs([SEED], [index]), enable_empty_final_response=True)
    seen = []
    while True:
        result, error = told.get(timeout=60)
        if error is not None:
            raise error
        if result.get_response().parameters["triton_final_response"].bool_param:
            break
        step = int(result.as_numpy("STEP")[0, 0])
        seen.append((step, result.as_numpy("IMAGE")[0].tobytes().hex()))
    client.stop_stream()
    return seen


def statistics(model: str = "cats") -> dict[str, int]:
    (told,) = http(f"models/{model}/stats")[1]["model_stats"]
    return {
        "pictures": told["inference_count"],
        "batches": told["execution_count"],
        "hits": told["inference_stats"]["cache_hit"]["count"],
    }


def at_once(count: int, task: Callable[[int], Any]) -> list[Any]:
    with concurrent.futures.ThreadPoolExecutor(count) as threads:
        return list(threads.map(task, range(count)))


def bad_or_good(index: int) -> int | str:
    """Of requests that wait together, every other one is malformed."""
    if index % 2:
        return http("models/cats/infer", {"inputs": http_inputs([-1], [index])})[0]
    return http_picture("cats", SEED, 1000 + index)


def processes() -> list[Path]:
    """The server and the processes of its Python models, which are all in its group."""
    mine = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[2]) == int(sys.argv[5]):
            mine.append(folder)
    return mine


def memory() -> int:
    """Bytes that the server's processes hold."""
    pages = [int((folder / "statm").read_text().split()[1]) for folder in processes()]
    return sum(pages) * 4096


def load(first: int, count: int) -> int:
    """Ask for ``count`` new pictures, 16 at a time."""
    with concurrent.futures.ThreadPoolExecutor(16) as threads:
        asked = (threads.submit(grpc_pictures, "cats", [9], [first + k]) for k in range(count))
        return len({future.result()[0] for future in list(asked)})


answers: dict[str, Any] = {}
answers["ready"] = http("health/ready")[0]
answers["http"] = [http_picture("cats", SEED, index) for index in range(2)]
before = statistics()
answers["again"] = [http_picture("cats", SEED, index) for index in range(2)]
answers["again_statistics"] = [before, statistics()]
answers["png"] = [
    grpc_pictures("cats_png", [SEED], [0], "IMAGE_PNG")[0],
    grpc_pictures("cats_png", [SEED] * 2, [1, 2], "IMAGE_PNG")[1],
]
before = statistics()
answers["at_once"] = at_once(
    PICTURES, lambda index: grpc_pictures("cats", [SEED], [100 + index])[0]
)
answers["at_once_statistics"] = [before, statistics()]
answers["batch"] = grpc_pictures("cats", [SEED, 2**64 - 1], [200, 2**64 - 1])
answers["bad"] = {
    "negative": http("models/cats/infer", {"inputs": http_inputs([-1], [0])}),
    "too large": http("models/cats/infer", {"inputs": http_inputs([2**64], [0])}),
    "fraction": http("models/cats/infer", {"inputs": http_inputs([0.5], [0])}),
    "type": http("models/cats/infer", {"inputs": http_inputs([0], [0], "INT64")}),
    "shape": http("models/cats/infer", {"inputs": http_inputs([0, 0], [0, 0], shape=(1, 2))}),
    "rank": http("models/cats/infer", {"inputs": http_inputs([0], [0], shape=(1,))}),
    "missing": http("models/cats/infer", {"inputs": http_inputs([0], [0])[:1]}),
    "grpc type": [400, {"error": grpc_refusal(grpc_inputs([-1], [0], np.int64, "INT64"))}],
    "too many": [400, {"error": grpc_refusal(grpc_inputs([0] * 65, [0] * 65))}],
}
answers["mixed"] = at_once(16, bad_or_good)
answers["stream"] = stream("cats_stream", 0)
answers["asked"] = grpc_pictures("gpu", [SEED], [0])
answers["asked_statistics"] = statistics("gpu_denoiser")
answers["asked_stream"] = stream("gpu_stream", 0)
failing = unlucky()
answers["failures"] = [
    grpc_refusal(grpc_inputs([SEED], [failing]), "gpu"),
    grpc_refusal(grpc_inputs([SEED], [failing]), "gpu"),
    grpc_refusal(grpc_inputs([SEED], [failing]), "gpu_png"),
    stream_refusal("gpu_stream", failing),
]
answers["asked_after"] = grpc_pictures("gpu", [SEED], [1])
load(0, 500)
answers["memory"] = [memory()]
answers["different"] = load(500, LOAD)
answers["memory"].append(memory())
answers["ready_at_the_end"] = http("health/ready")[0]
print(json.dumps(answers))
