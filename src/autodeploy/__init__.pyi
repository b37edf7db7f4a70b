"""The public names, for type checkers; see `__init__.py`."""

from autodeploy.build import build as build
from autodeploy.compile.program import Program as Program
from autodeploy.config import (
    CompileOptions as CompileOptions,
)
from autodeploy.config import (
    EngineOptions as EngineOptions,
)
from autodeploy.config import (
    ModelOptions as ModelOptions,
)
from autodeploy.config import (
    Options as Options,
)
from autodeploy.debug.check import check as check
from autodeploy.debug.check_report import CheckReport as CheckReport
from autodeploy.debug.full_report import FullReport as FullReport
from autodeploy.errors import (
    AutoDeployError as AutoDeployError,
)
from autodeploy.errors import (
    CaptureError as CaptureError,
)
from autodeploy.errors import (
    CheckpointError as CheckpointError,
)
from autodeploy.errors import (
    ConfigError as ConfigError,
)
from autodeploy.errors import (
    EngineDeadError as EngineDeadError,
)
from autodeploy.errors import (
    EngineOverloadedError as EngineOverloadedError,
)
from autodeploy.errors import (
    GraphLevelError as GraphLevelError,
)
from autodeploy.errors import (
    InvalidRequestError as InvalidRequestError,
)
from autodeploy.errors import (
    ModelNotFoundError as ModelNotFoundError,
)
from autodeploy.errors import (
    OutOfMemoryError as OutOfMemoryError,
)
from autodeploy.errors import (
    TokenMixingError as TokenMixingError,
)
from autodeploy.errors import (
    TransformError as TransformError,
)
from autodeploy.errors import (
    UnsupportedModelError as UnsupportedModelError,
)
from autodeploy.graph.report import BuildReport as BuildReport
from autodeploy.llm import LLM as LLM
from autodeploy.llm import PendingOutput as PendingOutput
from autodeploy.outputs import CompletionOutput as CompletionOutput
from autodeploy.outputs import RequestOutput as RequestOutput
from autodeploy.runtime.request import Logprob as Logprob
from autodeploy.runtime.request import SamplingParams as SamplingParams
from autodeploy.runtime.structured_outputs import StructuredOutputsParams as StructuredOutputsParams

__version__: str
