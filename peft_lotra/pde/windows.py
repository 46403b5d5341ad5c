# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Windows in time: one network for each interval, which continues the previous interval exactly."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..derivatives.chain_rule import Jet, compose, multiply
from ..derivatives.stages import Entry, register
from ..kan.basis import in_transform
from ..modules.calls import is_tracing
from .boxes import ROUNDING
from .constraints import jet_of_network
from .point_cache import compute_once


# By `smoothness`: polynomials in s, powers ascending. The first one multiplies the network. The others carry the value
# and the slope at the start of a window, and vanish at its end with their slopes.
POLYNOMIALS = {
    1: [(0, 1), (1, -1)],
    2: [(0, 0, 1), (1, 0, -3, 2), (0, 1, -2, 1)],
}


class Windows(nn.Module):
    r"""Divide time into windows, t_0 < t_1 < ... < t_K, with a network for each. In the window from t_k on, with
    s = (t - t_k) / h and h = t_{k+1} - t_k, it computes

        n_k = (1 - s) a_k + s N_k                                       to continue the value,
        n_k = (1 - s)^2 (1 + 2 s) a_k + s (1 - s)^2 h b_k + s^2 N_k     to continue the first derivative, too,

    where a_k is the value of n_{k-1} at t_k, b_k its derivative in time, and n_0 = N_0. All networks N_k together are
    one function. Spatial conditions of a `HardConstraint` around it hold in all windows. `jet` has a closed form if it
    has one for the networks, up to order 4 without b_k, and 3 with b_k.

    Args:
        networks: The K networks, (..., I) to (..., O), a different one for each window.
        ends: The K + 1 times t_0 to t_K.
        time: The index of the time coordinate.
        smoothness: 1 to continue the value, 2 to continue the first derivative, too.

    Attributes:
        active: The window in training, None for none: the window of all points that are not before it, as delays are.
        looks_ahead: Whether points after the active window were evaluated, as by an integral over all times.
    """

    ends: Tensor

    def __init__(
        self,
        networks: Sequence[nn.Module],
        ends: Sequence[float],
        time: int,
        smoothness: int,
    ):
        super().__init__()
        times = torch.as_tensor(ends, dtype=torch.float64, device="cpu")
        self.networks = nn.ModuleList(networks)
        self.time = time
        self.smoothness = smoothness
        self.active: int | None = None
        self.looks_back = self.looks_ahead = False
        self.register_buffer("ends", times)

    def activate(self, window: int | None) -> None:
        """Train this window only, or all of them with None."""
        self.active = window
        self.looks_back = self.looks_ahead = False
        for k, network in enumerate(self.networks):
            network.requires_grad_(window in (None, k))

    def forward(self, x: Tensor) -> Tensor:
        """Inputs (..., I) to outputs (..., O)."""
        no_directions = x.new_empty(0, x.shape[-1])
        return self.jet(x, no_directions, 0, None)[0]

    def jet(
        self,
        x: Tensor,
        directions: Tensor,
        order: int,
        weights: Tensor | None,
    ) -> Jet:
        """Return the value and the derivatives up to an order."""
        arguments = (directions, order, weights)
        is_plain = not (in_transform() or is_tracing() or x.is_meta)
        last = len(self.networks) - 1
        if self.active is not None:
            if is_plain:
                self._look(x)
            if not self.looks_back:
                return self._jet_in_window(self.active, x, *arguments)
            last = self.active

        times = x[..., self.time].unsqueeze(-1)
        inner_ends = self.ends[1 : last + 1].to(x)
        window = (times >= inner_ends).sum(-1)
        # the rows of an active window stay together, as optimizers record layers that are evaluated at all of them
        if is_plain and self.active is None:
            return self._jet_of_rows(window, x, *arguments)

        jets = []
        for k in range(last + 1):
            inside = x.clone()
            start = None if k == 0 else inner_ends[k - 1]
            end = None if k == last else inner_ends[k]
            if start is not None or end is not None:
                inside[..., self.time] = times.squeeze(-1).clamp(start, end)
            jet_in_window = self._jet_in_window(k, inside, *arguments)
            is_here = (window == k).unsqueeze(-1)
            pairs = zip(jet_in_window, jets or jet_in_window, strict=True)
            jets = [torch.where(is_here, *pair) for pair in pairs]
        return jets

    def _look(self, x: Tensor) -> None:
        """Note whether points are before or after the active window."""
        start, end = self.ends[self.active : self.active + 2].to(x).tolist()  # pyright: ignore[reportOptionalOperand]
        slack = ROUNDING * (end - start)
        times = x[..., self.time].detach()
        self.looks_back |= bool((times < start - slack).any())
        self.looks_ahead |= bool((times > end + slack).any())

    def _jet_of_rows(
        self,
        window: Tensor,
        x: Tensor,
        directions: Tensor,
        order: int,
        weights: Tensor | None,
    ) -> Jet:
        """Return the jet at points (..., I) of several windows, each evaluated at its own rows."""
        arguments = (directions, order, weights)
        windows = window.unique().tolist() or [0]
        if len(windows) == 1:
            return self._jet_in_window(windows[0], x, *arguments)
        rows = x.flatten(0, -2)
        indices = [(window.flatten() == k).nonzero().squeeze(1) for k in windows]
        jets = [self._jet_in_window(k, rows[index], *arguments) for k, index in zip(windows, indices, strict=True)]
        order_of_rows = torch.cat(indices).argsort()
        outputs = []
        for parts in zip(*jets, strict=True):
            joined = torch.cat(parts, -2)[..., order_of_rows, :]
            outputs.append(joined.unflatten(-2, window.shape))
        return outputs

    def _jet_in_window(
        self,
        k: int,
        x: Tensor,
        directions: Tensor,
        order: int,
        weights: Tensor | None,
    ) -> Jet:
        """Return the jet of n_k."""
        arguments = (x, directions, order, weights)
        jets = [jet_of_network(self.networks[k], *arguments)]
        if k == 0:
            *lower, highest = jets[0]
            return jets[0] if weights is None else [*lower, highest.unsqueeze(0)]
        if self.active is None:
            jets += self._start(k, *arguments)
        else:  # the window before is not trained
            jets += compute_once(Windows._start, self, k, *arguments)

        start, end = self.ends[k : k + 2].to(x)
        width = end - start
        times = x[..., self.time].unsqueeze(-1)
        s = (times - start) / width
        rates = directions[:, self.time] / width
        rates = rates.view(-1, *[1] * x.dim())
        total: Jet = []
        for coefficients, values in zip(POLYNOMIALS[self.smoothness], jets, strict=True):
            factor = _polynomial(coefficients, s, rates, order, weights)
            product = multiply(values, factor, order, weights)
            total = list(map(torch.add, total, product)) if total else product
        return total

    def _start(
        self,
        k: int,
        x: Tensor,
        directions: Tensor,
        order: int,
        weights: Tensor | None,
    ) -> list[Jet]:
        """Return the jets of a_k and, to continue the slope, h b_k, as functions of the other coordinates."""
        network = self.networks[k - 1]
        previous, start, end = self.ends[k - 1 : k + 2].to(x)

        # at the start of the window, and across time
        x = x.clone()
        x[..., self.time] = start
        across = directions.clone()
        across[:, self.time] = 0.0
        if self.smoothness == 1:
            return [jet_of_network(network, x, across, order, weights)]

        along = x.new_zeros(x.shape[-1])
        along[self.time] = end - start
        values, slopes = _jet_and_slope(network, x, across, along, order, weights)
        if k > 1:  # the slope of s^2 N at its end
            rate = 2 * (end - start) / (start - previous)
            pairs = zip(values, slopes, strict=True)
            slopes = [rate * value + slope for value, slope in pairs]
        return [values, slopes]


