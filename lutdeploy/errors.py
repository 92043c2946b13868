"""Every error that lutdeploy raises on purpose; the CLI prints each as one line.

An error says what was wrong, with the values, and what to do about it.
"""


class LutDeployError(Exception):
    """Base of all errors raised on purpose. The CLI exits with ``exit_code``."""

    exit_code = 1


class UsageError(LutDeployError):
    """The request itself cannot be met: wrong value, wrong combination, nothing there."""

    exit_code = 2


class ConfigError(UsageError):
    """A model or training configuration that is impossible; the message holds the values."""


class ArtefactError(LutDeployError):
    """A file on disk is damaged, foreign, or not what its manifest says."""


class BackendError(LutDeployError):
    """A backend, execution provider or device that is not available or misbehaves."""


class NonFiniteError(LutDeployError):
    """NaN or Inf where there must be none: a loss, a state, a picture."""


class ParityError(LutDeployError):
    """Two denoisers that must agree do not."""
