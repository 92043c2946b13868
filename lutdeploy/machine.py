"""The machine that a speed or a verdict was measured on, and the share of it that is ours.

How many threads and how much memory this process may take is decided here, for our own pools and
for every runtime.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import math
import os
import platform
import random
import sys
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from lutdeploy.errors import first_line, ran_out_of_memory

# Where Linux shows a CUDA or ROCm driver; the first two are for WSL and containers.
GPU_DRIVERS = (
    Path("/dev/dxg"),
    Path("/dev/nvidiactl"),
    Path("/proc/driver/nvidia"),
    Path("/dev/kfd"),
)
TENSORRTS = ("tensorrt", "tensorrt-cu12", "tensorrt-cu13", "tensorrt-rtx")  # where it is from
RUNTIMES = ("torch", "onnxruntime-gpu", "onnxruntime", "openvino", *TENSORRTS)
PACKAGES = ("lutdeploy", *RUNTIMES, "numpy")
# Extensions of x86 that decide kernels, and with them speed and rounding, as Linux names them.
INSTRUCTIONS = (
    *("avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16"),
    *("amx_bf16", "amx_int8"),
)
THIS_PROCESS = Path("/proc/self")
INT8_DOT_PRODUCTS = frozenset({"avx512_vnni", "avx_vnni", "amx_int8"})


@dataclass(frozen=True)
class Machine:
    """Hardware, system and versions that decide what is measured."""

    cpu: str  # the model's name
    processors: int  # logical ones that this process may keep busy
    memory_bytes: int  # that this process may take
    system: str
    gpus: tuple[str, ...]  # as torch sees them
    instructions: tuple[str, ...]  # of ``INSTRUCTIONS``
    versions: dict[str, str]  # of python and of the packages that are installed

    def fingerprint(self) -> dict[str, Any]:
        """The JSON values that a measurement depends on.

        Where two machines have equal fingerprints, the measurements of one hold on the other.
        Memory, python and numpy stay out, because neither speed nor numbers depend on them.
        """
        return {
            "cpu": self.cpu,
            "processors": self.processors,
            "gpus": list(self.gpus),
            "instructions": list(self.instructions),
            "versions": {name: self.versions[name] for name in RUNTIMES if name in self.versions},
        }

    def describe(self) -> str:
        """One line for people."""
        gib = self.memory_bytes / 2**30
        parts = [f"{self.cpu}, {self.processors} logical processors, {gib:.0f} GiB, {self.system}"]
        return ", ".join([*parts, *self.gpus])

    def describe_versions(self) -> str:
        """One line for people."""
        return ", ".join(f"{name} {version}" for name, version in self.versions.items())


def this_machine() -> Machine:
    """Describe this machine. It imports torch, if it is there, only where there may be a GPU."""
    return Machine(
        cpu=_cpu(),
        processors=processors(),
        memory_bytes=memory_bytes(),
        system=f"{platform.system()} {platform.machine()}",
        gpus=_gpus(),
        instructions=instructions(),
        versions=versions(),
    )


@functools.cache
def instructions() -> tuple[str, ...]:
    """Those of ``INSTRUCTIONS`` that the processor has; none where the system does not say."""
    with contextlib.suppress(OSError):  # only Linux has this file
        for line in Path("/proc/cpuinfo").read_text("utf-8").splitlines():
            if line.startswith("flags"):
                flags = set(line.split())
                return tuple(name for name in INSTRUCTIONS if name in flags)
    return ()


def int8_weight_bits() -> int:
    """The bits that a weight may have on this processor: 8, or 7 without int8 dot products.

    x86 before VNNI adds pairs of products in 16 bits, with saturation, in ONNX Runtime and in
    OpenVINO alike. Activations have 8 bits there, which leaves 7 for a weight: 255·64·2 < 2¹⁵.
    """
    if platform.machine() not in ("x86_64", "AMD64"):
        return 8
    return 8 if INT8_DOT_PRODUCTS & set(instructions()) else 7


def versions() -> dict[str, str]:
    """The versions of python and of those of ``PACKAGES`` that are installed."""
    from importlib import metadata  # a tenth of the start of a command that never asks

    found = {"python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def import_problem(extra: str, *modules: str) -> str | None:
    """Why a module that an extra of lutdeploy brings does not import here, and what to do.

    None where all import. It is not enough that a package is installed: one whose compiled part
    was built for another torch fails when it is imported.
    """
    for module in modules:
        try:
            importlib.import_module(module)
        except ModuleNotFoundError as error:
            return f"{error}; pip install 'lutdeploy[{extra}]'"
        except Exception as error:  # compiled parts raise anything
            reason = first_line(error)
            torch = versions().get("torch", "none")
            remedy = f"install a version of it that fits torch {torch}"
            if "torchvision" in reason:
                remedy = f"install the torchvision built for torch {torch}"
                remedy += ", or uninstall torchvision" if module != "torchvision" else ""
            return f"{module} is installed but does not import ({reason}); {remedy}"
    return None


def compile_problem(device: str = "cpu") -> str | None:
    """Why torch.compile does not work on a device here, in one line; None where it does.

    It compiles a function that no cache holds, which takes some seconds: a compiler that is there
    may lack headers, and its cache a place. What the compiler prints is not shown.
    """
    import torch

    number = random.uniform(1, 2)
    with _quiet_stderr() as said, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            torch.compiler.reset()  # it remembers failures
            torch.compile(lambda x: x * number)(torch.ones(8, device=device))
        except Exception as error:  # of the compiler, of its cache, of a system without the user
            if ran_out_of_memory(error):
                raise
            causes: list[BaseException] = [error]
            while (deeper := causes[-1].__cause__ or causes[-1].__context__) is not None:
                causes.append(deeper)
            said.seek(0)
            text = "\n".join([*map(str, causes), said.read().decode(errors="replace")])
            compiler = (line for line in text.splitlines() if "error: " in line)
            reason = next(compiler, f"{type(causes[-1]).__name__}: {first_line(causes[-1])}")
            return f"torch.compile does not work here: {reason.strip()[:200]}"
    return None


@contextlib.contextmanager
def _quiet_stderr() -> Iterator[IO[bytes]]:
    """Send what this process and its children write to stderr into a file."""
    sys.stderr.flush()
    before = os.dup(2)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)
        try:
            yield file
        finally:
            os.dup2(before, 2)
            os.close(before)


def _cpu() -> str:
    with contextlib.suppress(OSError):  # only Linux has this file
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def processors(process: Path = THIS_PROCESS) -> int:
    """Logical processors that this process may keep busy, by affinity and by cgroup quota.

    Args:
        process: its folder under /proc.
    """
    return min([len(_allowed()), *map(math.ceil, _quotas(process))])


def memory_bytes(process: Path = THIS_PROCESS) -> int:
    """Memory that this process may take: the machine's, or what a cgroup leaves of it."""
    import psutil

    limits = [psutil.virtual_memory().total]
    for folder in _cgroups("memory", process):
        for name in ("memory.max", "memory.limit_in_bytes"):
            with contextlib.suppress(OSError, ValueError):  # of the other version; "max"
                limits.append(int((folder / name).read_text("ascii")))
    return min(limits)


