# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""A thousand adapters of a bank trained at once, beside one after another: seconds, and the difference.

Shown in docs/benchmarks.md.

    python examples/studies/benchmarks/bank_training.py  # about five minutes
    python examples/studies/benchmarks/bank_training.py --quick  # a few seconds, for a look

Each adapter fits a function of its own on rows of its own: the same starts, rows and steps of AdamW both ways. All
adapters are trained together, by `BankAdamW` in batches of 16,384 rows, and a sample one after another, in turn with
the steps of the bank; the seconds of the others are those of the sample. The difference is that of the predictions.
"""

from __future__ import annotations

from figures import command_line  # isort: split


import copy
import statistics
import time
from typing import Any

import torch
from peft import get_peft_model
from study_tools import files, machine, tables
from torch import Tensor, nn

from peft_lotra import AdapterBank, BankAdamW, LoTRAConfig, create_lotra_optimizer
from peft_lotra.kan import KAN


LR = 1e-2
ROWS = 16_384  # of a batch: more do not fit the cache


def data(adapters: int, rows: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Rows (adapters, rows, 4) and their values: a wave for each adapter."""
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(adapters, rows, 4, generator=generator, dtype=dtype) * 2 - 1
    waves = torch.rand(adapters, 1, 4, generator=generator, dtype=dtype) * 3
    return x, torch.sin((x * waves).sum(2, keepdim=True))


def error(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return model(x) - y


def train_alone(model: nn.Module, x: Tensor, y: Tensor, steps: int) -> float:
    """The seconds that the steps of one adapter take."""
    start = time.process_time()
    optimizer = create_lotra_optimizer(model, torch.optim.AdamW, lr=LR)
    for _ in range(steps):
        loss = error(model, x, y).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return time.process_time() - start


def step_together(bank: AdapterBank, model: nn.Module, optimizer: Any, x: Tensor, y: Tensor) -> float:
    """The seconds that a step of all adapters takes, on rows (adapters, rows, ...)."""
    numbers, start = bank.ids(bank.names), time.process_time()
    for part in torch.arange(len(bank)).split(max(1, ROWS // x.shape[1])):
        ids = numbers[part].repeat_interleave(x.shape[1])
        errors = (model(x[part].flatten(0, 1), ids=ids) - y[part].flatten(0, 1)).square().mean(1)
        losses = bank.mean_by_adapter(errors, ids)
        optimizer.zero_grad()
        losses.nansum().backward()
        optimizer.step()
    return time.process_time() - start


def compare(adapters: int, sample: int, steps: int, rows: int, dtype: torch.dtype) -> dict[str, Any]:
    torch.manual_seed(0)
    base = KAN([4, 32, 32, 1]).to(dtype)
    bank, alone = AdapterBank(base), []
    for place in range(adapters):
        torch.manual_seed(place)
        bank.add(f"a{place}", LoTRAConfig(r=2))
        if place % (adapters // sample) == 0 and len(alone) < sample:
            torch.manual_seed(place)
            alone.append((place, get_peft_model(copy.deepcopy(base), LoTRAConfig(r=2), autocast_adapter_dtype=False)))
    x, y = data(adapters, rows, dtype)
    model = bank.attach()
    optimizer = BankAdamW(bank, lr=LR)
    together, one_by_one = [], []
    for step in range(steps):
        together.append(step_together(bank, model, optimizer, x, y))
        for place, own in alone[step * len(alone) // steps : (step + 1) * len(alone) // steps]:
            one_by_one.append(train_alone(own, x[place], y[place], steps))
    optimizer.finish()
    apart = 0.0
    with torch.no_grad():
        for place, own in alone:
            found = model(x[place], adapter_names=[f"a{place}"] * rows)
            apart = max(apart, ((found - own(x[place])).abs().max() / y[place].abs().max()).item())
    seconds, each = sum(together), statistics.median(one_by_one)
    return {
        "method": f"{steps} steps of AdamW",
        "dtype": str(dtype).removeprefix("torch."),
        "rows of each": rows,
        "together s": seconds,
        "one after another s": each * adapters,
        "times as fast": each * adapters / seconds,
        "largest difference": apart,
    }


def table(results: dict) -> str:
    """The results as Markdown."""
    header = f"| {' | '.join(results['runs'][0])} |"
    title = (
        f"{results['adapters']:,} adapters of a KAN [4, 32, 32, 1], r=2; one after another: the median of "
        f"{results['sample']} adapters, {results['adapters']:,} times. {results['machine']}."
    )
    rows = [[v if isinstance(v, str) else f"{v:,.3g}" for v in run.values()] for run in results["runs"]]
    return f"{title}\n\n{tables.table(header, rows, left=2)}"


def main() -> None:
    parser = command_line.Parser(
        __doc__,
        takes="five minutes on two cores",
        writes="bank_training.json and .md",
        folder=command_line.RESULTS,
        quick="40 adapters and 5 steps: to see it run",
    )
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    adapters, sample, steps = (40, 4, 5) if args.quick else (1000, 20, 50)
    cases = [(16, torch.float32), (16, torch.float64), (256, torch.float32)]
    results = {
        "machine": f"CPU seconds, {args.threads} threads of {machine.describe()}",
        "adapters": adapters,
        "sample": sample,
        "runs": [compare(adapters, sample, steps, *case) for case in cases],
    }
    files.write(args.output / "bank_training.json", results)
    files.write_page(args.output / "bank_training.md", table(results))


if __name__ == "__main__":
    main()
