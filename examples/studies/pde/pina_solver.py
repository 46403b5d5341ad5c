# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""LoTRA inside PINA: the KolmogorovArnoldNetwork of PINA, adapted by the PINN solver and trainer of PINA.

    pip install "peft-lotra[examples,pina]"
    python examples/studies/pde/pina_solver.py  # two minutes on one core, no network
    python examples/studies/pde/pina_solver.py --quick  # half a minute, a small setting

The network is trained on PINA's Poisson problem, frozen, and adapted to one with another forcing. PINA's solver and
trainer get a model as before; `get_peft_model` is the only addition. Full fine-tuning of the same base, with the best
of three learning rates, and training from scratch have as many epochs. On a network this small, full fine-tuning costs
the same time and ends nearer to the solution; an adapter has fewer parameters to train, store and exchange.

Two choices make it work, with or without LoTRA:

* The weight of the boundary. PINA adds the mean squares of both residuals, and the Laplacian's are larger by the
  square of its eigenvalues. Without the weight, the loss falls while the error stays above 10 % for each method.
* The splines. PINA's are zero outside their grid, where they jump; automatic differentiation does not see jumps, so
  hidden values must stay inside. And `spline_order` counts coefficients: the default 3 is a piecewise parabola, whose
  second derivative is a staircase.
"""

from __future__ import annotations

from problems import command_line  # isort: split


import copy
import logging
import math
import time
import warnings
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from lightning import seed_everything
from lightning.pytorch.callbacks import Callback
from peft import get_peft_model
from pina import Condition, LabelTensor, Trainer
from pina.equation.zoo import FixedValue, PoissonEquation
from pina.model import KolmogorovArnoldNetwork
from pina.optim import TorchOptimizer
from pina.problem.zoo import Poisson2DSquareProblem
from pina.solver import PhysicsInformedSingleModelSolver as PINN  # its name until PINA 0.3
from pina.weighting import ScalarWeighting
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from study_tools import files, pictures
from torch import Tensor, nn

from peft_lotra import LoTRAConfig, find_kan_layers


# An error e on the boundary goes on into the square at about its size, a residual r of the equation as r / (2 pi^2),
# the smallest eigenvalue of the Laplacian: with this weight their squares count alike.
BOUNDARY_WEIGHT = (2 * math.pi**2) ** 2
RATE, FULL_RATES = 2e-2, (1e-2, 2e-2, 4e-2)
RANKS = (4, 4, 4)
RESOLUTION = 60  # points per axis of the grid on which errors are measured and drawn


def solution(points: LabelTensor) -> LabelTensor:
    x, y = (torch.pi * points.extract([name]) for name in ("x", "y"))
    return -torch.sin(x) * torch.sin(y) - 0.5 * torch.sin(2 * x) * torch.sin(y)


def forcing(points: LabelTensor) -> LabelTensor:
    """The Laplacian of the solution, as PINA's PoissonEquation has it: without a minus."""
    x, y = (torch.pi * points.extract([name]) for name in ("x", "y"))
    return torch.pi**2 * (2 * torch.sin(x) * torch.sin(y) + 2.5 * torch.sin(2 * x) * torch.sin(y))


class OtherForcing(Poisson2DSquareProblem):
    """PINA's problem with a second term in the forcing."""

    conditions = {
        "boundary": Condition(domain="boundary", equation=FixedValue(0.0)),
        "D": Condition(domain="D", equation=PoissonEquation(forcing_term=forcing)),
    }

    def solution(self, pts):
        return solution(pts)


class EpochBar(Callback):
    """One progress bar for a training; Lightning has one for each epoch."""

    def __init__(self, progress: Progress, title: str, epochs: int) -> None:
        self.progress, self.task = progress, progress.add_task(title, total=epochs)

    def on_train_epoch_end(self, trainer: Trainer, solver: PINN) -> None:
        self.progress.advance(self.task)


def make_network() -> KolmogorovArnoldNetwork:
    return KolmogorovArnoldNetwork([2, 8, 8, 1], spline_order=4, n_knots=16, grid_range=[-2, 2])


def solve(
    problem: Poisson2DSquareProblem, model: nn.Module, epochs: int, lr: float, points: int = 20, callbacks: tuple = ()
) -> float:
    """Trains the model on the problem by the solver of PINA; returns the CPU time in seconds.

    Args:
        points: the number of points per axis inside the square, and on each of its sides.
    """
    problem.discretise_domain(n=points, mode="grid", domains="D")
    problem.discretise_domain(n=4 * points, mode="random", domains="boundary")
    weighting = ScalarWeighting({"boundary": BOUNDARY_WEIGHT})
    solver = PINN(problem, model, optimizer=TorchOptimizer(torch.optim.Adam, lr=lr), weighting=weighting)
    trainer = Trainer(
        solver,
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
    )
    start = time.process_time()
    trainer.train()
    return time.process_time() - start


def test_points() -> LabelTensor:
    return Poisson2DSquareProblem.spatial_domain.sample(n=RESOLUTION, mode="grid")


def reference(problem: Poisson2DSquareProblem) -> Tensor:
    return problem.solution(test_points()).tensor


@torch.no_grad()
def values(model: nn.Module) -> Tensor:
    return model(test_points().tensor)


def relative_error(problem: Poisson2DSquareProblem, model: nn.Module) -> float:
    """The relative error in the L2 norm."""
    expected = reference(problem)
    return ((values(model) - expected).norm() / expected.norm()).item()


