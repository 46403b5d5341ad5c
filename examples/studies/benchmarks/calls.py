# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Count what the package costs: operators of torch, bytes, and calls of its own functions.

Shown in CONTRIBUTING.md.

    python examples/studies/benchmarks/calls.py            # all costs, beside the limits that tests/cost asserts
    python examples/studies/benchmarks/calls.py --write    # limits 3 % above the costs
    python examples/studies/benchmarks/calls.py --only forward attach --most 20    # what is called most often

Unlike times, these numbers are the same on each machine, with any number of threads, busy or idle. Each operation runs
twice before it is counted, which fills caches. There are four costs:

- operators: the calls of operators of torch, in the backward pass too.
- bytes: the sizes of their arguments and results, views included. It shows how much memory is read and written.
- peak: the largest size of all tensors that the operation has made and that exist at one time.
- functions: the calls of functions of the package. It shows how far a reader, or a debugger, has to travel. Frames of
  comprehensions, generator expressions and lambdas do not count, since Python versions differ in them.
"""

from __future__ import annotations

from figures import command_line  # isort: split


import copy
import gc
import itertools
import json
import platform
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FrameType
from typing import Any

import peft
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from study_tools.tables import table
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

import peft_lotra
from peft_lotra import AdapterBank, LoTRAConfig
from peft_lotra.kan import KAN, jet
from peft_lotra.least_squares import LevenbergMarquardt


ROOT = Path(peft_lotra.__file__).parent
LIMITS = Path(__file__).resolve().parents[3] / "tests" / "cost" / "limits.json"
MARGIN = 1.03  # of a limit over the cost

Operation = Callable[[], Any]


# --- counting ---


@dataclass
class Costs:
    """The costs of an operation: calls by the name of the operator, by "file:name" of the function, and bytes."""

    operators: Counter[str]
    functions: Counter[str]
    bytes: int
    peak: int

    def totals(self) -> dict[str, int]:
        return {
            "operators": self.operators.total(),
            "bytes": self.bytes,
            "peak": self.peak,
            "functions": self.functions.total(),
        }


class CountOperators(TorchDispatchMode):
    """Count the calls of operators, their bytes, and the bytes of the tensors that exist at one time."""

    def __init__(self) -> None:
        super().__init__()
        self.operators: Counter[str] = Counter()
        self.bytes = 0
        self.peak = 0
        self._given: set[StorageWeakRef] = set()  # memory that the operation found or took from elsewhere
        self._made: dict[StorageWeakRef, int] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        self.operators[str(function)] += 1
        for tensor in tensors_of(args):
            self.bytes += tensor.nbytes
            storage = StorageWeakRef(tensor.untyped_storage())
            if storage not in self._made:
                self._given.add(storage)
        for tensor in tensors_of(result):
            self.bytes += tensor.nbytes
            storage = StorageWeakRef(tensor.untyped_storage())
            if storage not in self._given and storage not in self._made:
                self._made[storage] = tensor.untyped_storage().nbytes()
                self._update_peak()
        return result

    def _update_peak(self) -> None:
        self._made = {storage: size for storage, size in self._made.items() if not storage.expired()}
        self.peak = max(self.peak, sum(self._made.values()))


def tensors_of(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors_of(item)


def count_functions(operation: Operation) -> Counter[str]:
    """Return the number of calls of each function of the package, by "file:name"."""
    calls: Counter[str] = Counter()

    def profile(frame: FrameType, event: str, argument: Any) -> None:
        code = frame.f_code
        if event == "call" and not code.co_name.startswith("<") and code.co_filename.startswith(f"{ROOT}/"):
            calls[f"{Path(code.co_filename).relative_to(ROOT).as_posix()}:{code.co_name}"] += 1

    before = sys.getprofile()
    sys.setprofile(profile)
    try:
        operation()
    finally:
        sys.setprofile(before)
    return calls


def count(operation: Operation) -> Costs:
    """Return the costs of an operation that is called for the third time."""
    operation()
    operation()
    # it would free tensors in cycles at any time
    gc.disable()
    try:
        with CountOperators() as counter:
            functions = count_functions(operation)
    finally:
        gc.enable()
    return Costs(counter.operators, functions, counter.bytes, counter.peak)


# --- the operations ---


def points(rows: int, features: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.rand(rows, features, dtype=dtype) * 2 - 1


def adapt(network: nn.Module, r: Any = 2, name: str = "a0") -> PeftModel:
    return get_peft_model(network, LoTRAConfig(r=r, init_weights=False), adapter_name=name)


def adapted(adapters: int = 1) -> PeftModel:
    """A network whose adapters are a0, a1, ..."""
    model = adapt(KAN([4, 32, 32, 1]))
    for number in range(1, adapters):
        model.add_adapter(f"a{number}", LoTRAConfig(r=2, init_weights=False))
    return model.eval()


def names(adapters: int, rows: int = 4096) -> list[str]:
    """The adapter of each row, in turn."""
    return [f"a{row % adapters}" for row in range(rows)]


def training_step(widths: list[int], r: Any, rows: int, folder: Path) -> Operation:
    network = KAN(widths)
    model = network if r is None else adapt(network, r)
    x = points(rows, widths[0])
    y = points(rows, widths[-1])

    def step() -> None:
        model.zero_grad()
        (model(x) - y).square().mean().backward()

    return step


def jets(folder: Path) -> Operation:
    network = KAN([2, 8, 8, 1], dtype=torch.float64)
    x = points(200, 2, torch.float64)
    return lambda: jet(network, x)


def least_squares_step(folder: Path) -> Operation:
    x = points(200, 2, torch.float64)
    optimizer = LevenbergMarquardt(adapt(KAN([2, 8, 8, 1], dtype=torch.float64), r=3))
    terms = [(lambda model, x: model(x) - x.prod(1, keepdim=True), (x,))]

    def step() -> None:
        # so much that the first attempt is accepted, far from where rounding decides
        optimizer.damping = 1.0
        record = optimizer.step(terms)
        assert record.attempts == 1, record

    return step


def attach(folder: Path) -> Operation:
    return lambda: get_peft_model(KAN([4, 32, 32, 1]), LoTRAConfig(r=2))


def forward(folder: Path) -> Operation:
    model = adapted()
    x = points(32, 4)
    return lambda: model(x)


def merge(folder: Path) -> Operation:
    model: Any = adapted()

    def merge_and_unmerge() -> None:
        model.merge_adapter()
        model.unmerge_adapter()

    return merge_and_unmerge


def save(folder: Path) -> Operation:
    model = adapted()
    return lambda: model.save_pretrained(str(folder))


def load(folder: Path) -> Operation:
    base = KAN([4, 32, 32, 1])
    adapt(copy.deepcopy(base), name="default").save_pretrained(str(folder))
    return lambda: PeftModel.from_pretrained(copy.deepcopy(base), str(folder))


def forward_beside(adapters: int, folder: Path) -> Operation:
    model = adapted(adapters)
    x = points(4096, 4)
    return torch.no_grad()(lambda: model(x))


def save_beside(adapters: int, folder: Path) -> Operation:
    model = adapted(adapters)
    return lambda: model.save_pretrained(str(folder), selected_adapters=["a0"])


def load_beside(adapters: int, folder: Path) -> Operation:
    model = adapted(adapters)
    model.save_pretrained(str(folder), selected_adapters=["a0"])
    numbers = itertools.count()
    return lambda: model.load_adapter(str(folder / "a0"), f"loaded{next(numbers)}")


def mixed_batch(adapters: int, folder: Path) -> Operation:
    model = adapted(64)
    x = points(4096, 4)
    return torch.no_grad()(lambda: model(x, adapter_names=names(adapters)))


def bank_batch(adapters: int, in_bank: int, folder: Path) -> Operation:
    base = KAN([4, 32, 32, 1]).eval()
    bank = AdapterBank(base)
    tensors = get_peft_model_state_dict(adapt(copy.deepcopy(base)), adapter_name="a0")
    for name in names(in_bank, in_bank):
        bank.add(name, tensors)
    served = bank.attach()
    x = points(4096, 4)
    return torch.no_grad()(lambda: served(x, adapter_names=names(adapters)))


# the costs that may not depend on a number, at two numbers
NUMBERS: dict[str, tuple[Callable[[int, Path], Operation], int, int]] = {
    "4,096 rows, {:,} loaded": (forward_beside, 1, 64),
    "save one, {:,} loaded": (save_beside, 1, 64),
    "load one more, {:,} loaded": (load_beside, 1, 64),
    "4,096 rows over {:,} adapters": (mixed_batch, 16, 64),
    "4,096 rows over {:,} adapters, bank": (lambda number, folder: bank_batch(number, 256, folder), 16, 256),
    "4,096 rows, bank of {:,}": (lambda number, folder: bank_batch(16, number, folder), 64, 1024),
}
OPERATIONS: dict[str, Callable[[Path], Operation]] = {
    "attach": attach,
    "forward": forward,
    "save": save,
    "load": load,
    "merge": merge,
    "step, all parameters": partial(training_step, [64, 32, 10], None, 256),
    "step, r=4": partial(training_step, [64, 32, 10], 4, 256),
    "step, r=(full, full, 1)": partial(training_step, [64, 32, 10], ("full", "full", 1), 256),
    "step, r=4, 1024 to 1024": partial(training_step, [1024, 1024], 4, 512),
    "jet": jets,
    "step of Levenberg-Marquardt": least_squares_step,
}
for description, (build, *both) in NUMBERS.items():
    OPERATIONS |= {description.format(number): partial(build, number) for number in both}


@cache
def measure(name: str) -> Costs:
    """Return the costs of an operation of `OPERATIONS`."""
    # a thread of its own, since the package keeps memory in each thread, whose size depends on what ran before
    with TemporaryDirectory() as folder, ThreadPoolExecutor(1) as thread:
        torch.manual_seed(0)
        return thread.submit(lambda: count(OPERATIONS[name](Path(folder)))).result()


# --- the limits ---


def versions() -> dict[str, str]:
    """The versions that costs depend on: PEFT calls operators and functions too, Python only functions."""
    full = {"torch": torch.__version__, "peft": peft.__version__, "python": platform.python_version()}
    return {name: ".".join(version.split(".")[:2]) for name, version in full.items()}


def write(costs: dict[str, Costs]) -> None:
    limits = {}
    for name, cost in costs.items():
        limits[name] = {unit: round(MARGIN * total) for unit, total in cost.totals().items()}
    LIMITS.write_text(json.dumps({"versions": versions(), "limits": limits}, indent=2) + "\n")


def print_table(costs: dict[str, Costs]) -> None:
    """Print each cost and its limit."""
    committed = json.loads(LIMITS.read_text())
    lines = []
    for name, cost in costs.items():
        limits = committed["limits"].get(name, {})
        cells = []
        for unit, total in cost.totals().items():
            divisor = {"bytes": 1e6, "peak": 1e3}.get(unit, 1)
            decimals = 1 if unit == "bytes" else 0
            shown = [f"{value / divisor:,.{decimals}f}" for value in (total, limits.get(unit, 0))]
            cells.append(" / ".join(shown))
        lines.append([name, *cells])
    print(f"cost / limit; {versions()}, limits of {committed['versions']}\n")
    print(table("| operation | operators | MB | peak, kB | functions |", lines))


def print_most(name: str, cost: Costs, most: int) -> None:
    """Print the operators and functions that are called most often."""
    operators = [(key, f"{number:,}") for key, number in cost.operators.most_common(most)]
    functions = [(key, f"{number:,}") for key, number in cost.functions.most_common(most)]
    pairs = itertools.zip_longest(operators, functions, fillvalue=("", ""))
    print(table(f"| {name}: operators | calls | functions | calls |", ([*left, *right] for left, right in pairs)))


def main(arguments: list[str] | None = None) -> None:
    parser = command_line.Parser(__doc__, takes="twenty seconds", writes="tests/cost/limits.json", folder=None)
    parser.add_choices("--only", OPERATIONS)
    parser.add_argument("--most", type=int, default=0, metavar="N", help="list the N most frequent calls too")
    parser.add_argument("--write", action="store_true", help="replace the limits by 1.03 times the costs")
    options = parser.parse_args(arguments)
    if options.write and options.only != list(OPERATIONS):
        parser.error("--write: the limits of all operations are written at once, leave out --only")
    warnings.simplefilter("ignore")
    costs = {name: measure(name) for name in options.only}
    if options.write:
        write(costs)
    print_table(costs)
    if options.most:
        for name, cost in costs.items():
            print_most(name, cost, options.most)


if __name__ == "__main__":
    main()
