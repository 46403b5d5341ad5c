# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""A batch whose rows have different adapters, and ten thousand adapters in one file: what `AdapterBank` costs.

Shown in docs/serving.md.

    python examples/studies/benchmarks/bank.py  # about two minutes
    python examples/studies/benchmarks/bank.py --quick  # a few seconds, for a look

Batches: 4,096 rows over a number of different adapters of a bank, beside the same rows with one adapter of a
`PeftModel`. All run in turn, so that another load of the machine meets all alike; the numbers are medians of CPU
seconds.

Files: adapters are added to a bank, saved, and loaded; the memory is what the process grows by.
"""

from __future__ import annotations

from figures import command_line  # isort: split


import copy
import gc
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

import psutil
import torch
from peft import get_peft_model, get_peft_model_state_dict
from study_tools import files, machine, tables
from torch import nn

from peft_lotra import AdapterBank, LoTRAConfig
from peft_lotra.kan import KAN


WIDTHS = [4, 32, 32, 1]
DISTINCT = [16, 256, 4096]


def config() -> LoTRAConfig:
    return LoTRAConfig(r=2, init_weights=False)


def efficient_kan(widths: list[int]) -> nn.Module:
    from qkan.kan import KANLinear  # its copy of efficient-kan, which is not on PyPI

    return nn.Sequential(*(KANLinear(n_in, n_out) for n_in, n_out in zip(widths[:-1], widths[1:], strict=True)))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "KAN [4, 32, 32, 1]": lambda: KAN(WIDTHS),
    "efficient-kan [4, 32, 32, 1]": lambda: efficient_kan(WIDTHS),
}


def random_state(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The components of an adapter, drawn anew."""
    return {key: 0.3 * torch.randn_like(value) for key, value in state.items()}


def medians(functions: dict[str, Callable[[], object]], seconds: float) -> dict[str, float]:
    """The median CPU ms of each function; all run in turn."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for function in functions.values():
        function()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times["one adapter"]) < 5:
        for name, function in functions.items():
            start = time.process_time()
            function()
            times[name].append(1e3 * (time.process_time() - start))
    return {name: statistics.median(values) for name, values in times.items()}


@torch.no_grad()
def measure_batches(make: Callable[[], nn.Module], rows: int, seconds: float) -> dict[str, float]:
    torch.manual_seed(0)
    base = make()
    model = get_peft_model(copy.deepcopy(base), config(), adapter_name="a0").eval()
    bank, state = AdapterBank(base), get_peft_model_state_dict(model, adapter_name="a0")
    for place in range(max(DISTINCT)):
        bank.add(f"a{place}", random_state(state))
    served = bank.attach().eval()
    x = torch.rand(rows, first_width(base)) * 2 - 1
    functions: dict[str, Callable[[], object]] = {"one adapter": lambda: model(x)}
    for count in DISTINCT:
        ids = bank.ids([f"a{place}" for place in (torch.randperm(rows) % count).tolist()])
        functions[f"bank, {count}, by number"] = lambda ids=ids: served(x, ids=ids)
    return medians(functions, seconds)


def first_width(base: nn.Module) -> int:
    return next(module.in_features for module in base.modules() if hasattr(module, "in_features"))


def measure_files(adapters: int) -> dict[str, float]:
    torch.manual_seed(0)
    base = KAN(WIDTHS)
    model = get_peft_model(copy.deepcopy(base), config())
    bank, times, state = AdapterBank(base), [], get_peft_model_state_dict(model)
    for place in range(adapters):
        drawn = random_state(state)
        start = time.perf_counter()
        bank.add(f"customer {place}", drawn)
        times.append(1e3 * (time.perf_counter() - start))
    with tempfile.TemporaryDirectory() as folder:
        bank.save(folder)
        torch.save(base, f"{folder}/base.pt")
        loaded = json.loads(subprocess.check_output([sys.executable, __file__, "--load", folder]))
    first, last = times[: min(100, adapters // 2)], times[-min(100, adapters // 2) :]
    return {
        "adapters": adapters,
        "add ms, median of the first 100": statistics.median(first),
        "add ms, median of the last 100": statistics.median(last),
        **loaded,
    }


def load(folder: str) -> None:
    """Load a bank in a process of its own, and print what that took."""
    base = torch.load(f"{folder}/base.pt", weights_only=False)
    with tempfile.TemporaryDirectory() as empty:  # what is imported when it is first used
        AdapterBank(base).save(empty)
        AdapterBank.load(base, empty)
    gc.collect()
    before = psutil.Process().memory_info().rss
    start = time.perf_counter()
    bank = AdapterBank.load(base, folder)
    seconds = time.perf_counter() - start
    gc.collect()
    grown = psutil.Process().memory_info().rss - before
    packed = bank.snapshot.packed
    size = len(bank) * packed.shape[1] * packed.element_size()
    print(json.dumps({"load s": seconds, "memory / tensors": grown / size, "kB per adapter": size / 1e3 / len(bank)}))


def table(results: dict) -> str:
    """The results as Markdown."""
    columns = list(results["batches"])
    title = f"{results['rows']:,} rows, r=2, multiples of one adapter (ms in the first line). {results['machine']}."
    lines = []
    for name in results["batches"][columns[0]]:
        cells = []
        for times in results["batches"].values():
            one = times["one adapter"]
            cells.append(f"{one:.1f} ms" if name == "one adapter" else f"{times[name] / one:.2f}")
        lines.append([name, *cells])
    batches = tables.table(f"| | {' | '.join(columns)} |", lines)
    of_files = tables.table("| | |", ([name, f"{value:,.3g}"] for name, value in results["files"].items()))
    return f"{title}\n\n{batches}\nAdapters of a KAN {WIDTHS} in one file:\n\n{of_files}"


def main() -> None:
    if sys.argv[1:2] == ["--load"]:
        load(*sys.argv[2:])
        return
    parser = command_line.Parser(
        __doc__,
        takes="two minutes on two cores",
        writes="bank.json and .md",
        folder=command_line.RESULTS,
        quick="512 rows and 300 adapters: to see it run",
    )
    parser.add_argument("--threads", type=int, default=2, help="threads of torch")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows, seconds, adapters = (512, 0.1, 300) if args.quick else (4096, 10.0, 10_000)
    results = {
        "machine": f"{args.threads} threads of {machine.describe()}",
        "rows": rows,
        "batches": {name: measure_batches(make, rows, seconds) for name, make in MODELS.items()},
        "files": measure_files(adapters),
    }
    files.write(args.output / "bank.json", results)
    files.write_page(args.output / "bank.md", table(results))


if __name__ == "__main__":
    main()
