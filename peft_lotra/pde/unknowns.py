# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Unknown constants of an equation, which are trained together with the network."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..least_squares.problem import Term
from ..modules.checks import check_function, check_list, check_number, list_first


Unknowns = Mapping[str, float | tuple[float, float | None, float | None]]


class Estimate(NamedTuple):
    """The estimate of an unknown constant; `value` plus and minus 1.96 `error` is a 95 % interval.

    Attributes:
        value: The estimate.
        error: The standard error by the noise of the data; huge where the data do not determine the constant.

    Example:
        >>> import torch
        >>> from peft_lotra.kan import jet
        >>> from peft_lotra.pde import solve
        >>> def decay(model, x, rate):  # u' = -rate u, u(0) = 1
        ...     u, (du,), _ = jet(model, x)
        ...     return du + rate * u
        >>> def observed(model, x, y):
        ...     return model(x) - y
        >>> times = torch.linspace(0.1, 2, 20, dtype=torch.float64).unsqueeze(1)
        >>> data = (observed, (times, torch.exp(-1.5 * times)))
        >>> options = {"distance": lambda x: x, "lift": 1.0, "progress": False}
        >>> result = solve(decay, [0], [2], terms=[data], unknowns={"rate": 1.0}, steps=20, **options)
        >>> abs(result.unknowns["rate"].value - 1.5) < 1e-2
        True
    """

    value: float
    error: float


class Constant(nn.Module):
    """A trained constant in an interval. With the start s and a trained z, it is

        s + |s| z, or z from s = 0                  without ends,
        low + (s - low) (sqrt(z^2 + 1) - 1)         with a lower end, and likewise with an upper one,
        (low + high) / 2 + (high - low) / 2 sin(z)  with both.

    Near an end, steps of Gauss-Newton can turn around: an exponential function would get stuck there.

    Source: F. James and M. Roos, "Minuit", Computer Physics Communications 10 (1975).
    """

    def __init__(self, start: float, low: float, high: float) -> None:
        super().__init__()
        self.start = start
        self.low = low
        self.high = high
        self.unit = abs(start) or 1.0
        # the constant is offset + scale f(z)
        ends = [end for end in (low, high) if math.isfinite(end)]
        self.num_ends = len(ends)
        self.offset = start
        self.scale = self.unit
        if self.num_ends == 1:
            self.offset = ends[0]
            self.scale = start - self.offset
        elif self.num_ends == 2:
            self.offset = (low + high) / 2
            self.scale = (high - low) / 2
        zero = torch.zeros((), dtype=torch.float64, device="cpu")
        self.z = nn.Parameter(zero)
        self.assign(start)

    def assign(self, value: float) -> None:
        """Let the constant have a value between its ends."""
        z = (value - self.offset) / self.scale
        if self.num_ends == 1:
            z = math.sqrt(max((z + 1) ** 2 - 1, 0.0))
        elif self.num_ends == 2:
            z = math.asin(min(max(z, -1.0), 1.0))  # by rounding, a value may pass its end
        with torch.no_grad():
            self.z.fill_(z)

    def forward(self) -> Tensor:
        """Return the constant, of shape ()."""
        share = self.z
        if self.num_ends == 1:
            share = (share.square() + 1).sqrt() - 1
        elif self.num_ends == 2:
            share = share.sin()
        return self.offset + self.scale * share

    @property
    def size(self) -> float:
        """The size of the constant, or of its start; 1 from a start at 0."""
        return max(abs(self().item()), self.unit)

    def slope(self) -> float:
        """Return the derivative in z."""
        with torch.enable_grad():
            (slope,) = torch.autograd.grad(self(), self.z)
        return slope.item()


