# Copyright 2026 the peft-lotra authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""LoTRA inside PINA: its own KolmogorovArnoldNetwork, adapted within its own PINN solver and trainer.

    pip install "peft-lotra[examples,pina]" && python examples/pde/pina_solver.py     # half a minute

The network is trained on PINA's Poisson problem, frozen, and adapted to one with another forcing. PINA's solver sees a
model as before; only `get_peft_model` stands between.
"""

from __future__ import annotations

import argparse

import torch
from peft import get_peft_model
from pina import Condition, Trainer
from pina.equation import FixedValue, PoissonEquation
from pina.model import KolmogorovArnoldNetwork
from pina.optim import TorchOptimizer
from pina.problem.zoo import Poisson2DSquareProblem
from pina.solver import PINN

from peft_lotra import LoTRAConfig, find_kan_layers


def solution(points):
    x, y = (torch.pi * points.extract([name]) for name in ("x", "y"))
    return -torch.sin(x) * torch.sin(y) - 0.5 * torch.sin(2 * x) * torch.sin(y)


def forcing(points):
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


def solve(problem, model: torch.nn.Module, epochs: int, lr: float) -> float:
    """Trains the model on the problem, and returns its relative L2 error."""
    problem.discretise_domain(n=20, mode="grid", domains="D")
    problem.discretise_domain(n=80, mode="random", domains="boundary")
    solver = PINN(problem, model, optimizer=TorchOptimizer(torch.optim.Adam, lr=lr))
    Trainer(solver, max_epochs=epochs, accelerator="cpu", logger=False, enable_checkpointing=False).train()
    return relative_error(problem, model)


def relative_error(problem, model: torch.nn.Module) -> float:
    points = problem.spatial_domain.sample(n=40, mode="grid")
    with torch.no_grad():
        expected = problem.solution(points).tensor
        return ((model(points.tensor) - expected).norm() / expected.norm()).item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--epochs", type=int, default=400)
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    network = KolmogorovArnoldNetwork([2, 8, 8, 1], n_knots=10, grid_range=[-1, 1])
    print([f"{layer.name}: {layer.family} {layer.shape}" for layer in find_kan_layers(network)])
    first = solve(Poisson2DSquareProblem(), network, args.epochs, 1e-2)
    print(f"PINA's problem: error {100 * first:.2f} %")

    model = get_peft_model(network, LoTRAConfig(r=(4, 4, 5)))
    model.print_trainable_parameters()
    before = relative_error(OtherForcing(), model)
    second = solve(OtherForcing(), model, args.epochs, 2e-2)
    print(f"the other forcing: error {100 * before:.2f} % before, {100 * second:.2f} % by an adapter in PINA's solver")


if __name__ == "__main__":
    main()
