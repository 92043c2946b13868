"""The errors that lutdeploy raises on purpose; the command line prints each as one line.

A message says what is wrong, with the values, and what to do about it.
"""


class LutDeployError(Exception):
    """The base of them all. The command line exits with ``exit_code``."""

    exit_code = 1


class UsageError(LutDeployError):
    """A request that cannot be met: a wrong value or combination, or nothing there."""

    exit_code = 2


class ConfigError(UsageError):
    """An impossible configuration of a model, a schedule or a training."""


class ArtefactError(LutDeployError):
    """A file that is damaged, foreign, or not what its manifest says."""


class BackendError(LutDeployError):
    """A backend, execution provider or device that is missing or misbehaves."""


class NonFiniteError(LutDeployError):
    """NaN or Inf in a loss, a state or a picture."""


class ParityError(LutDeployError):
    """Two denoisers that must agree do not."""


class Terminated(KeyboardInterrupt):
    """SIGTERM, with which schedulers ask a process to end; it unwinds as Ctrl-C does."""


def first_line(error: BaseException) -> str:
    """The first line of what a library's error says, or its type where it says nothing."""
    return (str(error).splitlines() or [type(error).__name__])[0]
