# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""The kinds of KAN layers: their descriptions, registration, and entries in the files of adapters.

Libraries differ in the name and the axis order of a parameter: every layer maps x (..., in) to
y[o] = sum_{i,k} A[o,i,k] basis_k(x[i]), plus a base branch sum_i W[o,i] silu(x[i]) in most of them.
"""

from __future__ import annotations

import inspect
import json
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from itertools import chain
from numbers import Number
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from ..kan.basis import UniformGrid
from .coefficients import CoefficientTensor, Described, Member, expand_name, get_or_none
from .layout import parse_layout


Grid = dict[str, "Tensor | int | float"]

# The fields in a file, which are no functions; of `axes` it has the lengths.
_IN_FILES = (
    "coefficients",
    "residual",
    "edge_scale",
    "groups",
    "axes",
    "bias",
    "grid",
    "grid_methods",
    "network_methods",
    "checkpoint_methods",
)


@dataclass(frozen=True)
class KANLayerSpec:
    """The description of a kind of KAN layer, as [`register_kan_layer`] takes it.

    Args:
        kind (`str`): The name of the kind of layer, e.g. the name of its library.
        matches (`type` or `Callable`): The class of the layers, or a predicate on a module. Prefer a predicate on the
            parameters' names where users copy the file and rename the class.
        coefficients (`tuple[str, str]` or a list of them): The parameter of the coefficients (dotted names reach into
            sub-modules, `*` stands for the members of a list: `"convs.*.weight"`) and its layout as an einops pattern:
            `o` and `i` are the output and input features, `...` the axes of the kernel of a convolution, and any other
            axes make up the basis mode in the order in which they appear. `"o i k"`, `"o (i k)"`, `"t o i g"`,
            `"o (i k) ..."`; `"o ((i k) + i)"` where the residual weights are packed behind the coefficients. Several
            parts are joined along the basis mode; one after the first may lack `o` or `i`, and is shared by them, and
            one of a number for each edge is shared along a kernel. See layout.py.
        residual (`tuple[str, str]`, *optional*): The parameter of the base branch and its layout, of `o` and `i`
            `...` and the axis of `groups`. A layer on which it is absent or `None` has no base branch.
        groups (`str`): The axis that counts groups with inputs of their own, e.g. `"g"`. They are a part of the output
            mode, and `i` counts the inputs of one group. The members of a list by `*` are such groups too.
        grid (`tuple[str, ...]`): The attributes, tensors and numbers, that give the coefficients their meaning.
        grid_methods (`tuple[str, ...]`): The layer's methods that change that state, or cut or permute the
            coefficients. They raise while an adapter is attached and not merged.
        network_methods (`dict[str, str | None]`): Methods of the network around the layer that rebuild it, replace
            its layers or move their grids. They raise until the adapters are unloaded; where the value is the name of
            an argument, only if that argument is true.
        checkpoint_methods (`tuple[str, ...]`): Methods of the network around the layer that save it, with its adapters
            merged and under its original names.
        basis (`Callable`, *optional*): `basis(layer, z)` returns the basis functions (batch, in, basis) of z
            (batch, in). It opens the fast path and `jet` if the layer computes
            basis(norm(x)) . (edge_scale * coefficients) + activation(x) . residual + bias. Values and derivatives of
            the two are compared on a few points.
        splines (`Callable`, *optional*): `splines(layer)` returns the [`UniformGrid`] of the basis, or `None`. The
            splines are then evaluated in closed form.
        derivatives (`Callable`, *optional*): `derivatives(layer, z, highest)` returns a list: the basis functions of z
            and their derivatives up to the order `highest`, at most 5, each (batch, in, basis). `jet` takes less time
            with it. The list may end earlier: transforms of `torch.func` compute the rest.
        normalization (`str`, *optional*): The module norm, which normalizes the inputs of the basis functions only.
            It may be absent or `None`.
        activation (`Callable`, *optional*): `activation(layer, x)` returns the factors (batch, in) of `residual`.
        bias (`str`, *optional*): The parameter that is added to the output. It may be absent or `None`.
        axes (`Callable` or `dict`, *optional*): `axes(layer)` returns the lengths of axes that no shape determines,
            e.g. `{"k": layer.num_grids}` for the layout `"o (i k)"`.
        edge_scale (`tuple[str, str]`, *optional*): The parameter that scales the splines of each edge, and its layout.

    Raises:
        ValueError: A pattern is malformed, or a name stands twice.

    Example:
        >>> import torch
        >>> from peft_lotra import KANLayerSpec
        >>> class Polynomials(torch.nn.Module):  # y[o] = sum_{i,k} weight[o,i,k] x[i]^k
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.weight = torch.nn.Parameter(torch.randn(3, 2, 4))
        >>> spec = KANLayerSpec("polynomials", Polynomials, ("weight", "o i k"))
        >>> spec.locate(Polynomials()).shape
        (3, 2, 4)
    """

    kind: str
    matches: type[nn.Module] | Callable[[Any], bool]
    coefficients: Described | Sequence[Described]
    residual: Described | None = None
    grid: tuple[str, ...] = ()
    grid_methods: tuple[str, ...] = ()
    network_methods: Mapping[str, str | None] = field(default_factory=dict)
    checkpoint_methods: tuple[str, ...] = ()
    basis: Callable[[Any, Tensor], Tensor] | None = None
    splines: Callable[[Any], UniformGrid | None] | None = None
    derivatives: Callable[[Any, Tensor, int], list[Tensor]] | None = None
    normalization: str | None = None
    activation: Callable[[Any, Tensor], Tensor] | None = None
    bias: str | None = None
    axes: Callable[[Any], Mapping[str, Any]] | Mapping[str, Any] | None = None
    edge_scale: Described | None = None
    groups: str = ""

    def __post_init__(self) -> None:
        if not callable(self.matches):
            raise ValueError(f"`matches` of {self.kind!r} is {self.matches!r:.80}. Give a class, or a predicate.")
        try:
            pairs = [*self.parts, *filter(None, [self.residual, self.edge_scale])]
            patterns = dict(pairs)
        except (TypeError, ValueError):
            pairs, patterns = [self.coefficients], {}
        if not self.coefficients or len(patterns) < len(pairs):
            raise ValueError(
                f"The coefficients and other parameters of {self.kind!r} are {pairs}. Expected a name and its "
                'pattern, e.g. ("weight", "o i k"), or a list of such pairs, with each name once.'
            )
        for position, pattern in enumerate(patterns.values()):
            parse_layout(pattern, self.groups, may_share=0 < position < len(self.parts))
        for name in ("grid", "grid_methods", "checkpoint_methods"):
            value = getattr(self, name)
            if isinstance(value, str):  # a single name
                object.__setattr__(self, name, (value,))
        if isinstance(self.matches, type):  # a predicate in C: it is called for each module of a model
            object.__setattr__(self, "matches", self.matches.__instancecheck__)

    @cached_property
    def parts(self) -> tuple[Described, ...]:
        """Name and pattern of each part of the coefficients."""
        coefficients: Any = self.coefficients
        if coefficients and isinstance(coefficients[0], str):
            coefficients = [coefficients]
        return tuple(map(tuple, coefficients))

    def __reduce_ex__(self, protocol):
        # Predicates may be lambdas, which do not pickle: a description is found again in the registry.
        if self.matches is matches_nothing:
            return super().__reduce_ex__(protocol)
        return get_registered, (self.kind,)

    def axes_of(self, layer: nn.Module) -> dict[str, int]:
        """Return the lengths of axes of a layer that no shape determines."""
        axes = self.axes(layer) if callable(self.axes) else self.axes or {}
        return {axis: int(length) for axis, length in axes.items()}

    def locate(self, layer: nn.Module) -> CoefficientTensor:
        """Find the coefficients of a layer.

        Raises:
            ValueError: A parameter is missing, or a pattern does not fit it.
        """
        try:
            parts = []
            for name, pattern in filter(None, (*self.parts, self.residual)):
                members = {member: get_or_none(layer, member) for member in expand_name(layer, name)}
                if len(parts) == len(self.parts) and {*members.values()} <= {None}:  # without a base branch
                    continue
                shapes = []
                for member, parameter in members.items():
                    if not isinstance(parameter, Tensor):
                        raise ValueError(f"`{member}` is not as described. There is no such parameter.")
                    shapes.append((member, tuple(parameter.shape)))
                parts.append((name, pattern, tuple(shapes)))
            axes = tuple(self.axes_of(layer).items())
            return _solve(self.kind, self.groups, tuple(parts), len(self.parts), axes)
        except ValueError as error:
            raise ValueError(
                f"{type(layer).__name__} was recognized as a KAN layer of the kind {self.kind!r}, but its "
                f"parameter {error}"
            ) from error

    def is_of_this_package(self, layer: nn.Module) -> bool:
        """Return whether the class of a layer comes with its description, which is then not compared with it."""
        cls = type(layer)
        described = getattr(self.matches, "__self__", None)  # by `__instancecheck__` of the class
        return described is cls and cls.__module__.startswith("peft_lotra.")

    def read_grid(self, layer: nn.Module) -> Grid:
        """Return the state that gives the coefficients their meaning, by name, without missing entries."""
        grid: dict[str, Any] = {}
        for name in self.grid:
            for member in expand_name(layer, name) if "*" in name else (name,):
                # each forward pass comes here: `getattr` is faster for a plain name
                value: Any = get_or_none(layer, member) if "." in member else getattr(layer, member, None)
                if isinstance(value, Number) and hasattr(value, "item"):  # of NumPy
                    value = value.item()  # pyright: ignore[reportAttributeAccessIssue]
                if value is not None:
                    grid[member] = value
        return grid

    def check_names(self, layer: nn.Module) -> None:
        """Raise a ValueError if a layer lacks an attribute that `grid` or `grid_methods` names."""
        absent = object()
        for name in (*self.grid, *self.grid_methods):
            for member in expand_name(layer, name) or [name]:
                if get_or_none(layer, member, absent) is absent:
                    raise ValueError(
                        f"`grid` or `grid_methods` of {self.kind!r} names {name!r}, and {type(layer).__name__} has "
                        "no such attribute. Correct the name, or leave it out."
                    )

    def find_edge_scale(self, layer: nn.Module) -> str | None:
        """Return the name of the parameter that scales the splines of each edge; None without such a parameter."""
        name = self.edge_scale[0] if self.edge_scale else ""
        return name if isinstance(get_or_none(layer, name), nn.Parameter) else None

    def scale(self, layer: nn.Module) -> Tensor | None:
        """Return the scales of the edges (out, in) in the formula of the layer; None without any."""
        if self.edge_scale is None:
            return None
        name, pattern = self.edge_scale
        scale = get_or_none(layer, name)
        if scale is not None and pattern == "i o":
            scale = scale.t()
        return scale

    def read_edge_scale(self, layer: nn.Module, tensor: CoefficientTensor) -> Tensor | None:
        """Return the scales of the edges, (out, in, 1) or (out, in, 1, kernel); None without such a parameter."""
        name, pattern = self.edge_scale or ("", "")
        scale = get_or_none(layer, name)
        if scale is None:
            return None
        layout = parse_layout(pattern, self.groups, scale.dim())
        values = layout.to_canonical(scale, tensor.parts[0][0].lengths)
        if values.dim() < len(tensor.shape):
            values = values.unsqueeze(-1)
        return values

    def describe(self, layer: nn.Module) -> dict[str, Any]:
        """Return the entry of a file that locates the coefficients without the registration, as in JSON."""
        fields = {**vars(self), "axes": self.axes_of(layer)}
        entry = {name: fields[name] for name in _IN_FILES if fields[name]}
        return json.loads(json.dumps(entry))


@lru_cache(1024)
def _solve(
    kind: str,
    groups: str,
    parts: tuple[tuple[str, str, tuple[tuple[str, tuple[int, ...]], ...]], ...],
    count: int,
    axes: tuple[tuple[str, int], ...],
) -> CoefficientTensor:
    """Find the lengths of all axes. They are the same for all layers of a kind that have the same shapes.

    Args:
        kind, groups: As in `KANLayerSpec`.
        parts: The name and the pattern of each part, and the names and shapes of its members.
        count: The number of parts of the coefficients. A further one is the residual weights.
        axes: Given lengths of axes.

    Raises:
        ValueError: A pattern does not fit.
    """
    counts = {name: len(shapes) for name, _, shapes in parts if "*" in name}
    if 0 in counts.values() or len(set(counts.values())) > 1:
        raise ValueError(f"lists are not as described. Their numbers of members are {counts}.")

    # each member of a list has its own lengths, a single parameter determines the lengths of all members
    lengths = [dict(axes) for _ in range(max(counts.values(), default=1))]
    targets = {}  # by the name of a parameter, the lengths that it determines
    solved: list[tuple[Member, ...]] = []
    for name, pattern, shapes in parts:
        is_list = "*" in name
        is_later = 0 < len(solved) < count
        members = []
        for (member, shape), lengths_of_member in zip(shapes, lengths, strict=False):
            layout = parse_layout(pattern, groups, len(shape), is_later)
            if is_later:
                layout = layout.share(solved[0][0].layout, is_list)
            members.append(Member(member, layout, lengths_of_member, shape))
            targets[member] = [lengths_of_member] if is_list else lengths
        solved.append(tuple(members))

    # one parameter may determine lengths of another: those with the fewest unknown ones come first
    for member in sorted(chain.from_iterable(solved), key=_count_unknown):
        try:
            solved_lengths = member.layout.axis_lengths(member.stored, member.lengths)
        except ValueError as error:
            raise ValueError(f"`{member.name}` is not as described. {error}") from error
        for target in targets[member.name]:
            for axis, length in solved_lengths.items():
                target.setdefault(axis, length)

    tensor = CoefficientTensor(kind, tuple(solved), len(parts) > count)
    edges = {}
    for (name, *_), shape in zip(parts, tensor.part_shapes, strict=True):
        edges[name] = shape[:2]
    if len(set(edges.values())) > 1:
        raise ValueError(f"shapes are not as described. Those of (out, in) must be equal, and are {edges}.")
    # fill the caches of the layouts, which compiled code cannot
    stored = [torch.empty(member.stored, device="meta") for member in tensor.members]
    tensor.split(tensor.join(stored))
    return tensor


def _count_unknown(member: Member) -> int:
    """Return the largest number of unknown lengths in a dimension."""
    unknown = [{*dim} - member.lengths.keys() for dim in member.layout.blocks[0]]
    return max(map(len, unknown))


def spec_from_file(kind: str, description: Mapping[str, Any]) -> KANLayerSpec:
    """Return the kind of layer that `KANLayerSpec.describe` wrote into a file. It matches no module.

    Raises:
        ValueError: The description is damaged.
    """
    try:
        fields: dict[str, Any] = {name: value for name, value in description.items() if name in _IN_FILES}
        return KANLayerSpec(kind, matches_nothing, **fields)
    except (TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"The description of the kind of layer {kind!r} in the file is broken: {error}") from error


def has(
    attributes: str,
    where: Callable[[Any], bool] | None = None,
) -> Callable[[Any], bool]:
    """Return the predicate of the modules that have these attributes, with so many axes where a number follows.

    Args:
        attributes: Dotted names, a parameter or module first, e.g. `"spline_weight:3 grid:2 b_splines"`.
        where: A further condition on these modules.
    """
    words = [word.partition(":") for word in attributes.split()]
    getters = [(attrgetter(name), axes) for name, _, axes in words]
    first, *_ = words[0]
    root, *_ = first.split(".")

    def matches(module: Any) -> bool:
        # an AttributeError, which says no, takes ten times as long
        is_own = root in module._parameters or root in module._modules or root in vars(module)
        if not is_own and not hasattr(type(module), root):
            return False
        for get, axes in getters:
            value = get(module)
            if axes and value.ndim != int(axes):
                return False
        return where is None or where(module)

    return matches


def matches_nothing(module: nn.Module) -> bool:
    """Return False: a file that describes a kind names its layers."""
    return False


# All kinds of layers, in the order of registration.
REGISTERED: dict[str, KANLayerSpec] = {}

# The kinds of this package, filled by known.py. Files name them without a description.
BUILT_IN: dict[str, KANLayerSpec] = {}


def register_kan_layer(kind: str, **description: Any) -> KANLayerSpec:
    """Describe a kind of KAN layer. Layers that are not recognized then get adapters, too.

    Later registrations take precedence over earlier and built-in ones.

    Args:
        kind (`str`): The name of the kind of layer. A kind of yours with the same name is replaced, with a warning if
            it described another class.
        **description: The other fields of [`KANLayerSpec`]; `matches` and `coefficients` are required.

    Returns:
        `KANLayerSpec`: The description.

    Raises:
        TypeError: A field does not exist, or a required one is missing.
        ValueError: A built-in kind has this name; a pattern is malformed, or a name stands twice.

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
        ...     matches=MyKANLayer,  # or a predicate of a module
        ...     coefficients=("spline_coeffs", "i o k"),  # parameter and layout
        ...     residual=("base_coeffs", "o i"),
        ... )
        >>> spec.locate(MyKANLayer()).shape
        (5, 3, 4)
    """
    if kind in BUILT_IN:
        raise ValueError(
            f"{kind!r} is a built-in kind of layer, which is not replaced. Choose another name: your kind takes "
            "precedence over the built-in ones."
        )
    spec = KANLayerSpec(kind, **description)
    former = REGISTERED.pop(kind, spec)  # the last one comes first
    REGISTERED[kind] = spec
    # a notebook defines a class, and registers it, again and again
    classes = [getattr(entry.matches, "__self__", None) for entry in (former, spec)]
    names = [cls.__name__ for cls in classes if isinstance(cls, type)]
    if len(set(names)) > 1:
        warnings.warn(
            f"{kind!r} described {names[0]}, and from now on describes {names[1]} alone. Register each class under a "
            "name of its own.",
            stacklevel=2,
        )
    return spec


# what help() and an editor show
register_kan_layer.__signature__ = inspect.signature(KANLayerSpec)  # pyright: ignore[reportFunctionMemberAccess]


def known_kinds() -> list[str]:
    """Return the names of all registered kinds of layers, in the order of registration."""
    return list(REGISTERED)


def is_built_in(spec: KANLayerSpec) -> bool:
    """Return whether a kind of layer comes with this package."""
    return BUILT_IN.get(spec.kind) is spec


# Containers, which no kind has to be compared with.
_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)


def registered_spec(module: nn.Module, kinds: Iterable[KANLayerSpec] = ()) -> KANLayerSpec | None:
    """Return the first of some kinds, by default the last registered kind, that matches a module."""
    if type(module) in _CONTAINERS:
        return None
    for spec in kinds or reversed(REGISTERED.values()):
        try:
            if spec.matches(module):
                return spec
        except AttributeError:  # a predicate that reads a missing attribute says no
            continue
    return None


def get_registered(kind: str) -> KANLayerSpec:
    """Return the registered kind of layer of a name."""
    if kind not in REGISTERED:
        raise ValueError(
            f"An adapter is for KAN layers of the kind {kind!r}, which is neither registered nor described in its "
            "file. Call `peft_lotra.register_kan_layer` for it first."
        )
    return REGISTERED[kind]


def copy_grid(grid: Mapping[str, Any]) -> Grid:
    """Copy a grid, as `KANLayerSpec.read_grid` returns it, with its tensors."""
    copy = dict(grid)
    for name, value in grid.items():
        if isinstance(value, Tensor):
            copy[name] = value.detach().clone()
    return copy


def same_grid(first: Mapping[str, object], second: Mapping[str, object]) -> bool:
    """Return whether two grids, as `KANLayerSpec.read_grid` returns them, are equal up to casts and devices.

    A tensor on the meta device, which has no content, equals any other of its shape.
    """
    if first.keys() != second.keys():
        return False
    for name, value in first.items():
        other = second[name]
        if isinstance(value, Tensor) and isinstance(other, Tensor):
            narrow, wide = sorted((value, other), key=Tensor.element_size)  # compared in the fewer digits
            if narrow.shape != wide.shape:
                return False
            has_content = not (narrow.is_meta or wide.is_meta)
            if has_content and not torch.equal(narrow, wide.to(narrow)):
                return False
        elif type(value) is not type(other) or value != other:
            return False
    return True
