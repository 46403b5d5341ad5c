# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Windows in time: one network for each interval, which continues the interval before it exactly."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..derivatives.api import jet
from ..derivatives.chain_rule import Jet, multiply
from ..derivatives.stages import Entry, register
from ..modules.calls import check_module
from .point_cache import can_keep, key_of


# By the number of conditions at the start: coefficients of polynomials in s, powers ascending. They carry the value
# there and the slope, and vanish at the end with their slopes.
_START = {1: [(1.0, -1.0)], 2: [(1.0, 0.0, -3.0, 2.0), (0.0, 1.0, -2.0, 1.0)]}


MOST_STARTS = 4  # sets of points that are kept


class Windows(nn.Module):
    r"""A network of windows in time, t_0 < t_1 < ... < t_K, for `HardConstraint`. In the window from t_k on, with
    s = (t - t_k) / h and h = t_{k+1} - t_k,

        n_k = (1 - s) a_k + s N_k                                       to continue the value,
        n_k = (1 - s)^2 (1 + 2 s) a_k + s (1 - s)^2 h b_k + s^2 N_k     to continue the first derivative, too,

    with a_k and b_k, the value of n_{k-1} at t_k and its derivative in time, and n_0 = N_0. All networks N_k together
    are one function. Spatial conditions of a `HardConstraint` around it hold in all windows. `jet` knows it in closed
    form where it knows the networks, up to order 4 without b_k, and 3 with them.

    Args:
        networks: The K networks, (..., I) to (..., O). A network belongs to one window alone.
        ends: The K + 1 times t_0 to t_K.
        time: The index of the time coordinate.
        smoothness: 1 if the value is continued, 2 if the first derivative is too.

    Attributes:
        active: The index of the window that all points belong to, e.g. in training; None to look at their times.

    Raises:
        TypeError: A network is no module.
        ValueError: The times do not increase, or they are not one more than the networks; `smoothness` is not 1 or 2.

    Example:
        >>> import torch
        >>> from peft_lotra.kan import KAN, jet
        >>> from peft_lotra.pde import Windows
        >>> windows = Windows([KAN([1, 4, 1]), KAN([1, 4, 1])], [0.0, 0.5, 1.0], time=0, smoothness=2)
        >>> u, du, _ = jet(windows, torch.tensor([[0.499999], [0.500001]]))
        >>> bool((u[0] - u[1]).abs() < 1e-4), bool((du[0, 0] - du[0, 1]).abs() < 1e-3)
        (True, True)
    """

    ends: Tensor

    def __init__(self, networks: Sequence[nn.Module], ends: Sequence[float], time: int = -1, smoothness: int = 1):
        super().__init__()
        for network in networks:
            check_module(network, "networks")
        times = torch.as_tensor(ends, dtype=torch.float64, device="cpu")
        if times.shape != (len(networks) + 1,) or not (times.diff() > 0).all():
            raise ValueError(f"`ends` is {ends}, but must be {len(networks) + 1} increasing times.")
        self.networks = nn.ModuleList(networks)
        self.time = time
        if smoothness not in _START:
            raise ValueError(f"`smoothness` is {smoothness}, but must be 1 or 2.")
        self.smoothness = smoothness
        self.active: int | None = None
        self._starts: dict[Any, list[Jet]] = {}  # of the active window, by points
        self.register_buffer("ends", times)

    def activate(self, window: int | None) -> None:
        """Train and evaluate this window alone; None for all windows, each at the rows with its times."""
        self.active = window
        self._starts.clear()
        for k, network in enumerate(self.networks):
            network.requires_grad_(window in (None, k))

    def forward(self, x: Tensor) -> Tensor:
        """Inputs (..., I) to outputs (..., O)."""
        return self.jet(x, x.new_empty(0, x.shape[-1]), 0, None)[0]

    def jet(self, x: Tensor, directions: Tensor, order: int, weights: Tensor | None) -> Jet:
        """The value and the derivatives, as `Entry.jet`; of order 0, the value alone."""
        outputs: Jet = []
        for k in range(len(self.networks)) if self.active is None else [self.active]:
            values = self._in_window(k, x, directions, order, weights)
            is_later = x[..., self.time].unsqueeze(-1) >= self.ends[k].to(x)
            outputs = [torch.where(is_later, new, old) for new, old in zip(values, outputs or values, strict=True)]
        return outputs

    def _in_window(self, k: int, x: Tensor, directions: Tensor, order: int, weights: Tensor | None) -> Jet:
        """Return the jet of n_k."""
        values = _jet_of(self.networks[k], x, directions, order, weights)
        if k == 0:
            return values
        width = (self.ends[k + 1] - self.ends[k]).to(x)
        s = (x[..., self.time].unsqueeze(-1) - self.ends[k].to(x)) / width
        rate = directions[:, self.time].view(-1, *[1] * x.dim()) / width
        polynomials = [[0.0] * self.smoothness + [1.0], *_START[self.smoothness]]
        jets = [values, *self._start_once(k, x, directions, order, weights)]
        total: Jet = []
        for polynomial, factor in zip(polynomials, jets, strict=True):
            product = multiply(factor, _polynomial(polynomial, s, rate, order, weights), order, weights)
            total = [*map(torch.add, total, product)] if total else product
        return total

    def _start_once(self, k: int, x: Tensor, directions: Tensor, order: int, weights: Tensor | None) -> list[Jet]:
        """As `_start`, from memory where the active window was evaluated at the same points."""
        if self.active is None or not can_keep(x):
            return self._start(k, x, directions, order, weights)
        key = tuple(map(key_of, (x, directions, order, weights)))
        if key not in self._starts:
            if len(self._starts) == MOST_STARTS:
                self._starts.pop(next(iter(self._starts)))
            with torch.no_grad():
                self._starts[key] = self._start(k, x, directions, order, weights)
        return self._starts[key]

    def _start(self, k: int, x: Tensor, directions: Tensor, order: int, weights: Tensor | None) -> list[Jet]:
        """Return the jets of a_k and, to continue the slope, h b_k, as functions of the other coordinates."""
        network, (before, start, end) = self.networks[k - 1], self.ends[k - 1 : k + 2].to(x)
        at_start, across = x.clone(), directions.clone()
        at_start[..., self.time] = start
        across[:, self.time] = 0.0
        if self.smoothness == 1:
            return [_jet_of(network, at_start, across, order, weights)]
        along = x.new_zeros(x.shape[-1])
        along[self.time] = end - start
        values, rates = _jet_and_rate(network, at_start, across, along, order, weights)
        if k > 1:  # the slope of s^2 N at its end
            slope = 2 * (end - start) / (start - before)
            rates = [slope * value + rate for value, rate in zip(values, rates, strict=True)]
        return [values, rates]


