# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""A thousand adapters on one base: the cost of loading them, and a batch that is served by several of them.

    python examples/studies/benchmarks/many_adapters.py  # about three minutes
    python examples/studies/benchmarks/many_adapters.py --quick  # a few seconds, for a look

Loading: LoTRA adapters of a KAN, one by one with `load_adapter(..., low_cpu_mem_usage=True)`, and beside them PEFT's
own LoRA on a network of as many linear layers, which shows the share of PEFT in the time. Memory: the growth of the
process, beside the bytes of the adapters' tensors.

Batches: 4,096 rows that use a number of different adapters, beside the same rows with one adapter. The same batch runs
with few and with all adapters loaded.
"""

from __future__ import annotations

from figures import command_line  # isort: split


import copy
import gc
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import matplotlib.pyplot as plt
import psutil
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from rich.console import Console
from rich.table import Table
from study_tools import files, machine
from study_tools.pictures import STYLES
from torch import nn
from tqdm import tqdm

from peft_lotra import LoTRAConfig
from peft_lotra.kan import KAN


torch.set_num_threads(1)

WIDTHS = [4, 32, 32, 1]
RANK = 2
NETWORKS = {"[4, 32, 32, 1]": WIDTHS, "[8, 16, 16, 4]": [8, 16, 16, 4], "[32, 64, 10]": [32, 64, 10]}
DISTINCT = [1, 2, 4, 8, 16, 32, 64, 256]


def linear_network() -> nn.Module:
    """Linear layers of the same number and widths as the layers of the KAN."""
    return nn.Sequential(*(nn.Linear(n_in, n_out) for n_in, n_out in zip(WIDTHS[:-1], WIDTHS[1:], strict=True)))


METHODS: dict[str, tuple[Callable[[], nn.Module], PeftConfig]] = {
    "LoTRA": (lambda: KAN(WIDTHS), LoTRAConfig(r=RANK, init_weights=False)),
    "PEFT's LoRA, linear layers": (
        linear_network,
        LoraConfig(r=RANK, target_modules=["0", "1", "2"], init_lora_weights=False),
    ),
}


def resident() -> int:
    """The memory of this process in bytes."""
    gc.collect()
    return psutil.Process().memory_info().rss


def adapter_tensors(model: nn.Module) -> list[torch.Tensor]:
    return [parameter for name, parameter in model.named_parameters() if "lotra_" in name or "lora_" in name]


def measure_loading(name: str, adapters: int, bar: tqdm) -> dict:
    """Load the given number of adapters, switch to some of them, and delete some."""
    make, config = METHODS[name]
    torch.manual_seed(0)
    base = make()
    with tempfile.TemporaryDirectory() as folder:
        get_peft_model(copy.deepcopy(base), copy.deepcopy(config)).save_pretrained(folder)
        model = PeftModel.from_pretrained(base, folder, adapter_name="adapter0", low_cpu_mem_usage=True)
        before, times = resident(), []
        for index in range(1, adapters):
            start = time.perf_counter()
            model.load_adapter(folder, adapter_name=f"adapter{index}", low_cpu_mem_usage=True)
            times.append(time.perf_counter() - start)
            bar.update()
    grown = resident() - before
    tensors = adapter_tensors(model)
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def seconds(action: Callable[[str], object], count: int) -> float:
        names = random.Random(0).sample(sorted(model.peft_config), count)
        start = time.perf_counter()
        for adapter in names:
            action(adapter)
        return (time.perf_counter() - start) / count

    count = min(10, adapters // 2)
    tenth = max(1, len(times) // 10)
    return {
        "adapters": adapters,
        "parameters of an adapter": sum(tensor.numel() for tensor in tensors) // adapters,
        "load ms, mean": 1e3 * sum(times) / len(times),
        "load ms, first tenth": 1e3 * sum(times[:tenth]) / tenth,
        "load ms, last tenth": 1e3 * sum(times[-tenth:]) / tenth,
        "load ms": [1e3 * sum(times[i : i + tenth]) / len(times[i : i + tenth]) for i in range(0, len(times), tenth)],
        "set_adapter ms": 1e3 * seconds(model.set_adapter, count),
        "delete_adapter ms": 1e3 * seconds(model.delete_adapter, count),
        "tensors MB": size / 1e6,
        "process MB": grown / 1e6,
        "kB of the process per adapter": grown / 1e3 / (adapters - 1),
    }


def best_ms(function: Callable[[], object], seconds: float) -> float:
    """The shortest time of a call, after two calls that do not count."""
    times = []
    for _ in range(2):
        function()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times) < 3:
        start = time.perf_counter()
        function()
        times.append(1e3 * (time.perf_counter() - start))
    return min(times)


@torch.no_grad()
def measure_batches(widths: list[int], rows: int, loaded: int, distinct: list[int], seconds: float) -> dict:
    """The times of one forward pass of the same rows, by the number of different adapters of the rows."""
    torch.manual_seed(0)
    model = get_peft_model(KAN(widths), LoTRAConfig(r=RANK, init_weights=False), adapter_name="adapter0").eval()
    x = torch.rand(rows, widths[0]) * 2 - 1
    for index in range(1, loaded):
        model.add_adapter(f"adapter{index}", LoTRAConfig(r=RANK, init_weights=False))
    times = {"one adapter": best_ms(lambda: model(x), seconds)}
    for count in distinct:
        names = [f"adapter{index}" for index in torch.randint(min(count, loaded), (rows,)).tolist()]
        times[str(count)] = best_ms(lambda names=names: model(x, adapter_names=names), seconds)
    return times


def show(console: Console, results: dict) -> None:
    if "load" in results:
        table = Table(title=f"Adapters (r={RANK}) on one base of widths {WIDTHS}, loaded one by one")
        table.add_column("")
        for method in results["load"]:
            table.add_column(method, justify="right")
        for key in next(iter(results["load"].values())):
            values = [row[key] for row in results["load"].values()]
            if not isinstance(values[0], list):
                table.add_row(key, *(f"{value:,}" if isinstance(value, int) else f"{value:,.2f}" for value in values))
        console.print(table)
    if "batch" in results:
        batch = results["batch"]
        table = Table(title=f"{batch['rows']:,} rows, ms and multiple of one adapter")
        table.add_column("KAN")
        table.add_column("loaded", justify="right")
        for column in next(iter(batch["times"]))["ms"]:
            table.add_column(column if column == "one adapter" else f"{column} adapters", justify="right")
        for line in batch["times"]:
            one = line["ms"]["one adapter"]
            cells = [
                f"{value:.1f} ({value / one:.2f}x)" if value is not one else f"{one:.1f}"
                for value in line["ms"].values()
            ]
            table.add_row(line["network"], f"{line['loaded']:,}", *cells)
        console.print(table)


def draw(results: dict, path: Path) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 4), layout="constrained")
    for style, (method, row) in zip(STYLES, results["load"].items(), strict=False):
        times = row["load ms"]
        places = [(i + 0.5) * row["adapters"] / len(times) for i in range(len(times))]
        left.plot(places, times, **style, label=method)
    left.set(
        xlabel="adapters already loaded",
        ylabel="ms to load one more",
        title="Each loaded adapter slows down the next",
    )
    left.set(xlim=(0, None), ylim=(0, None))
    left.legend()
    for style, line in zip(STYLES, results["batch"]["times"], strict=False):
        one = line["ms"]["one adapter"]
        counts = [int(count) for count in line["ms"] if count != "one adapter"]
        label = f"KAN {line['network']}, {line['loaded']:,} loaded"
        right.plot(counts, [line["ms"][str(count)] / one for count in counts], **style, label=label)
    right.axhline(1, color="grey", linewidth=0.8)
    right.set(xscale="log", xlabel="different adapters in the batch", ylabel="time / time of one adapter")
    right.set(ylim=(0, None), title=f"Mixing adapters in a batch of {results['batch']['rows']:,} rows")
    right.legend()
    figure.savefig(path)
    plt.close(figure)


def main() -> None:
    parser = command_line.Parser(
        __doc__,
        takes="three minutes on one core",
        writes="many_adapters.json and .png",
        folder=command_line.RESULTS,
        quick="30 adapters and 512 rows: to see it run",
        redraw=True,
    )
    parts = ["load", "batch"]
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts, help="what to run")
    args = parser.parse_args()
    adapters, rows, seconds = (30, 512, 0.05) if args.quick else (1000, 4096, 0.3)
    path = args.output / "many_adapters.json"
    # a part that is not run keeps its results
    results = files.read(path, must=args.redraw)
    if args.redraw:
        draw(results, path.with_suffix(".png"))
        return
    results["machine"] = f"1 thread of {machine.describe()}"

    if "load" in args.parts:
        with tqdm(total=len(METHODS) * (adapters - 1), unit="adapter", ncols=100, desc="loading") as bar:
            results["load"] = {name: measure_loading(name, adapters, bar) for name in METHODS}
    if "batch" in args.parts:
        distinct = [count for count in DISTINCT if count <= adapters]
        cases = [(name, max(distinct)) for name in NETWORKS] + [("[4, 32, 32, 1]", adapters)]
        results["batch"] = {"rows": rows, "times": []}
        for name, loaded in tqdm(cases, unit="case", ncols=100, desc="batches"):
            times = measure_batches(NETWORKS[name], rows, loaded, distinct, seconds)
            results["batch"]["times"].append({"network": name, "loaded": loaded, "ms": times})

    files.write(path, results)
    console = Console(width=150)
    show(console, results)
    if {"load", "batch"} <= results.keys():
        draw(results, path.with_suffix(".png"))
        console.print(f"picture: {path.with_suffix('.png')}")


if __name__ == "__main__":
    main()
