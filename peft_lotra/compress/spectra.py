# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Spectra of fine-tuning updates, and the ranks for an energy or a budget.

The spectrum of a tensor is the singular values of its unfoldings, one for each mode. The energy that the truncated
HOSVD keeps, a share of the squared norm, is the sum of squares over the leading block of the HOSVD's core, with the
ranks as its shape. HOOI keeps at least as much.

Source: L. De Lathauwer et al., "A Multilinear Singular Value Decomposition", SIMAX 21 (2000).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from peft.utils.other import get_pattern_key
from torch import Tensor, nn

from ..modules.report import Report, TextTable
from ..tucker import Ranks, cap_ranks, check_ranks, hosvd
from .data_weights import TINY, DataWeights
from .updates import LayerRanks, coefficient_updates


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
    singular_values: tuple[Tensor, ...] = field(repr=False)
    energies: Tensor = field(repr=False)

    def energy(self, r: Ranks) -> float:
        """Return the share of the energy, 0 to 1, that the truncated HOSVD of ranks `r` keeps."""
        ranks = cap_ranks(check_ranks(r), self.shape)
        return self.energies[tuple(rank - 1 for rank in ranks)].item()

    def costs(self) -> Tensor:
        """Return the number of parameters of an adapter, for all ranks; laid out as `energies`."""
        modes = [torch.arange(1, size + 1, device=self.energies.device) for size in self.shape]
        ranks = torch.meshgrid(modes, indexing="ij")
        costs = torch.stack(ranks).prod(0)  # of the core
        for ranks_of_mode, size in zip(ranks, self.shape, strict=True):
            has_factor = ranks_of_mode < size
            costs += ranks_of_mode * size * has_factor
        return costs


@dataclass(eq=False)
class Spectrum(Report):
    """The spectra of all layers; prints as a table.

    Attributes:
        layers: The spectra by name, in the order of the model.
    """

    layers: dict[str, LayerSpectrum]

    def energy(self, r: Ranks) -> float:
        """Return the share of the energy of all layers that ranks keep together."""
        total = 0.0
        retained = 0.0
        for layer in self.layers.values():
            total += layer.norm**2
            retained += layer.norm**2 * layer.energy(r)
        return retained / total if total else 1.0

    def _table(self) -> TextTable:
        columns = ["layer", ">out x in x basis", ">norm", ">kept by (4, 4, 4)", ">ranks that keep 95 %"]
        rows = []
        for name, layer in self.layers.items():
            sizes = " x ".join(map(str, layer.shape))
            share = layer.energy((4, 4, 4))
            ranks = cheapest(layer, 0.95)
            rows.append([name, sizes, f"{layer.norm:.3g}", f"{share:.1%}", str(ranks)])
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
    updates = coefficient_updates(base, tuned)
    return Spectrum({name: spectrum_of(update.tensor) for name, update in updates.items()})


def spectrum_of(tensor: Tensor) -> LayerSpectrum:
    """Compute the spectrum of a tensor (out, in, basis [, kernel])."""
    decomposition, singular_values = hosvd(tensor)
    squares = decomposition.core.square()
    for mode in range(squares.dim()):
        squares = squares.cumsum(mode)
    total = squares.flatten()[-1]
    energies = squares / total if total > 0 else torch.ones_like(squares)

    # ranks above the product of the others keep no more energy, but a full mode costs less
    for mode, size in enumerate(tensor.shape):
        last = energies.shape[mode] - 1
        index = torch.arange(size, device=energies.device).clamp(max=last)
        energies = energies.index_select(mode, index)
    norm = tensor.double().norm().item()
    return LayerSpectrum(tuple(tensor.shape), norm, singular_values, energies)


