# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Estimates of the errors of predictions, by what one Gauss-Newton step of the whole network would change."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor, nn

from ..modules.calls import call_with_parameters
from ..optim.least_squares import LeastSquares, Term, check_terms
from ..optim.normal_equations import LinearModel
from .between import PointsBetween, inputs_of
from .members import Member, Point, argument, residuals_of, trainable, write


# With less damping the step fits single points, with more it does not reach what is wrong: docs/notes/parametric.md.
DAMPING = 1e-8
MEMORY = 2**30  # bytes of a Jacobian and its matrix; a larger network is stepped in a member's coordinates
VALUES = 128  # values, or random combinations of more, that an error is the norm of


class Linearization(NamedTuple):
    """What a step that removes residuals does to the values, near a member."""

    change: Tensor  # (M, values), from residuals to the change of the values
    norm: float  # of the values


class ErrorEstimates:
    """The relative errors of predictions, estimated by ||V (J^T J + damping)^-1 J^T r|| / ||values||.

    r are the residuals of a prediction, J their Jacobian in all parameters of the network, of which a member trains
    few, V that of the values whose error counts. J and V are those of the nearest member, computed once, so that an
    estimate costs an evaluation of the residuals.

    Args:
        model: The model with the adapter. It is written to.
        terms_of: The terms of the fit.
        held_terms_of: Terms at points to which no member is fitted, by default those of the fit between its points.
        values_of: The values whose error counts, by default the outputs at some of the rows of the first term.

    Source: R. Becker and R. Rannacher, "An optimal control approach to a posteriori error estimation", Acta Numerica
    2001, for errors as residuals that are weighted by the inverse of the operator.
    """

    def __init__(
        self,
        model: PeftModel,
        terms_of: Callable[[Any], Any],
        held_terms_of: Callable[[Any], Any] | None = None,
        values_of: Callable[[nn.Module, Any], Tensor] | None = None,
    ) -> None:
        self.model, self.values_of = model, values_of
        self.terms_of, self.held_terms_of = terms_of, held_terms_of
        self._between = PointsBetween()
        self._is_blind = self._has_warned = False
        self._known: dict[tuple[Point, bytes], Linearization | None] = {}

    def at(self, point: Point, vector: np.ndarray, nearest: Member) -> float:
        """The estimate for the coordinates at a parameter; NaN if the rows are not what the model takes."""
        with torch.inference_mode(False), torch.enable_grad():
            key = (nearest.parameter, nearest.vector.tobytes())
            if key not in self._known:
                self._known[key] = self._linearize(nearest.parameter, nearest.vector)
            write(self.model, vector)
            residuals = residuals_of(self.model, self._terms(point))
            found = self._known[key]
            if found is not None and len(found.change) != len(residuals):  # other points than at the member
                found = self._linearize(point, vector)
        return math.nan if found is None else (residuals @ found.change).norm().item() / found.norm

    def _terms(self, point: Point) -> list[Term]:
        terms = list(self.terms_of(argument(point)))
        if self.held_terms_of is not None:
            return check_terms([*terms, *self.held_terms_of(argument(point))])
        terms = check_terms(terms)
        between = self._between.of(terms, partial(_takes, self.model))
        self._is_blind = not between
        return [*terms, *between]

    def _linearize(self, point: Point, vector: np.ndarray) -> Linearization | None:
        write(self.model, vector)
        terms = self._terms(point)
        residuals = residuals_of(self.model, terms)
        network: nn.Module = copy.deepcopy(self.model).merge_and_unload()
        for part in network.parameters():
            part.requires_grad_(part.is_floating_point())
        count = sum(part.numel() for part in trainable(network).values())
        if self._is_blind and len(residuals) < count and not self._has_warned:
            self._has_warned = True
            warnings.warn(
                f"Indicators of this family may miss most of the error: a network of {count} parameters can fit each "
                f"of its {len(residuals)} residuals, and nothing is known between their points. Give `held_terms_of`, "
                "the same terms at other points.",
                stacklevel=5,
            )
        if 8 * count * max(count, len(residuals)) > MEMORY // 4:
            network = self.model
        values, gradients = self._values(network, point, terms)
        if values is None:
            return None
        problem = LeastSquares(network, trainable(network), terms, MEMORY, {})
        linear = LinearModel(problem, residuals, 1.0, in_parameter_space=True)
        steps = linear.inverse(DAMPING, gradients.T)
        if steps is None or linear.jacobian is None or not steps.isfinite().all():
            return None
        return Linearization(linear.jacobian @ steps, values.norm().item())

    def _values(self, network: nn.Module, point: Point, terms: list[Term]) -> tuple[Tensor | None, Tensor]:
        """The values, or random combinations, and their derivatives (values, P) in the trainable parameters."""
        exact = _in_float64(network)
        leaves = [exact[name].requires_grad_() for name in trainable(network)]
        if self.values_of is not None:
            function = partial(self.values_of, network, argument(point))
            values = call_with_parameters(network, exact, function, (), {})
        else:
            found = inputs_of(terms[0][1], partial(_takes, network))
            if found is None:  # the rows are not inputs of the model, and there is no other that is known
                return None, torch.empty(0, device="cpu")
            inputs = found[0][:: -(-len(found[0]) // VALUES)]
            values = call_with_parameters(network, exact, network, (inputs,), {})
        values = values.flatten()
        if len(values) > VALUES:
            signs = torch.randint(2, (VALUES, len(values)), generator=torch.Generator().manual_seed(0), device="cpu")
            values = (2 * signs - 1).to(values) @ values / math.sqrt(VALUES)
        gradients = []
        for value in values:
            found = torch.autograd.grad(value, leaves, retain_graph=True, materialize_grads=True)
            gradients.append(torch.cat([part.flatten() for part in found]))
        return values.detach(), torch.stack(gradients)


def _in_float64(network: nn.Module) -> dict[str, Tensor]:
    state = {**dict(network.named_parameters()), **dict(network.named_buffers())}
    return {name: part.detach().double() for name, part in state.items() if part.is_floating_point()}


@torch.no_grad()
def _takes(network: nn.Module, inputs: Tensor) -> bool:
    """Whether a network takes inputs (n, I); what it raises otherwise depends on the network."""
    try:
        return isinstance(call_with_parameters(network, _in_float64(network), network, (inputs,), {}), Tensor)
    except Exception:
        return False
