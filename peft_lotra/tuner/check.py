# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""What LoTRA reaches of a KAN layer, and whether its description is what the layer computes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..layers.candidates import find_candidates
from ..layers.coefficients import expand_name
from ..layers.probe import CURVATURE, Probe
from ..modules.calls import check_module, read_at_rest
from ..report import Report, TextTable
from .fused import find_formula
from .layer import Target
from .targets import locate_target


@dataclass(eq=False)
class KANLayerReport(Report):
    """What [`check_kan_layer`] found.

    Attributes:
        family (`str`): The family of the layer.
        shape (`tuple[int, ...]`): (out, in, basis) or (out, in, basis, kernel) of its coefficients.
        roles (`dict[str, str]`): What each parameter is: `"coefficients"`, `"residual"`, `"edge scale"`, `"bias"`,
            `"grid"`, `"constant"` if it is not trained, or `"other"`.
        sizes (`dict[str, int]`): The number of elements of each parameter.
        used (`dict[str, bool] | None`): Whether the output depends on each parameter; `None` if the layer could not be
            run.
        coverage (`float`): The share of the elements, of those parameters that the output depends on and that are no
            grid or constant, that adapters reach.
        axes (`str`): What gradients say of the axes.
        linear (`str`): Whether the output is linear in the coefficients.
        fast_path (`str`): Whether adapted layers take the fast path, or why not.
    """

    family: str
    shape: tuple[int, ...]
    roles: dict[str, str]
    sizes: dict[str, int]
    used: dict[str, bool] | None
    coverage: float
    axes: str
    linear: str
    fast_path: str

    def _table(self) -> TextTable:
        words = {True: "yes", False: "no", None: "?"}
        rows = [
            [name, role, f"{self.sizes[name]:,}", words[None if self.used is None else self.used[name]]]
            for name, role in self.roles.items()
        ]
        notes = [
            f"{self.family}, coefficients {self.shape}, coverage {self.coverage:.1%}",
            f"axes: {self.axes}",
            f"linear: {self.linear}",
            f"fast path: {self.fast_path}",
        ]
        return TextTable(["parameter", "role", ">elements", "used"], rows, notes)


def check_kan_layer(layer: nn.Module, x: torch.Tensor | tuple[Any, ...] | None = None) -> KANLayerReport:
    """Compares a KAN layer with the description of its family, without changing it.

    Args:
        layer (`nn.Module`): A layer, adapted or not.
        x (`torch.Tensor` or `tuple`, *optional*): An input of the layer as it takes it, e.g. (batch, in), or a tuple
            of all its arguments, inputs first. By default one input is made up; layers that take more arguments are
            then not verified.

    Returns:
        `KANLayerReport`: It prints as a table, and `as_dict()` has its values.

    Raises:
        ValueError: The layer is of no known family, or a pattern does not fit. The message has a registration to
            paste, if one can be found.
        TypeError: `layer` is no module.

    Example:
        >>> from peft_lotra.kan import KANLinear
        >>> print(check_kan_layer(KANLinear(3, 4)))
        parameter      role          elements  used
        spline_weight  coefficients        96  yes
        base_weight    residual            12  yes
        peft-lotra, coefficients (4, 3, 8), coverage 100.0%
        axes: outputs verified, inputs verified
        linear: yes
        fast path: open, by splines in closed form
    """
    check_module(layer, "layer")
    with read_at_rest(layer):
        return _compare(layer, x)


def _compare(layer: nn.Module, x: torch.Tensor | tuple[Any, ...] | None) -> KANLayerReport:
    try:
        target = locate_target("", layer)
    except ValueError as error:
        found = [candidate for candidate in find_candidates(layer, set()) if not candidate.name]
        if not found:
            raise
        raise ValueError(f"{error} It may be described by\n{found[0].registration}") from error
    layer, spec, tensor = target
    args = x if isinstance(x, tuple) else () if x is None else (x,)
    probe = Probe(layer, spec.read_grid(layer), args)
    roles = _roles(target)
    sizes = {name: parameter.numel() for name, parameter in layer.named_parameters()}
    try:
        used = probe.reached(list(roles), tensor)
    except Exception:  # the layer's, which may want other arguments
        used = None
    ours, fixed = ("coefficients", "residual"), ("grid", "constant")
    counted = [n for n, role in roles.items() if role in ours or (role not in fixed and (used is None or used[n]))]
    reached = sum(sizes[name] for name in counted if roles[name] in ours)
    curvature = probe.curvature(tensor)
    linear = "not verified" if curvature is None else "yes" if curvature <= CURVATURE else f"no, by {curvature:.0%}"
    return KANLayerReport(
        family=spec.family,
        shape=tensor.shape,
        roles=roles,
        sizes=sizes,
        used=used,
        coverage=reached / max(sum(sizes[name] for name in counted), 1),
        axes=str(probe.axes(tensor)),
        linear=linear if spec.linear else f"{linear} (described as not linear)",
        fast_path=_fast_path(target),
    )


def _roles(target: Target) -> dict[str, str]:
    layer, spec, tensor = target
    trains = any(parameter.requires_grad for parameter in layer.parameters())  # of a frozen model nothing does
    roles = {n: "constant" if trains and not p.requires_grad else "other" for n, p in layer.named_parameters()}
    scales = spec.edge_scale[:1] if spec.edge_scale else ()
    for role, names in (("grid", spec.grid), ("bias", filter(None, [spec.bias])), ("edge scale", scales)):
        members = [member for name in names for member in expand_name(layer, name)]
        roles.update({member: role for member in members if member in roles})
    roles.update({name: "residual" for name in tensor.parameters if name in roles})
    roles.update({name: "coefficients" for name in tensor.names if name in roles})
    return roles


def _fast_path(target: Target) -> str:
    formula = find_formula(*target)
    if formula is None:
        return "closed: the base layer runs"
    return "open, by splines in closed form" if formula.closed_form else "open, by the family's `basis`"