def weighted_spectra(
    tensors: Mapping[str, Tensor],
    weights: Mapping[str, DataWeights],
) -> dict[str, LayerSpectrum]:
    """Compute the spectra of tensors (out, in, basis [, kernel]) by layer, weighted by data if there are weights.

    In the metric of the model's outputs, energies of layers compare. If a layer has no weights, all layers count
    alike.
    """
    spectra = {}
    are_comparable = len(weights) in (0, len(tensors))
    for name, tensor in tensors.items():
        if name in weights:
            tensor = weights[name].weigh(tensor)
        if not are_comparable:
            tensor = tensor / tensor.norm().clamp(min=TINY)
        spectra[name] = spectrum_of(tensor)
    return spectra


def ranks_by_layer(
    tensors: Mapping[str, Tensor],
    pattern: Mapping[str, Ranks],
    default: Ranks | None,
) -> LayerRanks:
    """Return the ranks of layers by a pattern, as in [`LoTRAConfig`], or else the default; none without both."""
    ranks = {}
    for name, tensor in tensors.items():
        key = get_pattern_key(list(pattern), name)
        r = pattern.get(key, default)
        if r is not None:
            ranks[name] = cap_ranks(check_ranks(r), tensor.shape)
    return ranks


def choose_ranks(
    layers: Mapping[str, LayerSpectrum],
    energy: float | None = None,
    budget: int | None = None,
) -> LayerRanks:
    """Return the ranks of each layer for an energy, or the most energy for a budget of parameters.

    For a budget, each greedy step raises the ranks of the layer that gains the most energy per parameter. The result
    is optimal until the first step above the budget, since the steps follow concave hulls.
    """
    if energy is not None:
        return {name: cheapest(layer, energy) for name, layer in layers.items()}

    # the first entry of a frontier is the choice so far
    frontiers = {name: _frontier(layer) for name, layer in layers.items()}
    least = sum(int(costs[0]) for costs, _, _ in frontiers.values())
    left = (budget or 0) - least
    if not left >= 0:  # or NaN
        raise ValueError(f"`budget` is {budget}, but ranks of 1 in {len(layers)} layers take {least} parameters.")

    while True:
        best_rate = 0.0
        best_name = ""
        best_index = 0
        for name, (costs, energies, _) in frontiers.items():
            prices = costs - costs[0]
            gains = energies - energies[0]
            rates = gains / prices.clamp(min=1)
            rate, index = torch.where(prices <= left, rates, 0).max(0)
            if rate > best_rate:
                best_rate = rate.item()
                best_name = name
                best_index = int(index)
        if best_rate == 0:
            break
        costs = frontiers[best_name][0]
        left -= int(costs[best_index] - costs[0])
        frontiers[best_name] = [column[best_index:] for column in frontiers[best_name]]
    ranks = {}
    for name, (_, _, indices) in frontiers.items():
        ranks[name] = _ranks_at(layers[name], indices[0])
    return ranks


def cheapest(layer: LayerSpectrum, energy: float) -> tuple[int, ...]:
    """Return the ranks with the fewest parameters that keep the energy."""
    enough = layer.energies >= energy - 1e-12  # the table is rounded
    costs = torch.where(enough, layer.costs(), torch.iinfo(torch.int64).max)
    return _ranks_at(layer, costs.argmin())


def _frontier(layer: LayerSpectrum) -> list[Tensor]:
    """Return parameters, energy and flat index of all ranks that keep more energy than any cheaper ones."""
    costs, order = layer.costs().flatten().sort(stable=True)
    energies = layer.energies.flatten()[order]
    largest_so_far = energies.cummax(0).values
    gains = largest_so_far.diff(prepend=energies.new_tensor([-1.0]))
    is_better = gains > 1e-12
    energies = layer.norm**2 * energies
    return [column[is_better] for column in (costs, energies, order)]


def _ranks_at(layer: LayerSpectrum, flat_index: Tensor) -> tuple[int, ...]:
    indices = torch.unravel_index(flat_index, layer.shape)
    return tuple(int(index) + 1 for index in indices)
