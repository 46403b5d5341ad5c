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

from ..least_squares.problem import Term, check_terms
from ..modules.checks import as_number, check_function, check_number, list_first


Interval = tuple[float | None, float | None]


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
    """A trained number inside of an interval. With the start s and a trained z, it is

        s + |s| z, or z from s = 0                  without ends,
        low + (s - low) (sqrt(z^2 + 1) - 1)         with a lower end, and alike with an upper one,
        (low + high) / 2 + (high - low) / 2 sin(z)  with both.

    Near an end, steps of Gauss-Newton can turn around: an exponential function would get stuck there.

    Source: F. James and M. Roos, "Minuit", Computer Physics Communications 10 (1975).
    """

    def __init__(self, start: float, low: float, high: float) -> None:
        super().__init__()
        self.start, self.low, self.high = start, low, high
        self.is_bounded = math.isfinite(low), math.isfinite(high)
        z = math.sqrt(3)
        if self.is_bounded == (True, True):
            z = math.asin((2 * start - low - high) / (high - low))
        if self.is_bounded == (False, False):
            z = 0.0
        self.z = nn.Parameter(torch.tensor(z, dtype=torch.float64, device="cpu"))

    def forward(self) -> Tensor:
        """Return the number, of shape ()."""
        if self.is_bounded == (False, False):
            return self.start + (abs(self.start) or 1.0) * self.z
        if self.is_bounded == (True, True):
            return (self.low + self.high) / 2 + (self.high - self.low) / 2 * self.z.sin()
        end = self.low if self.is_bounded[0] else self.high
        return end + (self.start - end) * ((self.z.square() + 1).sqrt() - 1)

    def slope(self) -> float:
        """Return the derivative in z."""
        with torch.enable_grad():
            (slope,) = torch.autograd.grad(self(), self.z)
        return slope.item()


class NetworkWithConstants(nn.Module):
    """A network and constants: what is trained. The constants are its last parameters.

    Args:
        network: The network of the solution.
        starts: The value that each constant starts with, by its name.
        bounds: The lower and the upper end of some of them, None for an open end.

    Raises:
        TypeError: `starts` or `bounds` is no mapping.
        ValueError: A start is not finite or not between its ends, an end is above the other, or a name in `bounds` is
            not in `starts`.
    """

    def __init__(self, network: nn.Module, starts: Mapping[str, float], bounds: Mapping[str, Interval]) -> None:
        super().__init__()
        for argument, values in (("unknowns", starts), ("bounds", bounds)):
            if not isinstance(values, Mapping):
                raise TypeError(f"`{argument}` is {values!r:.100}, but must be a dict by the names of constants.")
        if others := [repr(name) for name in bounds if name not in starts]:
            raise ValueError(f"`bounds` has {list_first(others)}, but `unknowns` has {list_first(map(repr, starts))}.")
        self.network = network
        self.names = list(starts)
        self.constants = nn.ModuleList()
        for name, start in starts.items():
            low, high = _check_interval(name, bounds.get(name, (None, None)))
            start = check_number(start, f"unknowns[{name!r}]", "(-inf, inf)")
            if not low < start < high:
                raise ValueError(f"`unknowns` starts {name!r} at {start:g}, but `bounds` has ({low:g}, {high:g}).")
            self.constants.append(Constant(start, low, high))

    def values(self) -> dict[str, Tensor]:
        """Return the constants by name, of shape ()."""
        return {name: constant() for name, constant in zip(self.names, self.constants, strict=True)}

    def bind(
        self, equation: Callable[..., Tensor], count: int, terms: Sequence[Any]
    ) -> tuple[BoundFunction, list[Term], list[BoundFunction]]:
        """Give an equation, which is called with `count` positional arguments, and terms their constants.

        Returns:
            The equation, the terms, and the functions of the terms without a weight.

        Raises:
            TypeError: The equation cannot be called with these arguments.
            ValueError: No function takes one of the constants, or a term is malformed.
        """
        bound_equation = BoundFunction(equation, accepted_names(equation, count, self.names))
        with_constants = partial(equation, **dict.fromkeys(bound_equation.names))
        check_function(with_constants, "residual", count)
        bound_terms: list[Term] = []
        data: list[BoundFunction] = []
        taken = set(bound_equation.names)
        for term, (function, rows, weight) in zip(terms, check_terms(terms) if terms else [], strict=True):
            bound = BoundFunction(function, accepted_names(function, 1 + len(rows), self.names))
            bound_terms.append((bound, rows, weight))
            taken.update(bound.names)
            if len(term) == 2:
                data.append(bound)
        if others := [repr(name) for name in self.names if name not in taken]:
            raise ValueError(
                f"`unknowns` has {list_first(others)}, but neither the equation nor a function of `terms` takes an "
                "argument of this name. Write `equation(model, x, name)`."
            )
        return bound_equation, bound_terms, data


class BoundFunction:
    """A function of a network, called with a `NetworkWithConstants`: it gets the constants as keyword arguments.

    Attributes:
        names: The constants that it gets.
        scale: A factor of each residual of a row, (m,); None for 1.
    """

    def __init__(self, function: Callable[..., Tensor], names: list[str]) -> None:
        self.function = function
        self.names = names
        self.scale: Tensor | None = None
        self.__name__ = getattr(function, "__name__", type(function).__name__)

    def __call__(self, module: NetworkWithConstants, *rows: Any) -> Any:
        constants = module.values()
        residuals = self.function(module.network, *rows, **{name: constants[name] for name in self.names})
        return residuals if self.scale is None else residuals.reshape(len(residuals), -1) * self.scale


def accepted_names(function: Callable, count: int, names: list[str]) -> list[str]:
    """Return the names that a function takes as keyword arguments behind `count` positional ones.

    A function with `**kwargs`, or without a signature, takes all.
    """
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except ValueError:
        return names
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return names
    by_position = [parameter for parameter in parameters if parameter.kind is not parameter.KEYWORD_ONLY]
    taken = {parameter.name for parameter in by_position[:count]}
    free = {parameter.name for parameter in parameters} - taken
    return [name for name in names if name in free]


def _check_interval(name: str, interval: Any) -> tuple[float, float]:
    """Return the ends of an interval, infinite where they are open."""
    ends = tuple(interval) if isinstance(interval, Sequence) and len(interval) == 2 else (math.nan, math.nan)
    low, high = (
        infinity if end is None or end == infinity else as_number(end)
        for end, infinity in zip(ends, (-math.inf, math.inf), strict=True)
    )
    if not low < high:
        raise ValueError(
            f"`bounds` has {interval!r:.100} for {name!r}, but must have (low, high) with low < high, None for no end."
        )
    return low, high
