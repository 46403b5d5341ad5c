# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Estimates of the errors of predictions, by the change that one Gauss-Newton step of the whole network makes."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from ..least_squares.levenberg_marquardt import LevenbergMarquardt
from ..least_squares.normal_equations import LinearModel
from ..least_squares.problem import LeastSquares, Term, trainable_parameters
from .held_out import inputs_of
from .interpolation import Member, Point
from .members import Problem, argument, residuals_of, write


# With less damping the step fits single points, with more it does not reach the error.
ESTIMATE_DAMPING = 1e-8
REFIT_STEPS = 3  # of the whole network
MEMORY = 2**30  # bytes of a Jacobian and its matrix; a larger network is stepped in a member's coordinates
VALUES = 128  # values, or random combinations of more, that an error is the norm of


@dataclass
class ErrorEstimates:
    """The relative errors of predictions, estimated by ||V (J^T J + damping)^-1 J^T r|| / ||values||.

    r are the residuals of a prediction. J is their Jacobian in all parameters of the network, and V the Jacobian of
    the values whose error counts. Both are computed once for each member, and an estimate then costs one evaluation
    of the residuals. Estimates by the nearest members are averaged. With a single member they would jump by a third
    where another one becomes the nearest.

    Attributes:
        problem: The terms of the fit, those that are held out, and the values whose error counts, by default the
            outputs at some of the rows of the first term.

    Source: R. Becker and R. Rannacher, "An optimal control approach to a posteriori error estimation", Acta Numerica
    2001, for errors as residuals that are weighted by the inverse of the operator.
    """

    problem: Problem
    _changes: dict[tuple, Tensor | None] = field(default_factory=dict)  # of the members
    _held_out: dict[Point, Collection[int]] = field(default_factory=dict)  # the terms that are held out at members

    def at(
        self,
        model: PeftModel,
        point: Point,
        around: Sequence[tuple[Member, float]],
    ) -> float:
        """Estimate the error of a model, which is written to, by the members around its parameter and their weights.

        NaN if the rows of the terms are no inputs of the model.
        """
        total = 0.0
        with torch.inference_mode(False):  # enables gradients, too
            held_out = self.problem.held_terms(model, point)
            for member, _ in around:
                parameter = member.parameter
                if parameter not in self._held_out:
                    self._held_out[parameter] = list(self.problem.held_terms(model, parameter))
                # data may be smooth at one parameter, and not at another
                numbers = self._held_out[parameter]
                held_out = {number: term for number, term in held_out.items() if number in numbers}
            residuals = residuals_of(model, [*self.problem.terms(point), *held_out.values()])

            for member, weight in around:
                key = (member.parameter, member.vector.tobytes(), *held_out)
                if key not in self._changes:
                    write(model, member.vector)
                    self._changes[key] = self._change(model, member.parameter, held_out)
                change = self._changes[key]
                if change is None:
                    return math.nan
                total += weight * (residuals @ change).norm().item()
        return total

    def _change(
        self,
        model: PeftModel,
        point: Point,
        numbers: Collection[int],
    ) -> Tensor | None:
        """Compute the linear map (M, values) from residuals to the relative change of the values by the step.

        None if the inputs of the network are not known, or the step does not exist.
        """
        held_out = self.problem.held_terms(model, point)
        terms = self.problem.terms(point) + [held_out[number] for number in numbers]
        residuals = residuals_of(model, terms)
        network = trainable_network(model, len(residuals))
        leaves = list(trainable_parameters(network).values())
        count = sum(leaf.numel() for leaf in leaves)
        if not numbers and len(residuals) < count and not self._changes:  # told once
            warnings.warn(
                f"Indicators of this family may miss most of the error: a network of {count} parameters can fit each "
                f"of its {len(residuals)} residuals, and nothing is known between their points. Give `held_terms_of`, "
                "the same terms at other points.",
                stacklevel=5,  # past `cached_property`
            )
        network.double()
        values = self._values(network, point, terms)
        if values is None:
            return None

        gradients = []
        for value in values:
            of_value = torch.autograd.grad(value, leaves, retain_graph=True, materialize_grads=True)
            gradients.append(torch.cat([gradient.flatten() for gradient in of_value]))
        problem = LeastSquares(network, terms, MEMORY, {})
        linear = LinearModel(problem, residuals, 1.0, in_parameter_space=True)
        steps = linear.inverse(ESTIMATE_DAMPING, torch.stack(gradients, dim=1))
        if steps is None or linear.jacobian is None:
            return None
        return linear.jacobian @ steps / values.detach().norm()

    def _values(
        self,
        network: nn.Module,
        point: Point,
        terms: list[Term],
    ) -> Tensor | None:
        """Return the values whose error counts, or random combinations of them; None if they are not known."""
        solution = self.problem.solution(network, point)
        if self.problem.values_of is not None:
            values = self.problem.values_of(solution, argument(point)).flatten()
        else:
            inputs, _ = inputs_of(terms[0][1], solution)
            if inputs is None:
                return None
            stride = math.ceil(len(inputs) / VALUES)
            values = solution(inputs[::stride]).flatten()
        if len(values) > VALUES:
            generator = torch.Generator().manual_seed(0)
            bits = torch.randint(2, (VALUES, len(values)), generator=generator, device="cpu")
            signs = 2 * bits - 1
            values = signs.to(values) @ values / math.sqrt(VALUES)
        return values


def trainable_network(model: Any, residuals: int) -> nn.Module:
    """Return a copy of the adapted network, all of whose parameters require a gradient.

    If the matrices for so many residuals are too large, only the coordinates of a member require one.
    """
    network = copy.deepcopy(model).merge_and_unload().requires_grad_()
    count = sum(parameter.numel() for parameter in network.parameters())
    if 8 * count * max(count, residuals) > MEMORY // 4:
        return copy.deepcopy(model)
    return network


@torch.inference_mode(False)
def refit(
    problem: Problem,
    model: Any,
    network: nn.Module | None,
    point: Point,
) -> nn.Module:
    """Take steps of the whole network at a parameter, in place; without one, start from a prediction."""
    terms = [*problem.terms(point), *problem.held_terms(model, point).values()]
    if network is None:
        network = trainable_network(model, len(residuals_of(model, terms)))
    LevenbergMarquardt(network, ESTIMATE_DAMPING, floor=1.0).fit(terms, REFIT_STEPS, progress=False)
    return network
