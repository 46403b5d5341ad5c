# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""A report on a KAN layer: the role of each parameter, and whether the layer computes what its description says."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..layers.coefficients import expand_name
from ..layers.describe import compare
from ..layers.formula import find_formula, find_obstacle
from ..modules.calls import check_module, read_at_rest
from ..modules.report import Report, TextTable
from .layer import Target
from .targets import locate_target


@dataclass(eq=False)
class KANLayerReport(Report):
    """The report of [`check_kan_layer`].

    Attributes:
        kind (`str`): The kind of the layer.
        shape (`tuple[int, ...]`): (out, in, basis) or (out, in, basis, kernel) of its coefficients.
        roles (`dict[str, str]`): The role of each parameter: `"coefficients"`, `"residual"`, `"edge scale"`, `"bias"`,
            `"grid"`, `"constant"` if it is not trained, or `"other"`.
        sizes (`dict[str, int]`): The number of elements of each parameter.
        used (`dict[str, bool] | None`): Whether the output depends on each parameter; `None` if the layer could not be
            run.
        coverage (`float`): The share of the elements that adapters change, of those that the output depends on and
            that are no grid or constant.
        axes (`str`): Whether the gradients of the layer agree with the axes of the description.
        linear (`str`): Whether the output is linear in the coefficients.
        fast_path (`str`): Whether adapted layers take the fast path, and if not, why.
        contradiction (`str`): The layout that gradients verify, if it is another one.
        doubts (`dict[str, str]`): Parameters of a layer of no built-in kind that are left out, or in which the
            output is not linear, each with the reason.
    """

    kind: str
    shape: tuple[int, ...]
    roles: dict[str, str]
    sizes: dict[str, int]
    used: dict[str, bool] | None
    coverage: float
    axes: str
    linear: str
    fast_path: str
    contradiction: str = ""
    doubts: dict[str, str] = field(default_factory=dict)

    def _table(self) -> TextTable:
        words = {True: "yes", False: "no", None: "?"}
        rows = [
            [name, role, f"{self.sizes[name]:,}", words[None if self.used is None else self.used[name]]]
            for name, role in self.roles.items()
        ]
        modes = ["outputs", "inputs", "basis functions", "places of the kernel"]
        notes = [
            f"{self.kind}: {', '.join(f'{size} {mode}' for size, mode in zip(self.shape, modes, strict=False))}",
            f"adapters change {self.coverage:.1%} of the elements that the output depends on",
            f"axes: {self.axes}",
            f"linear in the coefficients: {self.linear}",
            f"fast path: {self.fast_path}",
            *([self.contradiction] if self.contradiction else []),
            *(f"{name}: {reason}" for name, reason in self.doubts.items()),
        ]
        return TextTable(["parameter", "role", ">elements", "used"], rows, notes)


def check_kan_layer(layer: nn.Module, x: torch.Tensor | tuple[Any, ...] | None = None) -> KANLayerReport:
    """Check that a KAN layer computes what the description of its kind says, without changing it.

    Args:
        layer (`nn.Module`): A layer, adapted or not.
        x (`torch.Tensor` or `tuple`, *optional*): An input of the layer as it takes it, e.g. (batch, in), or a tuple
            of all its arguments, inputs first. By default one input is made up; layers that take more arguments are
            then not verified.

    Returns:
        `KANLayerReport`: It prints as a table, and `as_dict()` has its values.

    Raises:
        ValueError: The layer is of no known kind, or a pattern does not fit.
        TypeError: `layer` is no module.

    Example:
        >>> from peft_lotra.kan import KANLinear
        >>> print(check_kan_layer(KANLinear(3, 4)))
        parameter      role          elements  used
        spline_weight  coefficients        96  yes
        base_weight    residual            12  yes
        peft-lotra: 4 outputs, 3 inputs, 8 basis functions
        adapters change 100.0% of the elements that the output depends on
        axes: outputs as described, inputs as described
        linear in the coefficients: yes
        fast path: yes, by splines in closed form
    """
    check_module(layer, "layer")
    with read_at_rest(layer):
        return _compare(layer, x)


def _compare(layer: nn.Module, x: torch.Tensor | tuple[Any, ...] | None) -> KANLayerReport:
    target = locate_target("", layer)
    layer, spec, tensor = target
    args = x if isinstance(x, tuple) else () if x is None else (x,)
    description = compare(layer, spec, *args)
    roles = _roles(target)
    sizes = {name: parameter.numel() for name, parameter in layer.named_parameters()}
    used = None if description.used is None else {name: description.used.get(name, False) for name in roles}
    adapted, fixed = ("coefficients", "residual"), ("grid", "constant")
    counted = []
    for name, role in roles.items():
        is_used = used is None or used[name]
        if role in adapted or (is_used and role not in fixed):
            counted.append(name)
    reached = sum(sizes[name] for name in counted if roles[name] in adapted)
    return KANLayerReport(
        kind=spec.kind,
        shape=tensor.shape,
        roles=roles,
        sizes=sizes,
        used=used,
        coverage=reached / max(sum(sizes[name] for name in counted), 1),
        axes=str(description.axes),
        linear={True: "yes", False: "no", None: "not checked"}[description.is_linear],
        fast_path=_fast_path(target),
        contradiction=description.reason,
        doubts=dict(description.doubts),
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
    if formula := find_formula(*target):
        return f"yes, by {'splines in closed form' if formula.is_uniform else 'the `basis` of its kind'}"
    other = "the functions of its kind give other outputs (name a bias by `bias`, a norm by `normalization`)"
    why = find_obstacle(*target) or other
    return f"no, since {why}; general path: the layer itself runs, with updated parameters"