class NetworkWithConstants(nn.Module):
    """A network with unknown constants, which are its last parameters.

    Args:
        network: The network of the solution.
        unknowns: As for `solve`.

    Raises:
        ValueError: A start is not finite, or not between its ends.
    """

    def __init__(self, network: nn.Module, unknowns: Unknowns) -> None:
        super().__init__()
        self.network = network
        self.names = list(unknowns)
        self.constants = nn.ModuleList()
        for name, entry in unknowns.items():
            argument = f"unknowns[{name!r}]"
            if not isinstance(entry, (tuple, list)):
                entry = (entry, None, None)
            start, low, high = check_list(entry, argument, "a number, or (start, low, high)", 3)
            low = -math.inf if low is None else low
            high = math.inf if high is None else high
            start = check_number(start, argument, "(-inf, inf)")
            if not low < start < high:
                raise ValueError(f"`{argument}` starts at {start:g}, which is not between {low:g} and {high:g}.")
            self.constants.append(Constant(start, low, high))

    def values(self) -> dict[str, Tensor]:
        """Return the constants by name, of shape ()."""
        values = [constant() for constant in self.constants]
        return dict(zip(self.names, values, strict=True))

    def estimates(self, error: float) -> dict[str, Estimate]:
        """Return the constants as estimates with this error."""
        return {name: Estimate(value.item(), error) for name, value in self.values().items()}

    def report_to(self, callback: Callable[..., Any]) -> Callable[..., Any]:
        """Return a callback of `solve` that writes the constants into the solution first."""

        def call(solution: Any, record: Any) -> Any:
            solution.unknowns = self.estimates(math.nan)
            return callback(solution, record)

        return call

    def assign(self, values: Mapping[str, float]) -> None:
        """Let constants have these values."""
        for name, constant in zip(self.names, self.constants, strict=True):
            constant.assign(values[name])  # pyright: ignore[reportCallIssue]

    def bind(
        self,
        equation: Callable[..., Tensor],
        count: int,
        terms: Sequence[Any],
        checked_terms: Sequence[Term],
    ) -> tuple[BoundFunction, list[Term], list[BoundFunction]]:
        """Give an equation, which is called with `count` positional arguments, and terms their constants.

        `checked_terms` are the terms as `check_terms` returns them.

        Returns:
            The equation, the terms, and the functions of the terms without a weight.

        Raises:
            TypeError: The equation cannot be called with these arguments.
            ValueError: No function takes one of the constants.
        """
        names = accepted_names(equation, self.names)
        bound_equation = BoundFunction(equation, names)
        with_constants = partial(equation, **dict.fromkeys(names))
        check_function(with_constants, "residual", count)

        bound_terms: list[Term] = []
        data: list[BoundFunction] = []
        unused = set(self.names) - set(names)
        for term, (function, rows, weight) in zip(terms, checked_terms, strict=True):
            names = accepted_names(function, self.names)
            bound = BoundFunction(function, names)
            unused -= set(names)
            bound_terms.append((bound, rows, weight))
            if len(term) == 2:
                data.append(bound)
        if unused:
            raise ValueError(
                f"`unknowns` has {list_first(map(repr, sorted(unused)))}, but neither the equation nor a function of "
                "`terms` takes an argument of this name. Write `equation(model, x, name)`."
            )
        return bound_equation, bound_terms, data


class BoundFunction:
    """A function of a network and of constants, called with a `NetworkWithConstants`.

    Attributes:
        names: The constants that the function gets as keyword arguments.
        scale: A factor of each residual of a row, (m,); None for 1.
    """

    def __init__(self, function: Callable[..., Tensor], names: list[str]) -> None:
        self.function = function
        self.names = names
        self.scale: Tensor | None = None
        self.__name__ = getattr(function, "__name__", type(function).__name__)

    def __call__(self, module: NetworkWithConstants, *rows: Any) -> Any:
        constants = module.values()
        selected = {name: constants[name] for name in self.names}
        residuals = self.function(module.network, *rows, **selected)
        if self.scale is None:
            return residuals
        return residuals.reshape(len(residuals), -1) * self.scale


def accepted_names(function: Callable, names: list[str]) -> list[str]:
    """Return the names that a function takes as arguments: all of them with `**kwargs`."""
    parameters = inspect.signature(function).parameters
    kinds = [parameter.kind for parameter in parameters.values()]
    if inspect.Parameter.VAR_KEYWORD in kinds:
        return names
    return [name for name in names if name in parameters]
