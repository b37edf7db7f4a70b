"""What a suite is given: a server that runs, the model behind it and an environment; and how its command is run."""

import os
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path


class SuiteError(RuntimeError):
    """A suite's command that failed; the message has its last words."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Where a suite runs.

    Attributes:
        url: of the server.
        model: name under which it serves its model.
        checkpoint: the model's folder, with its tokenizer.
        python: of the suite's environment.
        scratch: an empty folder.
        is_smoke: as little as shows that it runs.
        commands: what has been run so far.
    """

    url: str
    model: str
    checkpoint: Path
    python: Path
    scratch: Path
    is_smoke: bool = False
    commands: list[str] = field(default_factory=list)

    def run(
        self,
        arguments: Sequence[str],
        flags: Mapping[str, object] | None = None,
        variables: Mapping[str, str] | None = None,
        statuses: Sequence[int] = (0,),
    ) -> str:
        """Run a program of the environment in the scratch folder, without a model hub; returns what it printed.

        Args:
            flags: added to the arguments; one without a value is None.
            variables: environment variables on top of our own.
            statuses: exit statuses of a run that came to its end.
        Raises:
            SuiteError: it ended with another one.
        """
        program, *rest = arguments
        for flag, value in (flags or {}).items():
            rest += [flag] if value is None else [flag, str(value)]
        command = [str(self.python.with_name(program)), *rest]
        self.commands.append(" ".join([program, *rest]))
        offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(self.scratch / "hub"), "TOKENIZERS_PARALLELISM": "false"}
        environment = os.environ | offline | dict(variables or {})
        environment.pop("PYTHONPATH", None)  # which would bring the modules of another environment
        done = subprocess.run(command, cwd=self.scratch, env=environment, capture_output=True, text=True, check=False)
        if done.returncode not in statuses:
            words = (done.stderr + done.stdout).strip()[-1500:]
            raise SuiteError(f"{program} ended with status {done.returncode}: {words}")
        return done.stdout
