# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Which ranks an update needs: the spectra of fine-tuning updates, and the ranks for an energy or a budget.

The spectrum of a tensor is the singular values of its unfoldings, one for each mode. The energy that the truncated
HOSVD keeps, a share of the squared norm, is the sum of squares over the leading block of the HOSVD's core, with the
ranks as its shape. HOOI keeps at least as much.

Source: L. De Lathauwer et al., "A Multilinear Singular Value Decomposition", SIMAX 21 (2000).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from peft.utils.other import get_pattern_key
from torch import nn

from ..modules.checks import as_number, check_number
from ..modules.report import Report, TextTable
from ..tucker import Ranks, cap_ranks, check_ranks, hosvd
from .data_weights import DataWeights
from .updates import coefficient_updates


@dataclass(eq=False)
class LayerSpectrum:
    """The spectrum of the update of one layer's coefficient tensor.

    Attributes:
        shape: (out, in, basis) or (out, in, basis, kernel), the residual slice counted in basis.
        norm: The Frobenius norm.
        singular_values: Those of the unfoldings (out, in basis [kernel]), (in, out basis [kernel]) and so on, falling.
        energies: Of `shape`: entry (ro - 1, ri - 1, rb - 1 [, rk - 1]) is the share that the truncated HOSVD of ranks
            (ro, ri, rb [, rk]) keeps; 1 everywhere for a zero tensor.
    """

    shape: tuple[int, ...]
    norm: float
    singular_values: tuple[torch.Tensor, ...] = field(repr=False)
    energies: torch.Tensor = field(repr=False)

    def energy(self, r: Ranks) -> float:
        """Return the share of the energy, 0 to 1, that the truncated HOSVD of ranks `r` keeps."""
        return self.energies[tuple(rank - 1 for rank in cap_ranks(check_ranks(r), self.energies.shape))].item()

    def costs(self) -> torch.Tensor:
        """Return the number of parameters of an adapter, for all ranks; laid out as `energies`."""
        core, factors = torch.ones_like(self.energies, dtype=torch.int64), 0
        for mode, size in enumerate(self.shape):
            ranks = torch.arange(1, size + 1, device=core.device).view(-1, *[1] * (len(self.shape) - mode - 1))
            core *= ranks
            factors = factors + torch.where(ranks < size, ranks * size, 0)  # a full mode has no factor
        return core + factors


@dataclass(eq=False)
class Spectrum(Report):
    """The spectra of all layers; prints as a table.

    Attributes:
        layers: The spectra by name, in the order of the model.
    """

    layers: dict[str, LayerSpectrum]

    def energy(self, r: Ranks) -> float:
        """Return the share of the energy of all layers that ranks keep together."""
        total = kept = 0.0
        for layer in self.layers.values():
            total += layer.norm**2
            kept += layer.norm**2 * layer.energy(r)
        return kept / total if total else 1.0

    def _table(self) -> TextTable:
        triples = ((1, 1, 1), (4, 4, 4), (8, 8, 4))
        columns = ["layer", ">out x in x basis", ">norm", *(f">kept by {r}" for r in triples), ">ranks that keep 95 %"]
        rows = []
        for name, layer in self.layers.items():
            shares = [f"{100 * layer.energy(r):.1f} %" for r in triples]
            sizes = " x ".join(map(str, layer.shape))
            rows.append([name, sizes, f"{layer.norm:.3g}", *shares, str(cheapest(layer, 0.95))])
        return TextTable(columns, rows, ["kept: the share of the squared norm"])


def update_spectrum(base: nn.Module, tuned: nn.Module) -> Spectrum:
    """Compute the spectrum of the change of each KAN layer's coefficients by fine-tuning.

    Active adapters count. Where a kind of layer multiplies the splines of each edge by a trainable scale
    (efficient-kan, pykan, qkan's FourierKAN) and the scales changed too, the spectrum is that of coefficient times
    scale.

    Args:
        base, tuned: Two models of one architecture, adapted or not; both stay unchanged.

    Raises:
        ValueError: The KAN layers differ in name, kind or shape, there are none, or a coefficient is not finite.

    Example:
        >>> import copy
        >>> from peft_lotra.kan import KAN
        >>> base = KAN([3, 5, 4])
        >>> tuned = copy.deepcopy(base)
        >>> tuned.layers[0].spline_weight.data[2] += 0.1  # of rank (1, 1, 1)
        >>> update_spectrum(base, tuned).layers["layers.0"].energy(1) > 0.999
        True
    """
    return Spectrum({name: spectrum_of(update.tensor) for name, update in coefficient_updates(base, tuned).items()})


def check_one_given(**options: Any) -> None:
    """Raise a ValueError unless one of these options is given, and the others are None."""
    if list(options.values()).count(None) != len(options) - 1:
        raise ValueError(f"Pass one of {', '.join(options)}; got {options}.")