def _jet_of(network: nn.Module, x: Tensor, directions: Tensor, order: int, weights: Tensor | None) -> Jet:
    """Return the jet of a network, whose last derivative keeps a first dimension; of order 0, its value alone."""
    if order == 0:
        values = network(x)
        return [getattr(values, "logits", values)]
    values = list(jet(network, x, directions, order=order, collapse=False if weights is None else weights))
    return values if weights is None else [*values[:-1], values[-1].unsqueeze(0)]


def _jet_and_rate(
    network: nn.Module, x: Tensor, directions: Tensor, along: Tensor, order: int, weights: Tensor | None
) -> tuple[Jet, Jet]:
    """Return the jet of a network, and of its derivative along one more direction e.

    D_{v + c e}^{n + 1} is a polynomial in c of degree n + 1, whose slope at c = 0 is (n + 1) D_v^n D_e. Five points
    give this slope exactly up to degree 4.
    """
    count = len(directions)
    shifted = [directions + c * along for c in (0, 1, -1, 2, -2)]
    derivatives = _jet_of(network, x, torch.cat([*shifted, along.unsqueeze(0)]), order + 1, None)
    values, rates = [derivatives[0]], [derivatives[1][-1]]
    for n in range(1, order + 1):
        _, up, down, far_up, far_down = derivatives[n + 1][:-1].split(count)
        rates.append((8 * (up - down) - (far_up - far_down)) / (12 * (n + 1)))
        values.append(derivatives[n][:count])
    if weights is not None:
        for parts in (values, rates):
            parts[-1] = torch.tensordot(weights, parts[-1], 1).unsqueeze(0)
    return values, rates


def _polynomial(coefficients: Sequence[float], s: Tensor, rate: Tensor, order: int, weights: Tensor | None) -> Jet:
    """Return the jet of a polynomial in s, whose derivative along each direction is a constant `rate`."""
    derivatives = []
    for n in range(order + 1):
        value = torch.zeros_like(s)
        for power in range(len(coefficients) - 1, n - 1, -1):  # Horner's rule
            value = value * s + coefficients[power] * math.perm(power, n)
        factor = rate**n
        if weights is not None and n == order:
            factor = (weights.view(-1, *[1] * s.dim()) * factor).sum(0, keepdim=True)
        derivatives.append(factor * value if n else value)
    return derivatives


def _jet(model: Windows, x: Tensor, directions: Tensor, order: int, weights: Tensor | None) -> Jet:
    values = model.jet(x, directions, order, weights)
    return values if weights is None else [*values[:-1], values[-1][0]]


register(Windows, Entry(jet=_jet))
