# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""The description of a kind of KAN layer, and its entry in the files of adapters."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from numbers import Number
from operator import attrgetter
from typing import Any

import torch
from torch import nn

from ..kan.basis import UniformGrid
from .coefficients import CoefficientTensor, Described, expand_name, get_or_none, locate_coefficients
from .layout import parse_layout


Grid = dict[str, "torch.Tensor | int | float"]

# The fields in a file, which are no functions, and their types; of `axes` it has the lengths.
_IN_FILES: dict[str, type] = {
    **dict.fromkeys(("coefficients", "residual", "edge_scale", "grid", "grid_methods", "checkpoint_methods"), list),
    **{"groups": str, "bias": str, "network_methods": dict, "axes": dict},
}


@dataclass(frozen=True)
class KANLayerSpec:
    """The description of a kind of KAN layer, as [`register_kan_layer`] takes it.

    Args:
        family (`str`): The name of the kind of layer, e.g. that of its library.
        matches (`type` or `Callable`): The class of the layers, or a predicate on a module. Prefer a predicate on the
            parameters' names where users copy the file and rename the class.
        coefficients (`tuple[str, str]` or a list of them): The parameter of the coefficients (dotted names reach into
            sub-modules, `*` stands for the members of a list: `"convs.*.weight"`) and its layout as an einops pattern:
            `o` and `i` are the output and input features, `...` the axes of the kernel of a convolution, and any other
            axes make up the basis mode in the order in which they appear. `"o i k"`, `"o (i k)"`, `"t o i g"`,
            `"o (i k) ..."`; `"o ((i k) + i)"` where the residual weights are packed behind the coefficients. Several
            parts are joined along the basis mode; one after the first may lack `o` or `i`, and is shared by them, and
            one of a number for each edge is shared along a kernel. See layout.py.
        residual (`tuple[str, str]`, *optional*): The parameter of the residual branch and its layout, of `o` and `i`
            `...` and the axis of `groups`. A layer on which it is absent or `None` has no residual branch.
        groups (`str`): The axis of blocks that have inputs of their own, e.g. `"g"`. They are a part of the output
            mode, and `i` counts the inputs of one block. The members of a list by `*` are such blocks too.
        grid (`tuple[str, ...]`): The attributes, tensors and numbers, that give the coefficients their meaning.
        grid_methods (`tuple[str, ...]`): The layer's methods that change that state, or cut or permute the
            coefficients. They raise while an adapter is attached and not merged.
        network_methods (`dict[str, str | None]`): Methods of the network around the layer that rebuild it, replace
            its layers or move their grids. They raise until the adapters are unloaded; where the value is the name of
            an argument, only if that argument is true.
        checkpoint_methods (`tuple[str, ...]`): Methods of the network around the layer that save it, with its adapters
            merged and under its original names.
        basis (`Callable`, *optional*): `basis(layer, x)` with x (batch, in) returns the basis functions
            (batch, in, basis). It opens the fast path if the layer computes basis(x) . (edge_scale * coefficients) +
            activation(x) . residual + bias: the two are compared on a few points.
        splines (`Callable`, *optional*): `splines(layer)` returns the [`UniformGrid`] of the basis, or `None`. The
            fast path then evaluates the splines in closed form.
        derivatives (`Callable`, *optional*): `derivatives(layer, x, highest)` returns a list: the basis functions of x
            (batch, in) and their derivatives up to the order `highest`, at most 5, each (batch, in, basis). It opens
            the closed form of `jet`; the derivatives are compared with those that autograd gives of the layer.
        normalization (`str`, *optional*): The module that normalizes the inputs of the basis functions, and not those
            of the residual branch, if `derivatives` is given. It may be absent or `None`.
        activation (`Callable`, *optional*): `activation(layer, x)` returns the factors (batch, in) of `residual`.
        bias (`str`, *optional*): The parameter that is added to the output. It may be absent or `None`.
        axes (`Callable` or `dict`, *optional*): `axes(layer)` returns the lengths of axes that no shape determines,
            e.g. `{"k": layer.num_grids}` for the layout `"o (i k)"`; a list has one for each member of a list by `*`.
        edge_scale (`tuple[str, str]`, *optional*): The parameter that scales the splines of each edge, and its layout.

    Raises:
        ValueError: A pattern is malformed, or has axes that it cannot have.
    """

    family: str
    matches: type[nn.Module] | Callable[[Any], bool]
    coefficients: Described | Sequence[Described]
    residual: Described | None = None
    grid: tuple[str, ...] = ()
    grid_methods: tuple[str, ...] = ()
    network_methods: Mapping[str, str | None] = field(default_factory=dict)
    checkpoint_methods: tuple[str, ...] = ()
    basis: Callable[[Any, torch.Tensor], torch.Tensor] | None = None
    splines: Callable[[Any], UniformGrid | None] | None = None
    derivatives: Callable[[Any, torch.Tensor, int], list[torch.Tensor]] | None = None
    normalization: str | None = None
    activation: Callable[[Any, torch.Tensor], torch.Tensor] | None = None
    bias: str | None = None
    axes: Callable[[Any], Mapping[str, Any]] | Mapping[str, Any] | None = None
    edge_scale: Described | None = None
    groups: str = ""

    def __post_init__(self) -> None:
        self._check()
        if isinstance(self.matches, type):  # a predicate in C: it is called for each module of a model
            object.__setattr__(self, "matches", self.matches.__instancecheck__)

    @property
    def parts(self) -> tuple[Described, ...]:
        """Name and pattern of each part of the coefficients."""
        given: Any = self.coefficients
        if not isinstance(given, (list, tuple)) or not all(isinstance(part, (str, list, tuple)) for part in given):
            return ()
        return (tuple(given),) if any(isinstance(part, str) for part in given) else tuple(map(tuple, given))

    def _check(self) -> None:
        kind, parts = f"of {self.family!r}", self.parts
        if not callable(self.matches):
            raise ValueError(f"`matches` {kind} is {self.matches!r:.100}. Give a class, or a predicate on a module.")
        pairs = [*parts, *(pair for pair in (self.residual, self.edge_scale) if pair is not None)]
        if not parts or any(len(pair) != 2 or not all(isinstance(text, str) for text in pair) for pair in pairs):
            raise ValueError(
                f"The coefficients {kind} are {self.coefficients!r}. Expected a parameter and its pattern, e.g. "
                '("weight", "o i k"), or a list of such pairs.'
            )
        names = [name for name, _ in pairs]
        if len(set(names)) < len(names):
            raise ValueError(f"The parameters {names} {kind} repeat one. Describe each of them once.")
        methods = (*self.grid_methods, *self.checkpoint_methods, *self.network_methods)
        for name in (*names, *self.grid, *methods, *filter(None, [self.bias])):
            if not isinstance(name, str) or not re.fullmatch(r"(?!__)\w+(\.(\*|(?!__)\w+))*|\*", name):
                raise ValueError(f"{name!r} {kind} is no name of an attribute, e.g. 'spline.weight'.")
        layouts = [parse_layout(pattern, self.groups, may_share=n > 0) for n, (_, pattern) in enumerate(parts)]
        for role, described in (("residual weights", self.residual), ("edge scales", self.edge_scale)):
            if described is not None and parse_layout(described[1], self.groups).basis:
                raise ValueError(
                    f"Pattern {described[1]!r} of the {role} {kind} has an axis besides `o`, `i`, `...` and `groups`. "
                    "Expected e.g. 'o i'."
                )
        packed = any(layout.packed_residual is not None for layout in layouts)
        if packed and (self.residual is not None or len(parts) > 1 or "*" in names[0]):
            raise ValueError(
                f"A pattern with `+` {kind} has the residual weights: it stands alone, without `residual` and `*`."
            )

    def __reduce_ex__(self, protocol):
        # Predicates may be lambdas, which do not pickle: a description is found again in the registry.
        if self.matches is matches_nothing:
            return super().__reduce_ex__(protocol)
        return get_registered, (self.family,)

    def axes_of(self, layer: nn.Module) -> dict[str, Any]:
        """The lengths of axes of a layer that no shape determines, as plain integers."""
        axes = self.axes(layer) if callable(self.axes) else self.axes or {}
        return {axis: list(map(int, v)) if hasattr(v, "__len__") else int(v) for axis, v in axes.items()}

    def locate(self, layer: nn.Module) -> CoefficientTensor:
        """Finds the coefficients of a layer; raises a `ValueError` if a pattern does not fit its parameter."""
        return locate_coefficients(layer, self)

    def is_of_this_package(self, layer: nn.Module) -> bool:
        """Whether the class of a layer comes with its description, which is then not compared with the layer."""
        cls = type(layer)
        is_described = getattr(self.matches, "__self__", None) is cls  # by `__instancecheck__` of the class
        return is_described and cls.__module__.partition(".")[0] == __name__.partition(".")[0]

    def read_grid(self, layer: nn.Module) -> Grid:
        """The state that gives the coefficients of a layer their meaning, by name, without missing entries."""
        names = [each for name in self.grid for each in (expand_name(layer, name) if "*" in name else (name,))]
        values: dict[str, Any] = {name: get_or_none(layer, name) for name in names}
        for name, value in values.items():
            if isinstance(value, Number) and (item := getattr(value, "item", None)):  # of numpy
                values[name] = item()
        return {name: value for name, value in values.items() if value is not None}

    def check_names(self, layer: nn.Module) -> None:
        """Raises a `ValueError` if a layer lacks an attribute that `grid` or `grid_methods` names."""
        absent = object()
        for name in (*self.grid, *self.grid_methods):
            if any(get_or_none(layer, member, absent) is absent for member in expand_name(layer, name) or [name]):
                raise ValueError(
                    f"`grid` or `grid_methods` of {self.family!r} names {name!r}, and {type(layer).__name__} has "
                    "no such attribute. Correct the name, or leave it out."
                )

    def find_edge_scale(self, layer: nn.Module) -> str | None:
        """The name of the parameter that scales the splines of each edge, or `None` if the layer has none."""
        name, _ = self.edge_scale or ("", "")
        return name if isinstance(get_or_none(layer, name), nn.Parameter) else None

    def scale(self, layer: nn.Module) -> torch.Tensor | None:
        """The scales of the edges (out, in) in the formula of the fast path, or `None` if the layer has none."""
        if self.edge_scale is None:
            return None
        value = get_or_none(layer, self.edge_scale[0])
        return value.t() if value is not None and self.edge_scale[1] == "i o" else value

    def read_edge_scale(self, layer: nn.Module, tensor: CoefficientTensor) -> torch.Tensor | None:
        """The scales of the edges, (out, in, 1) or (out, in, 1, kernel), or `None` if the layer has none."""
        name, pattern = self.edge_scale or ("", "")
        scale = get_or_none(layer, name)
        if scale is None:
            return None
        layout = parse_layout(pattern, self.groups, scale.dim())
        values = layout.to_canonical(scale, tensor.lengths)
        return values if values.dim() == len(tensor.shape) else values.unsqueeze(-1)

    def describe(self, layer: nn.Module) -> dict[str, Any]:
        """The entry of a file by which the coefficients are located without the registration: JSON, no functions."""
        values = {}
        for entry in fields(self):
            value = getattr(self, entry.name)
            default = entry.default_factory() if entry.default_factory is not MISSING else entry.default
            if entry.name in _IN_FILES and entry.name != "axes" and value != default:
                values[entry.name] = value
        if axes := self.axes_of(layer):
            values["axes"] = axes
        return json.loads(json.dumps(values))  # lists instead of tuples, as a file gives them back