def thread_limit(process: Path = THIS_PROCESS) -> int | None:
    """Threads for a runtime that would count the machine's cores; None: all of them are ours.

    One for each physical core that this process may run on, as the runtimes choose, and no more
    than its quota keeps busy: beyond that, threads wait for each other while none of them runs.
    """
    allowed, quotas = _allowed(), [math.ceil(quota) for quota in _quotas(process)]
    everything = os.cpu_count() or 1
    if len(allowed) >= everything and min([everything, *quotas]) >= everything:
        return None
    return min([_cores(allowed), *quotas])


def limit_threads() -> None:
    """Tell PyTorch, and the processes that start from here, of :func:`thread_limit`.

    To be called before torch is imported. PyTorch takes a user's own OMP_NUM_THREADS before
    everything else, and so does this.
    """
    limit = thread_limit()
    if limit is not None:
        os.environ.setdefault("OMP_NUM_THREADS", str(limit))
        os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", str(limit))  # processes, in fact


def _allowed() -> set[int]:
    """Numbers of the logical processors that the system lets this process run on."""
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def _cores(logical: set[int]) -> int:
    """Physical cores to which some logical processors belong; where nothing says so, theirs."""
    siblings = set()
    for number in logical:
        topology = Path(f"/sys/devices/system/cpu/cpu{number}/topology/thread_siblings_list")
        try:
            siblings.add(topology.read_text("ascii"))
        except OSError:
            return len(logical)
    return len(siblings)


def _quotas(process: Path) -> Iterator[float]:
    """Processor time for each second that passes, of every cgroup that limits it."""
    for folder in _cgroups("cpu", process):
        with contextlib.suppress(OSError, ValueError):  # "max": no limit
            quota, period = map(int, (folder / "cpu.max").read_text("ascii").split())
            yield quota / period
        with contextlib.suppress(OSError, ValueError):
            quota = int((folder / "cpu.cfs_quota_us").read_text("ascii"))
            if quota > 0:  # -1: no limit
                yield quota / int((folder / "cpu.cfs_period_us").read_text("ascii"))


def _cgroups(controller: str, process: Path) -> Iterator[Path]:
    """Folders with limits of a process: its cgroups of a controller, and those around them.

    Version 2 has one hierarchy for all controllers, version 1 one for each, and a machine may
    have both. A container sees its own cgroup in the place of the root.
    """
    try:
        groups = (process / "cgroup").read_text("utf-8", "surrogateescape").splitlines()
        mounts = (process / "mountinfo").read_text("utf-8", "surrogateescape").splitlines()
    except OSError:  # only Linux has these files
        return
    for group in groups:
        _, controllers, path = group.split(":", 2)
        for line in mounts:
            mount, _, filesystem = line.partition(" - ")
            root, folder = mount.split()[3:5]
            kind, _, options = filesystem.split()[:3]
            unified = kind == "cgroup2" and not controllers
            split = kind == "cgroup" and controller in options.split(",")
            if unified or (split and controller in controllers.split(",")):
                inside = Path(path)
                inside = inside.relative_to(root) if inside.is_relative_to(root) else Path()
                yield from (Path(folder) / part for part in (inside, *inside.parents))


def _gpus() -> tuple[str, ...]:
    if sys.platform == "linux" and not any(path.exists() for path in GPU_DRIVERS):
        return ()  # saves the second that importing torch takes
    try:
        import torch
    except ModuleNotFoundError:  # then nothing here computes on a GPU
        return ()
    if not torch.cuda.is_available():
        return ()
    return tuple(torch.cuda.get_device_name(k) for k in range(torch.cuda.device_count()))
