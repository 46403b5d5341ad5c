# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""The KAN families: where each library keeps its coefficients, and how a new one is described.

KAN libraries differ in the name and the axis order of a parameter, not in kind: every layer maps x (..., in) to
y[o] = sum_{i,k} A[o,i,k] basis_k(x[i]), plus a residual branch sum_i W[o,i] silu(x[i]) in most of them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from ..functional import unwrap
from ..kan.basis import UniformGrid
from .coefficients import CoefficientTensor, get_or_none
from .layout import parse_layout


Grid = dict[str, "torch.Tensor | int | float"]


@dataclass(frozen=True)
class KANLayerSpec:
    """The description of a KAN family, as [`register_kan_layer`] takes it.

    Args:
        family (`str`): The name under which the family is reported.
        matches (`type` or `Callable`): The class of the layers, or a predicate on a module. Prefer a predicate on the
            parameters' names where users copy the file and rename the class.
        coefficients (`tuple[str, str]`): The parameter of the coefficients (dotted names reach into sub-modules) and
            its layout as an einops pattern: `o` and `i` are the output and input features, any other axes make up the
            basis mode in the order in which they appear. `"o i k"`, `"o (i k)"`, `"t o i g"`; `"o ((i k) + i)"` where
            the residual weights are packed behind the coefficients.
        residual (`tuple[str, str]`, *optional*): The parameter of the residual branch and its layout, of `o` and `i`.
            A layer on which it is absent or `None` has no residual branch.
        grid (`tuple[str, ...]`): The state, tensors and numbers, that gives the coefficients their meaning. A layer
            may lack some of it.
        grid_methods (`tuple[str, ...]`): The layer's methods that change that state, or cut or permute the
            coefficients. They raise while an adapter is attached and not merged.
        network_methods (`dict[str, str | None]`): Methods of the network around the layer that rebuild it, replace
            its layers or move their grids. They raise until the adapters are unloaded; where the value is the name of
            an argument, only if that argument is true.
        checkpoint_methods (`tuple[str, ...]`): Methods of the network around the layer that save it, with its adapters
            merged and under its original names.
        basis (`Callable`, *optional*): `basis(layer, x)` with x (batch, in) returns the basis functions
            (batch, in, basis). It opens the fast path, basis(x) . (scale * coefficients) + activation(x) . residual +
            bias, if that is what the layer computes: the two are compared on a few points.
        splines (`Callable`, *optional*): `splines(layer)` returns the [`UniformGrid`] of the basis, or `None`. The
            fast path then evaluates the splines in closed form.
        activation (`Callable`, *optional*): `activation(layer, x)` returns the factors (batch, in) of `residual`.
        scale (`Callable`, *optional*): `scale(layer)` returns factors (out, in) of the coefficients, or `None`.
        bias (`str`, *optional*): The parameter that is added to the output. It may be absent or `None`.
        axes (`Callable`, *optional*): `axes(layer)` returns the lengths of axes that no shape determines, e.g.
            `{"k": layer.num_grids}` for the layout `"o (i k)"`.
        edge_scale (`tuple[str, str]`, *optional*): The parameter that scales the splines of each edge, and its layout.
        refit_basis (`Callable`, *optional*): The basis that `refit_adapters` uses, in families without `basis`.

    Raises:
        ValueError: A pattern is malformed, or has no basis axis.
    """

    family: str
    matches: type[nn.Module] | Callable[[Any], bool]
    coefficients: tuple[str, str]
    residual: tuple[str, str] | None = None
    grid: tuple[str, ...] = ()
    grid_methods: tuple[str, ...] = ()
    network_methods: Mapping[str, str | None] = field(default_factory=dict)
    checkpoint_methods: tuple[str, ...] = ()
    basis: Callable[[Any, torch.Tensor], torch.Tensor] | None = None
    splines: Callable[[Any], UniformGrid | None] | None = None
    activation: Callable[[Any, torch.Tensor], torch.Tensor] | None = None
    scale: Callable[[Any], torch.Tensor | None] | None = None
    bias: str | None = None
    axes: Callable[[Any], Mapping[str, int]] | None = None
    edge_scale: tuple[str, str] | None = None
    refit_basis: Callable[[Any, torch.Tensor], torch.Tensor] | None = None

    def __post_init__(self) -> None:
        coefficients = parse_layout(self.coefficients[1])
        if not coefficients.basis:
            raise ValueError(
                f"Pattern {self.coefficients[1]!r} of the coefficients of {self.family!r} has no basis axis: name at "
                "least one axis besides `o` and `i`, e.g. 'o i k'."
            )
        for what, described in (("residual weights", self.residual), ("edge scales", self.edge_scale)):
            if described is not None and parse_layout(described[1]).basis:
                raise ValueError(
                    f"Pattern {described[1]!r} of the {what} of {self.family!r} has an axis besides `o` and `i`: "
                    "expected 'o i' or 'i o'."
                )
        if self.residual is not None and coefficients.packed_residual is not None:
            raise ValueError(
                f"The coefficients of {self.family!r} already contain the residual weights: drop `residual`."
            )
        if isinstance(self.matches, type):  # a predicate in C: each module of a model is asked
            object.__setattr__(self, "matches", self.matches.__instancecheck__)

    def __reduce__(self):
        # Predicates may be lambdas, which do not pickle: an unpickled model finds its family in the registry.
        return _get_registered, (self.family,)

    def locate(self, layer: nn.Module) -> CoefficientTensor:
        """Finds the coefficients of a layer; raises a `ValueError` if a pattern does not fit its parameter."""
        described = [(*self.coefficients, get_or_none(layer, self.coefficients[0]))]
        if self.residual is not None and (residual := get_or_none(layer, self.residual[0])) is not None:
            described.append((*self.residual, residual))
        lengths = dict(self.axes(layer)) if self.axes is not None else {}
        # The residual weights (out, in) settle what a flattened coefficient pattern leaves open, so they come first.
        for name, pattern, parameter in reversed(described):
            try:
                if parameter is None:
                    raise ValueError("There is no such parameter.")
                lengths = parse_layout(pattern).axis_lengths(parameter.shape, lengths)
            except ValueError as error:
                raise ValueError(
                    f"{type(layer).__name__} was recognized as a KAN layer of the family {self.family!r}, but its "
                    f"parameter `{name}` is not as described. {error}"
                ) from error
        layouts = {name: parse_layout(pattern) for name, pattern, _ in described}
        return CoefficientTensor(self.family, layouts, lengths)

    def read_grid(self, layer: nn.Module) -> Grid:
        """The state that gives the coefficients of a layer their meaning, by name, without what the layer lacks."""
        values: Grid = {}
        for name in self.grid:
            try:
                value = attrgetter(name)(layer)
            except AttributeError:
                continue
            if value is not None:
                values[name] = value
        return values

    def find_edge_scale(self, layer: nn.Module) -> str | None:
        """The name of the parameter that scales the splines of each edge, or `None` if the layer has none."""
        name, _ = self.edge_scale or ("", "")
        return name if isinstance(getattr(layer, name, None), nn.Parameter) else None


