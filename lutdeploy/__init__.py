"""lutdeploy: from a trained LUT denoiser to verified, fast, reproducible samples."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lutdeploy.config import ModelConfig

if TYPE_CHECKING:
    from pathlib import Path

    from lutdeploy.engines import Engine
    from lutdeploy.sampling import sample

__version__ = "0.1.0"
__all__ = ["ModelConfig", "__version__", "load", "sample"]


def load(
    path: str | Path,
    backend: str = "torch",
    device: str | None = None,
    precision: str | None = None,
) -> Engine:
    """Open a model for inference.

    Args:
        path: a run folder (its newest export), a model.safetensors, one export folder, or
            hf://OWNER/NAME[@REVISION], a model on the Hugging Face Hub.
        backend: "torch", "onnxruntime", "openvino", "tensorrt", "tensorrt-rtx", or "auto".
        device: "cpu", "cuda" or "cuda:N", for torch also "mps", for onnxruntime also an execution
            provider's name; by default the CPU, for tensorrt "cuda".
        precision: of the arithmetic: for torch on a GPU "fp16" (the default), "bf16" or "fp32",
            for openvino "fp32" (the default) or "bf16"; elsewhere the export decides.

    Returns:
        An engine with ``config``, ``predict_x0(x, t)`` (float32 [B, C, S, S] and [B] to
        [B, C, S, S], numpy) and what :func:`sample` needs.

    Raises:
        LutDeployError: one of its children says what is wrong.
    """
    from pathlib import Path

    from lutdeploy.engines import EngineRequest, open_engine

    return open_engine(EngineRequest(Path(path), backend, device, precision=precision))


def __getattr__(name: str) -> Any:
    # numpy comes with sampling; the command line's help should not wait for it.
    if name == "sample":
        from lutdeploy.sampling import sample

        return sample
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
