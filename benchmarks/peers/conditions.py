"""What a machine allows at the moment: how busy others keep it, and its limits, as JSON values."""

import dataclasses
from typing import Any

import psutil
import torch

from autodeploy.bench.machine import measure


def conditions(seconds: float) -> dict[str, Any]:
    """Memory and matrix rate, and the share of all processors' time that others took just before.

    Args:
        seconds: for the limits; a third of it more is spent watching.
    """
    busy_share = psutil.cpu_percent(interval=seconds / 3) / 100  # our own processes stand still meanwhile
    return {"busy_share": busy_share} | dataclasses.asdict(measure(torch.device("cpu"), torch.bfloat16, seconds))
