"""A checkpoint folder in, the folder that OpenVINO GenAI loads out, written by optimum.

    python genai_convert.py CHECKPOINT TARGET bf16|int8|int4

bf16 weights are stored as float16, which is the exporter's nearest, and computed with in bfloat16. int8 is the
exporter's default; int4 is in groups of 64, which divide every size here, with int8 for the head as it chooses.
"""

import subprocess
import sys
from pathlib import Path

FORMATS = {
    "bf16": ["--weight-format", "fp16"],
    "int8": ["--weight-format", "int8"],
    "int4": ["--weight-format", "int4", "--group-size", "64", "--group-size-fallback", "adjust"],
}


def main() -> None:
    """Run the exporter."""
    checkpoint, target, precision = sys.argv[1:]
    exporter = str(Path(sys.executable).with_name("optimum-cli"))
    task = ["--task", "text-generation-with-past"]
    command = [exporter, "export", "openvino", "--model", checkpoint, *task, *FORMATS[precision], target]
    sys.exit(subprocess.run(command, check=False).returncode)


if __name__ == "__main__":
    main()
