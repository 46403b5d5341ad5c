# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""LyCORIS's LoHa and LoKr on the coefficient tensors of a KAN, beside LoTRA and full fine-tuning.

Shown in docs/comparison.md.

    python examples/studies/beside_lycoris.py  # a quarter of an hour of one core of a busy machine
    python examples/studies/beside_lycoris.py --quick  # a few seconds, for CI: says nothing

`lycoris.create_lycoris` wraps linear layers, convolutions and norms, so it finds nothing in a KAN; the number of its
modules is recorded for KANs of three libraries. Its functions compute updates of any kernel, so here they take the
coefficients (out, in, basis) as the kernel of a 1-D convolution, at about as many parameters as LoTRA has: LoHa in its
Tucker form at rank 8, LoKr with factors of 2. The shift is the quickstart's (digits rotated by 30 degrees, noisy, 200
labels), the steps and the schedule are those of initialization.py, each method has its best rate of a grid by the mean
over the seeds. Writes beside_lycoris.json.
"""

from __future__ import annotations

from study_tools import command_line  # isort: split


import copy
import logging
from functools import partial

import numpy as np
import torch
from initialization import best, full, lotra, pretrain
from lycoris import create_lycoris
from lycoris.functional import loha, lokr
from study_tools import files, together
from study_tools.tables import table
from study_tools.tasks import Task, build, rotated_digits, score
from torch import nn
from torch.nn.utils import parametrize
from tqdm import tqdm


torch.set_num_threads(1)  # additional threads slow down such small matrices

RATES = (3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
RANKS = (16, 16, 6)
LIBRARIES = ("peft-lotra", "efficient-kan", "pykan")
WEIGHTS = {
    "LoHa": lambda kernel: loha.weight_gen(kernel, 8, tucker=True),
    "LoKr": lambda kernel: lokr.weight_gen(kernel, 64, factor=2),
}
# the scale must be a tensor in LoHa's Tucker form (4.1.3)
UPDATES = {"LoHa": partial(loha.diff_weight, gamma=torch.tensor(1.0)), "LoKr": lokr.diff_weight}


class Update(nn.Module):
    """A parametrization: the coefficients with LyCORIS's update, which is zero at first."""

    def __init__(self, method: str, coefficients: torch.Tensor) -> None:
        super().__init__()
        self.method = method
        weights = WEIGHTS[method](coefficients.detach())
        self.places = [weight is not None for weight in weights]
        self.weights = nn.ParameterList(weight for weight in weights if weight is not None)

    def forward(self, coefficients: torch.Tensor) -> torch.Tensor:
        weights = iter(self.weights)
        update = UPDATES[self.method](*(next(weights) if here else None for here in self.places))
        return coefficients + update


def adapt_by_lycoris(base: nn.Module, method: str, lr: float) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = copy.deepcopy(base).requires_grad_(False)
    for layer in model.layers:
        parametrize.register_parametrization(layer, "spline_weight", Update(method, layer.spline_weight))
    return model, torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=lr)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, task: Task, steps: int) -> nn.Module:
    """As `together.train`, which vmaps: LyCORIS's Tucker form has no rule for that."""
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for rows in together.draw(task.after, steps):
        x, y = (part[rows] for part in task.after)
        optimizer.zero_grad()
        task.loss(model(x), y).backward()
        optimizer.step()
        schedule.step()
    return model


def trained(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def found_by_wrapper() -> dict[str, int]:
    """How many modules `create_lycoris` wraps in a KAN of each library."""
    networks = {library: build(library, [4, 8, 2]) for library in LIBRARIES}
    logging.disable(logging.WARNING)  # that nothing is found
    counts = {library: len(create_lycoris(network, algo="lokr").loras) for library, network in networks.items()}
    logging.disable(logging.NOTSET)
    return counts


def main() -> None:
    parser = command_line.Parser(
        __doc__,
        takes="a quarter of an hour of one core of a busy machine",
        writes="beside_lycoris.json, with --quick beside_lycoris_quick.json",
        folder=command_line.RESULTS,
        needs="test,peers",
        quick="one seed, five steps: to see it run",
    )
    args = parser.parse_args()
    seeds, steps = (1, 5) if args.quick else (5, 300)

    rows: dict[str, dict[str, list[float]]] = {}
    parameters: dict[str, int] = {}
    for seed in tqdm(range(seeds), unit="seed"):
        task = rotated_digits(seed, angle=30)
        base = pretrain("peft-lotra", task, seed, steps)
        runs = {("full fine-tuning", f"lr {lr:g}"): partial(full, base, task, lr) for lr in RATES[:3]}
        for start in ("random", "gradient"):
            policy = "slow core" if start == "gradient" else "uniform"
            runs[f"LoTRA, {start} start", f"{policy}, lr 0.01"] = partial(
                lotra, base, task, RANKS, start, policy, 1e-2
            )
        for method in WEIGHTS:
            for lr in RATES:
                runs[method, f"lr {lr:g}"] = partial(adapt_by_lycoris, base, method, lr)
        for (method, setting), run in tqdm(runs.items(), unit="run", leave=False):
            torch.manual_seed(100 + seed)
            model = train(*run(), task, steps)
            parameters[method] = trained(model)
            rows.setdefault(method, {}).setdefault(setting, []).append(score(model, task))

    lines = []
    for method, settings in rows.items():
        setting = best(settings)
        shown = " ".join(f"{value:.1f}" for value in settings[setting])
        lines.append([method, f"{parameters[method]:,}", setting, f"{np.mean(settings[setting]):.1f}", shown])
    print(table("| accuracy % | parameters | best setting | mean | seeds |", lines))
    results = {"steps": steps, "modules that create_lycoris wraps": found_by_wrapper()}
    results |= {"parameters": parameters, "results": rows}
    files.write(files.path_of(args, "beside_lycoris"), results)


if __name__ == "__main__":
    main()