def _jet_and_slope(
    network: nn.Module,
    x: Tensor,
    directions: Tensor,
    along: Tensor,
    order: int,
    weights: Tensor | None,
) -> tuple[Jet, Jet]:
    """Return the jet of a network, and of its derivative along one more direction e.

    D_{v + c e}^{n + 1} is a polynomial in c of degree n + 1, whose slope at c = 0 is (n + 1) D_v^n D_e. Five points
    give this slope exactly up to degree 4.
    """
    lines = [directions + c * along for c in (0, 1, -1, 2, -2)]
    lines.append(along.unsqueeze(0))
    derivatives = jet_of_network(network, x, torch.cat(lines), order + 1, None)

    count = len(directions)
    values = [derivatives[0]]
    slopes = [derivatives[1][-1]]
    for n in range(1, order + 1):
        values.append(derivatives[n][:count])
        _, up, down, far_up, far_down, _ = derivatives[n + 1].split(count)
        slope = (8 * (up - down) - (far_up - far_down)) / 12
        slopes.append(slope / (n + 1))

    if weights is not None:
        for jet_of_all in (values, slopes):
            jet_of_all[-1] = torch.tensordot(weights, jet_of_all[-1], 1)
    return values, slopes


def _polynomial(
    coefficients: Sequence[float],
    s: Tensor,
    rates: Tensor,
    order: int,
    weights: Tensor | None,
) -> Jet:
    """Return the jet of a polynomial in s, whose slopes along the directions are `rates`."""
    derivatives = []
    for n in range(order + 1):
        value = torch.zeros_like(s)
        for power in reversed(range(n, len(coefficients))):  # Horner's rule
            coefficient = coefficients[power] * math.perm(power, n)
            value = value * s + coefficient
        derivatives.append(value)
    return compose(derivatives, [rates], order, weights)


register(Windows, Entry(jet=Windows.jet))


def rows_in_window(
    terms: Sequence[Any],
    low: Tensor,
    high: Tensor,
) -> list[Any]:
    """Return terms with the rows whose points, their first tensor (n, I), are in a box; none without rows there."""
    slack = 1e-9 * (high - low)
    inner = []
    for function, rows, weight in terms:
        points = rows[0].to(low)
        is_inside = (points >= low - slack) & (points <= high + slack)
        mask = is_inside.all(1)
        if mask.any():
            inner.append((function, tuple(row[mask] for row in rows), weight))
    return inner
