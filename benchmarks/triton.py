"""How many pictures a second a running Triton answers, and how long each request takes.

    python benchmarks/triton.py cats --requests 256 --at-once 16

It needs NumPy and `tritonclient[grpc]`, and no lutdeploy. Every request is for another picture, so
that none comes from the cache; --again asks for them a second time.
"""

from __future__ import annotations

import argparse
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import tritonclient.grpc


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("model")
    parser.add_argument("--address", default="localhost:8001")
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--at-once", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--again", action="store_true")
    told = parser.parse_args()
    client = tritonclient.grpc.InferenceServerClient(told.address)

    def ask(index: int) -> float:
        """Seconds that a picture takes."""
        inputs = []
        for name, value in (("SEED", seed), ("INDEX", index)):
            inputs.append(tritonclient.grpc.InferInput(name, [1, 1], "UINT64"))
            inputs[-1].set_data_from_numpy(np.array([[value]], np.uint64))
        start = time.perf_counter()
        client.infer(told.model, inputs)
        return time.perf_counter() - start

    seed = time.time_ns()
    ask(0)
    print("at once | pictures/s | median ms | 95th percentile ms")
    for at_once in told.at_once:
        seed = time.time_ns()
        for _ in range(2 if told.again else 1):
            start = time.perf_counter()
            with ThreadPoolExecutor(at_once) as threads:
                seconds = list(threads.map(ask, range(told.requests)))
            rate = told.requests / (time.perf_counter() - start)
            median, high = 1000 * np.percentile(seconds, [50, 95])
            print(f"{at_once:7} | {rate:10.1f} | {median:9.1f} | {high:9.1f}", flush=True)


if __name__ == "__main__":
    main()