def choose_ranks(
    layers: Mapping[str, LayerSpectrum], energy: float | None = None, budget: int | None = None
) -> dict[str, tuple[int, ...]]:
    """Return the ranks of each layer for an energy or for a budget."""
    if energy is None:
        return _allocate(layers, budget)
    check_number(energy, "energy", "(0, 1]")
    return {name: cheapest(layer, energy) for name, layer in layers.items()}


def ranks_by_layer(
    names: Iterable[str], pattern: Mapping[str, Ranks], default: Ranks | None, argument: str = "r"
) -> dict[str, Ranks]:
    """Return the ranks of layers by a pattern, as in [`LoTRAConfig`], or else the default; none without both."""
    ranks = {name: pattern.get(get_pattern_key(list(pattern), name), default) for name in names}
    return {name: check_ranks(r, argument) for name, r in ranks.items() if r is not None}


def spectrum_of(tensor: torch.Tensor) -> LayerSpectrum:
    """Compute the spectrum of a tensor (out, in, basis [, kernel])."""
    decomposition, singular_values = hosvd(tensor)
    squares = decomposition.core.square()
    for mode in range(squares.dim()):
        squares = squares.cumsum(mode)
    total = squares.flatten()[-1]
    energies = squares / total if total > 0 else torch.ones_like(squares)
    # ranks above the product of the others keep no more energy, but a full mode costs less
    for mode, size in enumerate(tensor.shape):
        ranks = torch.arange(size, device=energies.device).clamp(max=energies.shape[mode] - 1)
        energies = energies.index_select(mode, ranks)
    return LayerSpectrum(tuple(tensor.shape), tensor.double().norm().item(), singular_values, energies)


def weighted_spectra(
    tensors: Mapping[str, torch.Tensor], weights: Mapping[str, DataWeights]
) -> dict[str, LayerSpectrum]:
    """Compute the spectra of tensors (out, in, basis [, kernel]) by layer, weighted by data where there is any.

    In the metric of the model's outputs, energies of layers compare. If a layer has none, all layers count alike.
    """
    spectra = {}
    for name, tensor in tensors.items():
        if name in weights:
            tensor = weights[name].weigh(tensor)
        if 0 < len(weights) < len(tensors):
            tensor = tensor / tensor.norm().clamp(min=1e-300)
        spectra[name] = spectrum_of(tensor)
    return spectra


def cheapest(layer: LayerSpectrum, energy: float) -> tuple[int, ...]:
    """Return the ranks with the fewest parameters that keep the energy."""
    enough = layer.energies >= energy - 1e-12  # the table is rounded
    costs = torch.where(enough, layer.costs(), torch.iinfo(torch.int64).max)
    return _ranks_at(layer, costs.argmin())


def _allocate(layers: Mapping[str, LayerSpectrum], budget: int | None) -> dict[str, tuple[int, ...]]:
    """Find the ranks that keep the most energy for at most `budget` parameters in all.

    Each greedy step raises the ranks of the layer that gains the most energy per parameter. The result is optimal
    until the first step above the budget, since the steps follow concave hulls.
    """
    frontiers = {name: _frontier(layer) for name, layer in layers.items()}
    at = dict.fromkeys(frontiers, 0)
    while True:
        spent = sum(int(costs[at[name]]) for name, (costs, _, _) in frontiers.items())
        left = as_number(budget) - spent
        if not left >= 0:
            raise ValueError(
                f"`budget` is {budget!r}, but ranks of 1 in each of the {len(layers)} layers take {spent} parameters "
                "already."
            )
        best = (0.0, "", 0)
        for name, (costs, energies, _) in frontiers.items():
            now, following = at[name], at[name] + 1
            price = costs[following:] - costs[now]
            rate = torch.where(price <= left, (energies[following:] - energies[now]) / price, 0)
            if len(rate):
                best = max(best, (rate.max().item(), name, following + int(rate.argmax())))
        gain, name, index = best
        if gain == 0:
            return {name: _ranks_at(layers[name], frontiers[name][2][index]) for name, index in at.items()}
        at[name] = index


def _frontier(layer: LayerSpectrum) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return parameters, energy and flat index of all ranks that keep more energy than any cheaper one."""
    costs, order = layer.costs().flatten().sort(stable=True)
    energies = layer.energies.flatten()[order]
    before = torch.cat([energies.new_tensor([-1.0]), energies.cummax(0).values[:-1]])
    better = energies > before + 1e-12
    return costs[better], layer.norm**2 * energies[better], order[better]


def _ranks_at(layer: LayerSpectrum, flat_index: torch.Tensor) -> tuple[int, ...]:
    return tuple(int(index) + 1 for index in torch.unravel_index(flat_index, layer.energies.shape))
