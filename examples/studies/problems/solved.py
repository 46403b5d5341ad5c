# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""A standard problem by one call of `peft_lotra.pde.solve`, with its own network, a KAN or a tanh MLP."""

from __future__ import annotations

import torch
from study_tools.records import on_cpu_clock
from torch import Tensor, nn

from peft_lotra.pde import solve
from peft_lotra.pde.solution import Solution
from problems.recipe import Recipe, new_mlp
from problems.recipe import new_network as new_kan
from problems.standard import Problem


def new_network(name: str, problem: Problem) -> nn.Module | None:
    """Return the network of a name: `solve`'s own (None), or one with the periodic features of the problem."""
    if name == "solve":
        return None
    if name == "mlp":
        return nn.Sequential(problem.features, new_mlp(problem))
    return nn.Sequential(problem.features, new_kan(problem, Recipe()))


def solve_problem(problem: Problem, network: str, seed: int, seconds: float) -> dict:
    """Return the record of one call."""
    problem.reference()  # outside of the seconds
    torch.manual_seed(seed)
    path = (problem.start, problem.stop)

    def residual(model: nn.Module, x: Tensor, parameter: float = problem.stop) -> Tensor:
        return problem.residual(model, x, parameter)

    def run() -> Solution:
        return solve(
            residual,
            problem.low,
            problem.high,
            distance=problem.distance,
            lift=problem.lift,
            periodic=problem.features.periodic,
            terms=problem.terms(),
            continuation=path if problem.start != problem.stop else None,
            network=new_network(network, problem),
            seconds=seconds,
            seed=seed,
            progress=False,
        )

    solution, report = on_cpu_clock(run)
    return {
        "seed": seed,
        "error": problem.error(solution.model),
        **report,
        "parameters": sum(parameter.numel() for parameter in solution.model.parameters()),
        "phases": [[phase.name, phase.steps, phase.held, phase.reason] for phase in solution.phases],
    }
