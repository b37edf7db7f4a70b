"""Every error AutoDeploy raises on purpose.

    AutoDeployError
    ├── ConfigError             an option that does not exist, has a bad value, or contradicts another
    ├── ModelNotFoundError      no such checkpoint folder, file or hub id
    ├── CheckpointError         a checkpoint that is there but cannot be used: truncated, missing or misshapen tensors
    ├── UnsupportedModelError   a model that cannot be deployed, with the module or op at fault
    │   ├── CaptureError        torch.export could not trace it
    │   ├── GraphLevelError     a stage did not reach what its graph level promises
    │   └── TokenMixingError    requests packed into one batch would influence each other
    ├── TransformError          a transform failed or, in strict mode, left work undone
    ├── OutOfMemoryError        weights or caches do not fit the memory budget (refused before allocating)
    ├── InvalidRequestError     a prompt or sampling parameter that cannot be served
    ├── EngineOverloadedError   the request queue is full
    └── EngineDeadError         the engine stopped; carries the cause

A message says what was found, what was expected, and what to do.
"""


class AutoDeployError(Exception):
    """Base of all errors raised on purpose by this package."""


class ConfigError(AutoDeployError, ValueError):
    """An option that does not exist, has a bad value, or contradicts another."""


class ModelNotFoundError(AutoDeployError, FileNotFoundError):
    """No such checkpoint folder, file or hub id."""


class CheckpointError(AutoDeployError):
    """A checkpoint that is there but cannot be used."""


class UnsupportedModelError(AutoDeployError):
    """A model that cannot be deployed; the message names the module or op at fault."""


class CaptureError(UnsupportedModelError):
    """torch.export could not trace the model."""


class GraphLevelError(UnsupportedModelError):
    """A stage did not reach what its graph level promises."""


class TokenMixingError(UnsupportedModelError):
    """Requests packed into one batch would influence each other."""


class TransformError(AutoDeployError):
    """A transform failed or, in strict mode, left work undone."""


class OutOfMemoryError(AutoDeployError):
    """Weights or caches do not fit the memory budget; refused before allocating."""


class InvalidRequestError(AutoDeployError, ValueError):
    """A prompt or sampling parameter that cannot be served.

    Attributes:
        parameter: the request field at fault (an OpenAI-style `param`), or None for the prompt as a whole.
    """

    def __init__(self, message: str, parameter: str | None = None):
        super().__init__(message)
        self.parameter = parameter


class EngineOverloadedError(AutoDeployError):
    """The request queue is full; try again later."""


class EngineDeadError(AutoDeployError):
    """The engine stopped; `__cause__` carries the reason."""