def compare(seed: int, epochs: int, points: int, progress: Progress) -> tuple[list[dict], nn.Module, nn.Module]:
    """Trains all models; returns the rows of the table, the base and the adapted network."""
    seed_everything(seed, verbose=False)  # PINA's sampling draws from Python's generator too
    rows = []

    def run(method: str, problem: Poisson2DSquareProblem, model: nn.Module, lr: float) -> nn.Module:
        bar = EpochBar(progress, f"seed {seed}: {method}, learning rate {lr:g}", epochs)
        trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        seconds = solve(problem, model, epochs, lr, points, (bar,))
        error = relative_error(problem, model)
        row = {"seed": seed, "method": method, "lr": lr, "trainable parameters": trainable}
        rows.append(row | {"error": error, "seconds": round(seconds, 1)})
        return model

    base = run("base, PINA's forcing", Poisson2DSquareProblem(), make_network(), RATE)
    before = {"error": relative_error(OtherForcing(), base), "seconds": 0.0}
    rows.append({"seed": seed, "method": "base, other forcing", "lr": None, "trainable parameters": 0} | before)
    adapted = run("LoTRA", OtherForcing(), get_peft_model(copy.deepcopy(base), LoTRAConfig(r=RANKS)), RATE)
    for lr in FULL_RATES:
        run("full fine-tuning", OtherForcing(), copy.deepcopy(base), lr)
    run("from scratch", OtherForcing(), make_network(), RATE)
    return rows, base, adapted


def best_rows(rows: list[dict]) -> list[dict]:
    """The runs with the learning rate of the smallest error, for each seed and method."""
    best = {}
    for row in sorted(rows, key=lambda row: row["error"]):
        best.setdefault((row["seed"], row["method"]), row)
    return [row for row in rows if row in best.values()]


def table_of(rows: list[dict], epochs: int) -> Table:
    table = Table(
        title=f"PINA's PINN solver, {epochs} epochs of Adam; errors on the other forcing, or on the one named"
    )
    for name in ("seed", "method", "learning rate", "trainable parameters", "error", "seconds"):
        table.add_column(name, justify="left" if name == "method" else "right")
    for row in best_rows(rows):
        rate = "" if row["lr"] is None else f"{row['lr']:g}"
        figures = (str(row["trainable parameters"]), f"{100 * row['error']:.2f} %", f"{row['seconds']:.0f}")
        table.add_row(str(row["seed"]), row["method"], rate, *figures)
    return table


def draw(base: nn.Module, adapted: nn.Module, path: Path) -> None:
    """Draws reference, base and adapted network on the other forcing, and their errors."""
    expected = reference(OtherForcing())
    base_error, adapted_error = (100 * relative_error(OtherForcing(), model) for model in (base, adapted))
    own_error = 100 * relative_error(Poisson2DSquareProblem(), base)
    trained = sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)
    before, after = values(base), values(adapted)
    figure, axes = plt.subplots(2, 3, figsize=(12, 7.4), layout="constrained", sharex=True, sharey=True)
    panels = (
        (expected, "other forcing: reference"),
        (before, f"other forcing: base network\nerror {base_error:.1f} %"),
        (after, f"other forcing: LoTRA, {trained} parameters trained\nerror {adapted_error:.2f} %"),
        (
            reference(Poisson2DSquareProblem()),
            f"PINA's forcing: reference\nthe base network's error here: {own_error:.2f} %",
        ),
        (before - expected, "other forcing: base network - reference"),
        (after - expected, "other forcing: LoTRA - reference"),
    )
    for axis, (field, title) in zip(axes.flat, panels, strict=True):
        limit = None if title.endswith("- reference") else expected.abs().max().item()
        field = field.reshape(RESOLUTION, RESOLUTION)  # x varies slowest in `test_points`
        mesh = pictures.draw_field(axis, field, (0, 1, 0, 1), limit)
        pictures.field_bar(figure, mesh, axis)
        axis.set_title(title)
        axis.set_aspect("equal")
    for axis in axes[-1]:
        axis.set_xlabel("x")
    for axis in axes[:, 0]:
        axis.set_ylabel("y")
    figure.suptitle(
        "PINA's KAN in PINA's PINN solver: the solution of a Poisson problem, adapted to another forcing"
        f"\nOne run. {pictures.FIELD_LINES}"
    )
    figure.savefig(path)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> None:
    parser = command_line.Parser(
        __doc__,
        takes="two minutes on one core",
        writes="pina_solver.json and .png",
        folder=command_line.RESULTS / "pde",
        needs="examples,pina",
        quick="a tiny setting: to see it run",
    )
    parser.add_argument("--epochs", type=int, default=400, help="of each training (default: %(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="the picture shows the first (default: 0)")
    args = parser.parse_args(arguments)
    epochs, points = (min(args.epochs, 80), 10) if args.quick else (args.epochs, 20)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")  # on workers and log intervals that PINA sets
    torch.set_num_threads(1)  # more threads slow down a network of this size

    console = Console(width=110)
    for layer in find_kan_layers(make_network()):
        console.print(f"{layer.name}: {layer.family} {layer.shape}")
    rows, networks = [], []
    with Progress(console=console) as progress:
        for seed in args.seeds:
            found, *pair = compare(seed, epochs, points, progress)
            rows += found
            networks.append(pair)
    console.print(table_of(rows, epochs))

    name = "pina_solver_quick" if args.quick else "pina_solver"
    results = {"epochs": epochs, "seeds": args.seeds, "ranks": RANKS, "boundary weight": BOUNDARY_WEIGHT, "rows": rows}
    files.write(args.output / f"{name}.json", results)
    draw(*networks[0], args.output / f"{name}.png")
    console.print(f"picture: {args.output / name}.png", soft_wrap=True)


if __name__ == "__main__":
    main()
