"""Products with weights of 16, 8 and 4 bits: bytes of weights read and operations done per second, by number of rows.

    python benchmarks/quantized_linear.py --output benchmarks/results

At few rows a product is bound by reading its weight, at many by multiplying; the machine's rates for both are measured
in the same run. Formats take turns, and each has more weights than the caches hold: every product reads its own.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import torch
from torch import Tensor

import autodeploy.kernels.cpu  # noqa: F401  (registers the kernels)
from autodeploy.bench.machine import measure
from autodeploy.checkpoint.quantize import NumberFormat, quantize_rows
from autodeploy.memory import huge_pages
from autodeploy.ops import linear, quantized_linear

ROWS = (1, 4, 16, 64, 256)
FORMATS = {
    "int8": NumberFormat(8, None),
    "int8 groups of 32": NumberFormat(8, 32),
    "int4": NumberFormat(4, 32, has_offsets=True),
    "int4 around zero": NumberFormat(4, 32),
}
Product = Callable[[Tensor, int], Tensor]


def products_of(matrices: list[Tensor]) -> dict[str, tuple[Product, int]]:
    """By format: the product of rows with the weight of a number, and the bytes of one weight."""
    made: dict[str, tuple[Product, int]] = {}
    plain = [_in_huge_pages(matrix) for matrix in matrices]
    bfloat16 = linear.kernels["cpu"].function
    made["bf16"] = (lambda x, index: bfloat16(x, plain[index], None), plain[0].nbytes)
    for name, number_format in FORMATS.items():
        weights = []
        for matrix in matrices:
            parts = [quantize_rows(rows, number_format) for rows in matrix.split(1024)]
            weights.append({part: _in_huge_pages(torch.cat([p[part] for p in parts])) for part in parts[0]})
        made[name] = (_quantized(weights, matrices[0].shape[0]), sum(part.nbytes for part in weights[0].values()))
    return made


def _quantized(weights: list[dict[str, Tensor]], num_outputs: int) -> Product:
    function = quantized_linear.kernels["cpu"].function

    def product(x: Tensor, index: int) -> Tensor:
        parts = weights[index]
        result: Tensor = function(x, parts["numbers"], parts["scales"], parts.get("offsets"), None, num_outputs)
        return result

    return product


def _in_huge_pages(tensor: Tensor) -> Tensor:
    """As weights are loaded."""
    return huge_pages(tensor.nbytes).view(tensor.dtype).view(tensor.shape).copy_(tensor)


def seconds_each(product: Product, x: Tensor, num_weights: int) -> float:
    """Of one pass over all weights."""
    start = time.perf_counter()
    for index in range(num_weights):
        product(x, index)
    return (time.perf_counter() - start) / num_weights


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--outputs", type=int, default=8192)
    parser.add_argument("--inputs", type=int, default=2048)
    parser.add_argument("--weights", type=int, default=12, help="of each format; the caches must not hold them all")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--smoke", action="store_true", help="sizes that take a second, to see that it runs")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/local"))
    options = parser.parse_args(arguments)
    if options.smoke:
        options.outputs, options.inputs, options.weights, options.rounds = 64, 64, 2, 1
    generator = torch.Generator().manual_seed(0)
    shape = (options.outputs, options.inputs)
    matrices = [(torch.randn(shape, generator=generator) * 0.02).bfloat16() for _ in range(options.weights)]
    products = products_of(matrices)
    limits = measure(torch.device("cpu"), torch.bfloat16, 0.2 if options.smoke else 3.0)
    samples: dict[str, dict[int, list[float]]] = {name: {rows: [] for rows in ROWS} for name in products}
    for round_number in range(options.rounds + 1):  # the first is not counted
        for rows in ROWS:
            x = torch.randn((1, rows, options.inputs), generator=generator).bfloat16()
            for name, (product, _) in products.items():
                seconds = seconds_each(product, x, options.weights)
                if round_number > 0:
                    samples[name][rows].append(seconds)
    record = {
        "benchmark": "quantized-linear",
        "machine": {"processor": platform.machine(), "threads": torch.get_num_threads()},
        "torch": torch.__version__,
        "shape": shape,
        "memory_gb_per_second": limits.memory_gb_per_second,
        "bf16_matmul_gop_per_second": limits.matmul_gflop_per_second,
        "weight_bytes": {name: num_bytes for name, (_, num_bytes) in products.items()},
        "seconds": samples,
    }
    options.output.mkdir(parents=True, exist_ok=True)
    stem = f"quantized-linear_{platform.machine()}_{datetime.now(UTC):%Y%m%d-%H%M}"
    (options.output / f"{stem}.json").write_text(json.dumps(record, indent=1) + "\n")
    print(f"{limits.memory_gb_per_second:.1f} GB/s read, {limits.matmul_gflop_per_second:.0f} Gop/s in bf16 products\n")
    print("| format | " + " | ".join(f"{rows} rows: GB/s (share), Gop/s" for rows in ROWS) + " |")
    print("|---" * (len(ROWS) + 1) + "|")
    for name, (_, num_bytes) in products.items():
        cells = []
        for rows in ROWS:
            seconds = statistics.median(samples[name][rows])
            rate = num_bytes / seconds / 1e9
            operations = 2 * rows * options.outputs * options.inputs / seconds / 1e9
            cells.append(f"{rate:.1f} ({rate / limits.memory_gb_per_second:.0%}), {operations:.0f}")
        print(f"| {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
