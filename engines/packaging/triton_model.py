"""The models of a Triton repository that `lutdeploy package triton` wrote, for its Python backend.

The server's Python needs lutdeploy. The parameter "makes" in config.pbtxt says which model this is:

pictures  SEED, INDEX → IMAGE; requests that wait together are computed as one batch
png       SEED, INDEX → IMAGE_PNG, by asking the model "pictures"
stream    SEED, INDEX → STEP, IMAGE after every step: the prediction so far, at the end the picture

What is no uint64 of shape [n, 1] is refused by the server and never comes here.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

import lutdeploy
from lutdeploy.artefacts import sample_folder
from lutdeploy.artefacts.files import read_record
from lutdeploy.artefacts.picture_text import picture_chunks
from lutdeploy.errors import BackendError, LutDeployError
from lutdeploy.images import Pixels, encode_pictures, to_uint8
from lutdeploy.sampling import Batch, Images, finished_batches, image_noise, trajectory
from lutdeploy.schedule import Schedule, Step

Rows = list[tuple[int, int]]  # (seed, index) of each picture


def ask(model: str, inputs: dict[str, Any], outputs: Sequence[str]) -> list[Any]:
    """The arrays that another model of this server answers with."""
    request = pb_utils.InferenceRequest(
        model_name=model,
        requested_output_names=list(outputs),
        inputs=[pb_utils.Tensor(name, value) for name, value in inputs.items()],
        preferred_memory=pb_utils.PreferredMemory(pb_utils.TRITONSERVER_MEMORY_CPU, 0),
    )
    response = request.exec()
    if response.has_error():
        raise BackendError(f"{model}: {response.error().message()}")
    tensors = [pb_utils.get_output_tensor_by_name(response, name) for name in outputs]
    if None in tensors:  # a failure that the server's cache kept, see triton.py
        raise BackendError(f"{model} answered without {', '.join(outputs)}")
    return [np.array(tensor.as_numpy()) for tensor in tensors]


class ServedDenoiser:
    """One step of the model ``name`` of this server, as ``trajectory`` asks for it."""

    schedule = None
    whole_trajectory = False

    def __init__(self, name: str) -> None:
        self.name = name

    def step(self, x: Images, row: Step, x0_prev: Images | None) -> tuple[Images, Images]:
        """See :class:`lutdeploy.sampling.Denoiser`."""
        values = {"t": row.t, "a": row.a, "b": row.b, "c": row.c}
        inputs = {name: np.full((len(x), 1), v, np.float32) for name, v in values.items()}
        inputs |= {"x": x, "x0_prev": x if x0_prev is None else x0_prev}
        x_next, x0 = ask(self.name, inputs, ("x_next", "x0"))
        return x_next, x0


class TritonPythonModel:
    """What the Python backend looks for."""

    def initialize(self, args: dict[str, str]) -> None:
        """Open the model; an error is what the server says of why it cannot load it."""
        if int(np.__version__.split(".")[0]) > 1:
            raise BackendError(  # nothing else would: clients get outputs without a byte in them
                f"Triton's Python backend loses arrays of numpy {np.__version__}; "
                "pip install 'numpy<2' in the server"
            )
        config = json.loads(args["model_config"])
        self.told = {key: value["string_value"] for key, value in config["parameters"].items()}
        answers = {"pictures": self._pictures, "png": self._png, "stream": self._stream}
        self.answer = answers[self.told["makes"]]
        folder = Path(args["model_repository"], args["model_version"])
        self.schedule = read_record(folder / "schedule.json", Schedule, "package the model again")
        if self.told["makes"] == "png":
            return
        height, width, channels = (int(size) for size in config["output"][-1]["dims"])
        self.shape = (channels, height, width)
        self.denoiser: Any = (
            ServedDenoiser(self.told["denoiser"])
            if "denoiser" in self.told
            else lutdeploy.load(folder / self.told["export"], backend="onnxruntime")
        )

    def execute(self, requests: Sequence[Any]) -> list[Any] | None:
        """Answer requests, of which none is malformed; an error here is the error of all."""
        return self.answer(requests)

    def _noise(self, rows: Rows) -> Batch:
        noise = np.stack([image_noise(seed, index, self.shape) for seed, index in rows])
        return [index for _, index in rows], noise

    def _pictures(self, requests: Sequence[Any]) -> list[Any]:
        rows = [rows_of(request) for request in requests]
        batch = self._noise(list(itertools.chain(*rows)))
        try:
            ((_, ends),) = finished_batches(self.denoiser, [batch], self.schedule)
        except LutDeployError as error:
            return [failure(error) for _ in requests]
        pixels = to_uint8(ends)
        stops = itertools.accumulate(map(len, rows))
        return [
            pb_utils.InferenceResponse([image(pixels[stop - len(mine) : stop])])
            for mine, stop in zip(rows, stops, strict=True)
        ]

    def _png(self, requests: Sequence[Any]) -> list[Any]:
        rows = [rows_of(request) for request in requests]
        asked = list(itertools.chain(*rows))
        columns = np.array(asked, np.uint64)  # [n, 2]
        inputs = {"SEED": columns[:, :1].copy(), "INDEX": columns[:, 1:].copy()}
        try:
            (pixels,) = ask(self.told["pictures"], inputs, ("IMAGE",))
        except LutDeployError as error:
            return [failure(error) for _ in requests]
        files = iter(encode_pictures(pixels, [self._texts(*row) for row in asked]))
        answers = [
            np.array([[file] for file in itertools.islice(files, len(mine))], np.object_)
            for mine in rows
        ]
        return [pb_utils.InferenceResponse([pb_utils.Tensor("IMAGE_PNG", a)]) for a in answers]

    def _texts(self, seed: int, index: int) -> bytes:
        """What `sample` writes into the PNG of a picture."""
        model = {"model_sha256": self.told["model_sha256"]}
        settings = sample_folder.settings(model, self.schedule, seed, "png")
        return picture_chunks(settings, [index])[0]

    def _stream(self, requests: Sequence[Any]) -> None:
        for request in requests:
            sender = request.get_response_sender()
            try:
                names, noise = self._noise(rows_of(request))
                for state in trajectory(self.denoiser, noise, self.schedule, names):
                    if state.x0 is None:
                        continue  # the noise
                    if sender.is_cancelled():  # nobody looks any more
                        break
                    shown = state.x if state.step == self.schedule.steps else state.x0
                    number = pb_utils.Tensor(
                        "STEP", np.full((len(shown), 1), state.step, np.uint32)
                    )
                    sender.send(pb_utils.InferenceResponse([number, image(to_uint8(shown))]))
            except LutDeployError as error:
                sender.send(failure(error))
            sender.send(flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)


def rows_of(request: Any) -> Rows:
    """The pictures that a request asks for."""
    seeds, indices = (
        pb_utils.get_input_tensor_by_name(request, name).as_numpy()[:, 0].tolist()
        for name in ("SEED", "INDEX")
    )
    return list(zip(seeds, indices, strict=True))


def image(pixels: Pixels) -> Any:
    """The output IMAGE of uint8 [n, S, S, C]."""
    return pb_utils.Tensor("IMAGE", np.ascontiguousarray(pixels))


def failure(error: LutDeployError) -> Any:
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(str(error)))