_SPECS: dict[str, KANLayerSpec] = {}


def register_kan_layer(family: str, **description: Any) -> KANLayerSpec:
    """Teaches LoTRA a family of KAN layers, which is asked first. A known name is replaced.

    Args:
        family (`str`): The name under which the family is reported.
        **description: The other fields of [`KANLayerSpec`]; `matches` and `coefficients` are required.

    Returns:
        `KANLayerSpec`: The description.

    Raises:
        TypeError: There is no such field; the message lists the fields.
        ValueError: A pattern is malformed, or has no basis axis.

    Example:
        >>> import torch
        >>> from peft_lotra import register_kan_layer
        >>> class MyKANLayer(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.spline_coeffs = torch.nn.Parameter(torch.randn(3, 5, 4))
        ...         self.base_coeffs = torch.nn.Parameter(torch.randn(5, 3))
        >>> spec = register_kan_layer(
        ...     "my-kan",
        ...     matches=MyKANLayer,  # or a predicate: lambda m: hasattr(m, "spline_coeffs")
        ...     coefficients=("spline_coeffs", "i o k"),  # the parameter, and its layout
        ...     residual=("base_coeffs", "o i"),
        ... )
        >>> spec.locate(MyKANLayer()).shape
        (5, 3, 4)
    """
    known = [entry.name for entry in fields(KANLayerSpec)]
    for name in description.keys() - set(known):
        raise TypeError(f"register_kan_layer has no field `{name}`. A family is described by {', '.join(known)}.")
    return register(KANLayerSpec(family, **description))


# what help() and an editor show
register_kan_layer.__signature__ = inspect.signature(KANLayerSpec)  # pyright: ignore[reportFunctionMemberAccess]


def register(spec: KANLayerSpec) -> KANLayerSpec:
    """Registers a description, as the one that is asked first."""
    _SPECS.pop(spec.family, None)
    _SPECS[spec.family] = spec
    return spec