def spec_from_file(family: str, description: Mapping[str, Any]) -> KANLayerSpec:
    """The kind of layer that `KANLayerSpec.describe` wrote into a file. Its `matches` is never true.

    Raises:
        ValueError: The description is damaged.
    """
    problem = f"The description of the kind of layer {family!r} in the file is broken: "
    if not isinstance(description, Mapping) or "coefficients" not in description:
        raise ValueError(f"{problem}it names no `coefficients`.")
    description = {name: value for name, value in description.items() if name != "linear"}  # of older versions
    for name, value in description.items():
        if name not in _IN_FILES or not isinstance(value, _IN_FILES[name]):
            raise ValueError(f"{problem}`{name}` is {value!r:.200}.")
    values: dict[str, Any] = {
        n: tuple(value) if isinstance(value, list) else value for n, value in description.items()
    }
    return KANLayerSpec(family, matches_nothing, **values)


def has(attributes: str, without: str = "") -> Callable[[Any], bool]:
    """The predicate of the modules that have these attributes, with so many axes where a number follows the name.

    Args:
        attributes: Dotted names, that of a parameter or module first, e.g. `"spline_weight:3 grid:2 b_splines"`.
        without: The name of an attribute that the module does not have.
    """
    words = [word.partition(":") for word in attributes.split()]
    wanted = [(attrgetter(name), int(axes or 0)) for name, _, axes in words]
    root = attributes.partition(" ")[0].partition(":")[0].partition(".")[0]

    def matches(module: Any) -> bool:  # or an AttributeError, which says no, and takes ten times as long
        found = root in module._parameters or root in module._modules or root in vars(module)
        if not found and not hasattr(type(module), root):
            return False
        values = [(get(module), axes) for get, axes in wanted]
        return all(not axes or value.ndim == axes for value, axes in values) and not (
            without and hasattr(module, without)
        )

    return matches


def matches_nothing(module: nn.Module) -> bool:
    """The predicate of a kind of layer that is known by a file: the file names its layers."""
    return False


# All kinds of layers, the last registered last.
REGISTERED: dict[str, KANLayerSpec] = {}


def registered_spec(module: nn.Module, among: Iterable[KANLayerSpec] | None = None) -> KANLayerSpec | None:
    """The last registered kind of layer that matches a module; or the first of `among`."""
    for spec in reversed(REGISTERED.values()) if among is None else among:
        try:
            if spec.matches(module):
                return spec
        except AttributeError:  # a predicate that reads what this module does not have says no
            continue
    return None


def get_registered(family: str) -> KANLayerSpec:
    """The registered kind of layer of a name; raises a `ValueError` if there is none."""
    if family not in REGISTERED:
        raise ValueError(
            f"The kind of KAN layer {family!r} is not registered. Call `register_kan_layer` for it first."
        )
    return REGISTERED[family]
