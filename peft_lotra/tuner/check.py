# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""A report on a KAN layer: the role of each parameter, and whether the layer computes what its description says."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from ..layers.coefficients import expand_name
from ..layers.describe import compare
from ..layers.formula import find_formula, find_obstacle
from ..modules.calls import check_module, read_at_rest
from ..modules.report import Report, TextTable
from .layer import Target
from .targets import locate_target


_WORDS: dict[bool | None, str] = {True: "yes", False: "no"}


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
        rows = []
        for name, role in self.roles.items():
            is_used = None if self.used is None else self.used[name]
            rows.append([name, role, f"{self.sizes[name]:,}", _WORDS.get(is_used, "?")])
        modes = ["outputs", "inputs", "basis functions", "places of the kernel"]
        sizes = [f"{size} {mode}" for size, mode in zip(self.shape, modes, strict=False)]
        notes = [
            f"{self.kind}: {', '.join(sizes)}",
            f"adapters change {self.coverage:.1%} of the elements that the output depends on",
            f"axes: {self.axes}",
            f"linear in the coefficients: {self.linear}",
            f"fast path: {self.fast_path}",
        ]
        if self.contradiction:
            notes.append(self.contradiction)
        notes += [f"{name}: {reason}" for name, reason in self.doubts.items()]
        return TextTable(["parameter", "role", ">elements", "used"], rows, notes)


def check_kan_layer(
    layer: nn.Module,
    x: Tensor | tuple[Any, ...] | None = None,
) -> KANLayerReport:
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
    args: tuple[Any, ...] = ()
    if x is not None:
        args = x if isinstance(x, tuple) else (x,)
    with read_at_rest(layer):
        target = locate_target("", layer)
        layer, spec, tensor = target
        description = compare(layer, spec, *args)
        fast_path = _fast_path(target)

    roles = _roles(target)
    sizes = {name: parameter.numel() for name, parameter in layer.named_parameters()}
    used = None
    if description.used is not None:
        used = {name: description.used.get(name, False) for name in roles}

    adapted = 0
    others = 0
    for name, role in roles.items():
        if role in ("coefficients", "residual"):
            adapted += sizes[name]
        elif role not in ("grid", "constant") and (used is None or used[name]):
            others += sizes[name]

    return KANLayerReport(
        kind=spec.kind,
        shape=tensor.shape,
        roles=roles,
        sizes=sizes,
        used=used,
        coverage=adapted / max(adapted + others, 1),
        axes=str(description.axes),
        linear=_WORDS.get(description.is_linear, "not checked"),
        fast_path=fast_path,
        contradiction=description.reason,
        doubts=dict(description.doubts),
    )


def _roles(target: Target) -> dict[str, str]:
    """Return the role of each parameter. The later ones of several roles count."""
    layer, spec, tensor = target
    is_frozen = not any(parameter.requires_grad for parameter in layer.parameters())
    roles = {}
    for name, parameter in layer.named_parameters():
        roles[name] = "other" if is_frozen or parameter.requires_grad else "constant"
    described = {
        "grid": spec.grid,
        "bias": [spec.bias or ""],
        "edge scale": (spec.edge_scale or ())[:1],
        "residual": tensor.parameters,
        "coefficients": tensor.names,
    }
    for role, names in described.items():
        for name in names:
            for member in expand_name(layer, name):
                if member in roles:
                    roles[member] = role
    return roles


def _fast_path(target: Target) -> str:
    reader = find_formula(*target)
    if reader is not None:
        return "yes, by splines in closed form" if reader.is_uniform else "yes, by the `basis` of its kind"
    reason = find_obstacle(*target)
    if reason is None:
        reason = "the functions of its kind give other outputs (name a bias by `bias`, a norm by `normalization`)"
    return f"no, since {reason}; general path: the layer itself runs, with updated parameters"
