"""Stands for Triton's ONNX Runtime backend, which the server of the tests has not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnxruntime
import triton_python_backend_utils as pb_utils

UNLUCKY = 3  # noise that begins with more than this is answered with an error


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        config = json.loads(args["model_config"])
        folder = Path(args["model_repository"], args["model_version"])
        self.session = onnxruntime.InferenceSession(str(folder / "step.onnx"))
        # As that backend does: an input with an empty reshape loses its axis of one.
        self.inputs = {given["name"]: "reshape" in given for given in config["input"]}

    def execute(self, requests: list[Any]) -> list[Any]:
        answers = []
        for request in requests:
            feed = {}
            for name, scalar in self.inputs.items():
                value = pb_utils.get_input_tensor_by_name(request, name).as_numpy()
                feed[name] = value.reshape(len(value)) if scalar else value
            if feed["x"][0, 0, 0, 0] > UNLUCKY:
                answers.append(pb_utils.InferenceResponse(error=pb_utils.TritonError("unlucky")))
                continue
            outputs = zip(("x_next", "x0"), self.session.run(["x_next", "x0"], feed), strict=True)
            answers.append(
                pb_utils.InferenceResponse([pb_utils.Tensor(name, v) for name, v in outputs])
            )
        return answers