def _get_registered(family: str) -> KANLayerSpec:
    if family not in _SPECS:
        raise ValueError(f"The KAN family {family!r} is not registered: call `register_kan_layer` for it first.")
    return _SPECS[family]


def known_families() -> list[str]:
    """The names of all registered families, in the order of registration."""
    return list(_SPECS)


def get_kan_spec(module: nn.Module) -> KANLayerSpec | None:
    """The family of a module: the `kan_spec` of its class, or the last registered that matches, or `None`."""
    own = getattr(type(module), "kan_spec", None)
    if isinstance(own, KANLayerSpec):
        return own
    for spec in reversed(_SPECS.values()):
        try:
            if spec.matches(module):
                return spec
        except AttributeError:  # a predicate that reads what this module does not have says no
            continue
    return None


class FoundKANLayer(NamedTuple):
    """A KAN layer that was recognized in a model.

    Attributes:
        name (`str`): The layer's name in the model, as `target_modules` takes it; `""` if it is the model itself.
        family (`str`): The family it was recognized as.
        shape (`tuple[int, int, int]`): (out, in, basis) of the coefficient tensor.
        has_residual (`bool`): Whether the layer has a residual branch, i.e. one more slice of the basis mode.
    """

    name: str
    family: str
    shape: tuple[int, int, int]
    has_residual: bool


def find_kan_layers(model: nn.Module) -> list[FoundKANLayer]:
    """Lists the KAN layers of a model, adapted or not, in the order of `model.named_modules()`.

    Args:
        model (`nn.Module`): Any model.

    Raises:
        ValueError: A layer was recognized but a pattern of its family does not fit its parameters.

    Example:
        >>> from peft_lotra import find_kan_layers
        >>> from peft_lotra.kan import KAN
        >>> [(layer.name, layer.family, layer.shape) for layer in find_kan_layers(KAN([2, 4, 1]))]
        [('layers.0', 'peft-lotra', (4, 2, 8)), ('layers.1', 'peft-lotra', (1, 4, 8))]
    """
    found = []
    for name, layer, spec in walk_kan_layers(unwrap(model)):
        tensor = spec.locate(layer)
        found.append(FoundKANLayer(name, spec.family, tensor.shape, tensor.has_residual))
    return found


def find_layer(model: nn.Module, name: str) -> nn.Module:
    """The module of a name as `find_kan_layers` gives it, or as PEFT writes it ("base_model.model.layers.0")."""
    network = unwrap(model)
    try:
        return network.get_submodule(short_name(name))
    except AttributeError:
        known = ", ".join(repr(layer.name) for layer in find_kan_layers(network)) or "none"
        raise ValueError(f"The model has no module {name!r}. Its KAN layers: {known}.") from None


def short_name(name: str) -> str:
    """The name that a module has in the base model, without what PEFT puts in front of it."""
    return name.removeprefix("base_model.model.")


def walk_kan_layers(
    module: nn.Module, name: str = "", seen: set[int] | None = None
) -> Iterator[tuple[str, nn.Module, KANLayerSpec]]:
    """The KAN layers of a model (of adapted layers the base layers) with their names and families.

    KAN layers inside of KAN layers, and those in the copies that PEFT's `modules_to_save` makes, are left out.
    """
    seen = set() if seen is None else seen
    if id(module) in seen or isinstance(module, AuxiliaryTrainingWrapper):
        return
    seen.add(id(module))
    while isinstance(base_layer := module._modules.get("base_layer"), nn.Module):
        module = base_layer
    spec = get_kan_spec(module)
    if spec is not None:
        yield name, module, spec
        return
    for child_name, child in module.named_children():
        yield from walk_kan_layers(child, f"{name}.{child_name}" if name else child_name, seen)


def same_grid(first: Mapping[str, object], second: Mapping[str, object]) -> bool:
    """Whether two grids, as `KANLayerSpec.read_grid` gives them, are equal up to casts and devices.

    A tensor on the meta device, which has no content, equals any other of its shape.
    """
    if first.keys() != second.keys():
        return False
    for name, value in first.items():
        other = second[name]
        if isinstance(value, torch.Tensor) and isinstance(other, torch.Tensor):
            narrow, wide = sorted((value, other), key=torch.Tensor.element_size)  # compared in the fewer digits
            if narrow.shape != wide.shape:
                return False
            if not (narrow.is_meta or wide.is_meta or torch.equal(narrow, wide.to(narrow))):
                return False
        elif type(value) is not type(other) or value != other:
            return False
    return True
