# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""The description of a KAN family, and the part of it that is written into the files of adapters."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from functools import cached_property, partial
from keyword import iskeyword
from numbers import Number
from operator import attrgetter
from typing import Any

import torch
from torch import nn

from ..kan.basis import UniformGrid
from .coefficients import CoefficientTensor, Described, expand_name, get_or_none, locate_coefficients
from .layout import Layout, axis_patterns, parse_layout
from .readings import check_description, choose_reading, exchange_axes, note_verified, pattern_variants


Grid = dict[str, "torch.Tensor | int | float"]

_MOST_VARIANTS = 24  # of a pattern that does not hold, which are tried to say what would
_MAX_CHARACTERS = 4000  # of a description in a file


@dataclass(frozen=True)
class KANLayerSpec:
    """The description of a KAN family, as [`register_kan_layer`] takes it.

    Args:
        family (`str`): The name under which the family is reported.
        matches (`type` or `Callable`): The class of the layers, or a predicate on a module. Prefer a predicate on the
            parameters' names where users copy the file and rename the class.
        coefficients (`tuple[str, str]` or a list of them): The parameter of the coefficients (dotted names reach into
            sub-modules, `*` stands for the members of a list: `"convs.*.weight"`) and its layout as an einops pattern:
            `o` and `i` are the output and input features, any other axes make up the basis mode in the order in which
            they appear. `"o i k"`, `"o (i k)"`, `"t o i g"`; `"o ((i k) + i)"` where the residual weights are packed
            behind the coefficients. Several parts are joined along the basis mode; one after the first may lack `o` or
            `i`, and is shared by them, and one of a number for each edge is shared along a kernel. See layout.py.
        residual (`tuple[str, str]`, *optional*): The parameter of the residual branch and its layout, of `o` and `i`
            and the axes of `kernel` and `groups`. A layer on which it is absent or `None` has no residual branch.
        kernel (`str`): The axes of the kernel of a convolution, e.g. `"h w"`. A `...` in a pattern is such an axis, or
            several.
        groups (`str`): The axis of blocks that have inputs of their own, e.g. `"g"`. They are a part of the output
            mode, and `i` counts the inputs of one block. The members of a list by `*` are such blocks too.
        linear (`bool`): Whether the output is linear in the coefficients. If not, there is no fast path, and the
            layers are not weighted by features (`inputs` of `extract_lotra` and `slim`).
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
        derivatives (`Callable`, *optional*): `derivatives(layer, x, highest)` returns a list: the basis functions of x
            (batch, in) and their derivatives up to the order `highest`, at most 3, each (batch, in, basis). It opens
            the closed form of `jet`; the derivatives are compared with those that autograd gives of the layer.
        normalization (`str`, *optional*): The module that normalizes the inputs of the basis functions, and not those
            of the residual branch, if `derivatives` is given. It may be absent or `None`.
        edge_mask (`Callable`, *optional*): `edge_mask(layer)` returns factors (out, in) of the whole edges.
        activation (`Callable`, *optional*): `activation(layer, x)` returns the factors (batch, in) of `residual`.
        scale (`Callable`, *optional*): `scale(layer)` returns factors (out, in) of the coefficients, or `None`.
        bias (`str`, *optional*): The parameter that is added to the output. It may be absent or `None`.
        axes (`Callable` or `dict`, *optional*): `axes(layer)` returns the lengths of axes that no shape determines,
            e.g. `{"k": layer.num_grids}` for the layout `"o (i k)"`; a list has one for each member of a list by `*`.
        edge_scale (`tuple[str, str]`, *optional*): The parameter that scales the splines of each edge, and its layout.
        refit_basis (`Callable`, *optional*): The basis that `refit_adapters` uses, in families without `basis`.

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
    edge_mask: Callable[[Any], torch.Tensor] | None = None
    activation: Callable[[Any, torch.Tensor], torch.Tensor] | None = None
    scale: Callable[[Any], torch.Tensor | None] | None = None
    bias: str | None = None
    axes: Callable[[Any], Mapping[str, Any]] | Mapping[str, Any] | None = None
    edge_scale: Described | None = None
    refit_basis: Callable[[Any, torch.Tensor], torch.Tensor] | None = None
    kernel: str = ""
    groups: str = ""
    linear: bool = True

    def __post_init__(self) -> None:
        self._check()
        if isinstance(self.matches, type):  # a predicate in C: each module of a model is asked
            object.__setattr__(self, "matches", self.matches.__instancecheck__)

    @property
    def parts(self) -> tuple[Described, ...]:
        """Name and pattern of each part of the coefficients."""
        given: Any = self.coefficients
        if not isinstance(given, (list, tuple)) or not all(isinstance(part, (str, list, tuple)) for part in given):
            return ()
        return (tuple(given),) if any(isinstance(part, str) for part in given) else tuple(map(tuple, given))

    def parse(self, pattern: str, whole: bool = True) -> Layout:
        """The layout of a pattern of this family; one that is not `whole` may lack `o` or `i`."""
        return parse_layout(pattern, self.kernel, self.groups, whole=whole)

    def _check(self) -> None:
        of_family = f"of {self.family!r}"
        if not callable(self.matches):
            raise ValueError(f"`matches` {of_family} is {self.matches!r:.100}, but must be a class or a predicate.")
        parts = self.parts
        pairs = [*parts, *(pair for pair in (self.residual, self.edge_scale) if pair is not None)]
        if not parts or any(len(pair) != 2 or not all(isinstance(text, str) for text in pair) for pair in pairs):
            raise ValueError(
                f"The coefficients {of_family} are {self.coefficients!r}. Expected a parameter and its pattern, e.g. "
                '("weight", "o i k"), or a list of such pairs.'
            )
        names = [name for name, _ in pairs]
        if len(set(names)) < len(names):
            raise ValueError(f"The parameters {names} {of_family} repeat one: describe each of them once.")
        for name in (*names, *self.grid, *filter(None, [self.bias])):
            if not _is_name(name):
                raise ValueError(f"{name!r} {of_family} is no name of a parameter, e.g. 'spline.weight'.")
        layouts = [self.parse(pattern, whole=not place) for place, (_, pattern) in enumerate(parts)]
        for what, described in (("residual weights", self.residual), ("edge scales", self.edge_scale)):
            if described is not None and self.parse(described[1]).basis:
                raise ValueError(
                    f"Pattern {described[1]!r} of the {what} {of_family} has an axis besides `o` and `i`, and those "
                    "of `kernel` and `groups`: expected 'o i' or 'i o'."
                )
        packed = any(layout.packed_residual is not None for layout in layouts)
        if packed and self.residual is not None:
            raise ValueError(f"The coefficients {of_family} already contain the residual weights: drop `residual`.")
        if packed and (len(parts) > 1 or "*" in names[0]):
            raise ValueError(f"A pattern with `+` {of_family} must be that of the only parameter, without `*`.")
        layouts += [self.parse(self.residual[1])] if self.residual is not None else []
        # a part with one number for each edge is shared along the kernel; anything else is rather an error
        kernels = {
            frozenset(layout.kernel)
            for place, layout in enumerate(layouts)
            if layout.kernel or layout.basis or place in (0, len(parts))
        }
        if len(kernels) > 1 or set(self.kernel.split()) - set(layouts[0].kernel):
            patterns = ", ".join(repr(layout.pattern) for layout in layouts)
            raise ValueError(
                f"The patterns {patterns} {of_family} do not all have the axes of the kernel, "
                f"`{self.kernel or '...'}`. Weights without a kernel cannot be joined with those that have one, but "
                "for one number of each edge ('o i'): leave them out."
            )
        listed = {"*" in name for name, _ in parts} == {True}
        unnamed = set(self.groups.split()) - {axis for layout in layouts for axis in layout.groups}
        if {"o", "i"} & {*self.groups.split(), *self.kernel.split()} or (unnamed and not listed):
            raise ValueError(
                f"`groups` {of_family} is {self.groups!r} and `kernel` is {self.kernel!r}: they must be axes of the "
                "patterns besides `o` and `i`."
            )

    def __reduce__(self):
        if self.matches is _matches_nothing:
            return _from_fields, ({entry.name: getattr(self, entry.name) for entry in fields(self)},)
        # Predicates may be lambdas, which do not pickle: an unpickled model finds its family in the registry.
        return get_registered, (self.family,)

    def axes_of(self, layer: nn.Module) -> dict[str, Any]:
        """The lengths of axes of a layer that no shape determines, as plain integers."""
        axes = self.axes(layer) if callable(self.axes) else self.axes or {}
        return {axis: list(map(int, v)) if hasattr(v, "__len__") else int(v) for axis, v in axes.items()}

    def locate(self, layer: nn.Module) -> CoefficientTensor:
        """Finds the coefficients of a layer; raises a `ValueError` if a pattern does not fit its parameter.

        If the gradients of the layer say that outputs and inputs are stored in the other order, they are read so.
        """
        if self.is_of_this_package(layer):
            return self.locate_as_described(layer)
        return choose_reading(layer, self.read_grid(layer), self._readings, self._locator(layer))

    def locate_as_described(self, layer: nn.Module) -> CoefficientTensor:
        """Finds the coefficients of a layer by the patterns alone; a `ValueError` if one does not fit."""
        return self._locator(layer)(self.parts, self.residual)

    def check(self, name: str, layer: nn.Module, tensor: CoefficientTensor) -> None:
        """Raises a `ValueError` if what a layer, of this name in its model, computes contradicts the description."""
        if self.is_of_this_package(layer):
            return

        def variants() -> dict[str, Callable[[], CoefficientTensor]]:
            (parameter, pattern), *others = self.parts
            residual = self.residual if tensor.separate_residual else None
            patterns = [*pattern_variants(pattern), *axis_patterns(tensor.get_parameter(layer).shape)]
            return {
                other: partial(self._locator(layer), ((parameter, other), *others), residual)
                for other in dict.fromkeys(patterns[:_MOST_VARIANTS])
            }

        check_description(name, layer, self.read_grid(layer), self._readings, tensor, variants, self.linear)

    def note_verified(self, layer: nn.Module) -> None:
        """Spares `locate` and `check` what was found out about a layer otherwise: it computes what is described."""
        note_verified(layer, self._readings, self.locate_as_described(layer), self.linear)

    def is_of_this_package(self, layer: nn.Module) -> bool:
        """Whether the class of a layer comes with its description, which is then not compared with the layer."""
        cls = type(layer)
        is_described = getattr(self.matches, "__self__", None) is cls  # by `__instancecheck__` of the class
        return is_described and cls.__module__.partition(".")[0] == __name__.partition(".")[0]

    def _locator(self, layer: nn.Module) -> Callable[..., CoefficientTensor]:
        axes, roles = self.axes_of(layer), (self.kernel, self.groups)
        return lambda parts, residual: locate_coefficients(layer, self.family, parts, residual, axes, roles)

    @cached_property
    def _readings(self) -> list[tuple[tuple[Described, ...], Described | None]]:
        """Parts and residual branch as described, and with outputs and inputs exchanged in both, or in one of them."""
        parts, residual = self.parts, self.residual
        other = tuple((name, exchange_axes(pattern)) for name, pattern in parts)
        other_residual = residual and (residual[0], exchange_axes(residual[1]))
        return list(
            dict.fromkeys([(parts, residual), (other, residual), (other, other_residual), (parts, other_residual)])
        )

    def read_grid(self, layer: nn.Module) -> Grid:
        """The state that gives the coefficients of a layer their meaning, by name, without what the layer lacks."""
        values: Grid = {}
        for name in self.grid:
            try:
                value = attrgetter(name)(layer)
            except AttributeError:
                members = expand_name(layer, name) if "*" in name else ()
                values.update(
                    (member, found) for member in members if (found := get_or_none(layer, member)) is not None
                )
                continue
            if value is not None:
                is_numpy = isinstance(value, Number) and hasattr(value, "item")
                values[name] = value.item() if is_numpy else value  # pyright: ignore  (narrowed to Number)
        return values

    def basis_or_none(self, layer: nn.Module, x: torch.Tensor) -> torch.Tensor | None:
        """The basis functions (batch, in, basis) at x (batch, in), or `None` if the family has none for this layer.

        A `basis` that raises, or returns no tensor, counts as none: the layer may be another version of its library's.
        """
        try:
            value = None if self.basis is None else self.basis(layer, x)
        except Exception:  # a user's function
            return None
        return value if isinstance(value, torch.Tensor) else None

    def find_edge_scale(self, layer: nn.Module) -> str | None:
        """The name of the parameter that scales the splines of each edge, or `None` if the layer has none."""
        name, _ = self.edge_scale or ("", "")
        return name if isinstance(get_or_none(layer, name), nn.Parameter) else None

    def read_edge_scale(self, layer: nn.Module, tensor: CoefficientTensor) -> torch.Tensor | None:
        """The scales of the edges, (out, in, 1) or (out, in, 1, kernel), or `None` if the layer has none."""
        name, pattern = self.edge_scale or ("", "")
        scale = get_or_none(layer, name)
        if scale is None:
            return None
        layout = parse_layout(pattern, self.kernel, self.groups, scale.dim())
        values = layout.to_canonical(scale, tensor.lengths)
        return values if values.dim() == len(tensor.shape) else values.unsqueeze(-1)

    def describe(self, layer: nn.Module) -> dict[str, Any]:
        """What a file needs to locate the coefficients without the registration: no functions, only JSON."""
        values = {}
        for entry in fields(self):
            value = getattr(self, entry.name)
            default = entry.default_factory() if entry.default_factory is not MISSING else entry.default
            if entry.name in _CHECKS and entry.name != "axes" and value != default:
                values[entry.name] = value
        if axes := self.axes_of(layer):
            values["axes"] = axes
        return json.loads(json.dumps(values))  # lists instead of tuples, as a file gives them back


def spec_from_file(family: str, description: Mapping[str, Any]) -> KANLayerSpec:
    """The family that `KANLayerSpec.describe` wrote into a file. It matches no layer of itself.

    Raises:
        ValueError: The description is damaged.
    """
    problem = f"The description of the family {family!r} is broken: "
    if not isinstance(description, Mapping) or len(json.dumps(description)) > _MAX_CHARACTERS:
        raise ValueError(f"{problem}expected an object of at most {_MAX_CHARACTERS} characters.")
    for name, value in description.items():
        if name not in _CHECKS or not _CHECKS[name](value):
            raise ValueError(f"{problem}`{name}` is {value!r:.200}.")
    values: dict[str, Any] = {
        n: tuple(value) if isinstance(value, list) else value for n, value in description.items()
    }
    try:
        return KANLayerSpec(family, _matches_nothing, **values)
    except (TypeError, IndexError) as error:
        raise ValueError(f"{problem}{error}.") from error


def is_description(value: Any) -> bool:
    """Whether a value that was read describes a family."""
    try:
        return bool(spec_from_file("", value))
    except (ValueError, TypeError, RecursionError):
        return False


def _is_name(value: Any, dotted: bool = True) -> bool:
    """Whether a value is an attribute, or a path of them, with `*` for members; none that Python itself uses."""
    if not isinstance(value, str) or not value:
        return False
    words = value.split(".") if dotted else [value]
    return all(
        word == "*" or word.isdecimal() or (word.isidentifier() and not iskeyword(word) and not word.startswith("__"))
        for word in words
    )


def _is_pair(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(isinstance(text, str) for text in value)


def _are_names(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_name, value))


def _are_lengths(value: Any) -> bool:
    return isinstance(value, dict) and all(
        type(length) is int and length > 0
        for lengths in value.values()
        for length in (lengths if isinstance(lengths, list) else [lengths])
    )


# The fields that a file holds, those that are no functions, with what it may hold; of `axes` it holds the lengths.
_CHECKS: dict[str, Callable[[Any], bool]] = {
    "coefficients": lambda value: isinstance(value, list) and (_is_pair(value) or all(map(_is_pair, value))),
    "residual": _is_pair,
    "edge_scale": _is_pair,
    "kernel": lambda value: isinstance(value, str),
    "groups": lambda value: isinstance(value, str),
    "linear": lambda value: isinstance(value, bool),
    "grid": _are_names,
    "grid_methods": _are_names,
    "checkpoint_methods": _are_names,
    "network_methods": lambda value: (
        isinstance(value, dict)
        and _are_names(list(value))
        and all(argument is None or isinstance(argument, str) for argument in value.values())
    ),
    "bias": _is_name,
    "axes": _are_lengths,
}


def _matches_nothing(module: nn.Module) -> bool:
    """The predicate of a family that is known by a file: the file names its layers."""
    return False


def _from_fields(values: dict[str, Any]) -> KANLayerSpec:
    return KANLayerSpec(**values)


# All families, the last registered last.
REGISTERED: dict[str, KANLayerSpec] = {}


def registered_spec(module: nn.Module, among: Iterable[KANLayerSpec] | None = None) -> KANLayerSpec | None:
    """The last registered family that matches a module; or the first one of some families."""
    for spec in reversed(REGISTERED.values()) if among is None else among:
        try:
            if spec.matches(module):
                return spec
        except AttributeError:  # a predicate that reads what this module does not have says no
            continue
    return None


def get_registered(family: str) -> KANLayerSpec:
    """The registered family of a name; raises a `ValueError` if there is none."""
    if family not in REGISTERED:
        raise ValueError(f"The KAN family {family!r} is not registered: call `register_kan_layer` for it first.")
    return REGISTERED[family]
