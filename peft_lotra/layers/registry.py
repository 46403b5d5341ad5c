# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""The registered kinds of KAN layers, and the search for layers in a model.

Libraries differ in the name and the axis order of a parameter: every layer maps x (..., in) to
y[o] = sum_{i,k} A[o,i,k] basis_k(x[i]), plus a residual branch sum_i W[o,i] silu(x[i]) in most of them.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from ..modules.calls import PREFIX, read_at_rest, unwrap
from ..modules.report import Report, TextTable
from .candidates import KANCandidate, find_candidates
from .compare import as_computed
from .description import REGISTERED, KANLayerSpec, matches_nothing, registered_spec, spec_from_file
from .description import Grid as Grid
from .inference import infer_spec


# Filled by known.py: files name these kinds without a description.
BUILT_IN: dict[str, KANLayerSpec] = {}

# Modules that the search for layers does not enter. `tuner.jets` adds PEFT's wrappers, which hold copies of modules.
NOT_SEARCHED: list[type[nn.Module]] = [torch.jit.ScriptModule]


def register_kan_layer(family: str, **description: Any) -> KANLayerSpec:
    """Registers a kind of KAN layer. Later registrations take precedence over earlier and built-in ones.

    Args:
        family (`str`): The name of the kind of layer. A kind of yours with the same name is replaced.
        **description: The other fields of [`KANLayerSpec`]; `matches` and `coefficients` are required.

    Returns:
        `KANLayerSpec`: The description.

    Raises:
        TypeError: A field does not exist, or a required one is missing.
        ValueError: The name is that of a built-in kind; a pattern is malformed, or a name stands twice.

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
    if family in BUILT_IN:
        raise ValueError(
            f"{family!r} is a built-in kind of layer, which is not replaced. Choose another name: your kind takes "
            "precedence over the built-in ones."
        )
    spec = KANLayerSpec(family, **description)
    REGISTERED.pop(family, None)  # the last one comes first
    REGISTERED[family] = spec
    return spec


# what help() and an editor show
register_kan_layer.__signature__ = inspect.signature(KANLayerSpec)  # pyright: ignore[reportFunctionMemberAccess]


def describe(spec: KANLayerSpec, layer: nn.Module) -> dict[str, Any]:
    """The entry of a file that describes the kind of a layer; empty for a kind of this package."""
    return {} if is_built_in(spec) else {"description": spec.describe(layer)}


def is_built_in(spec: KANLayerSpec) -> bool:
    """Whether a kind of layer comes with this package."""
    return BUILT_IN.get(spec.family) is spec


def get_recorded_spec(layer: nn.Module, record: Mapping[str, Any] | None) -> KANLayerSpec | None:
    """The kind of a layer of an adapter from a file: as registered, else as the file describes it.

    Args:
        layer: The layer.
        record: The entry of the layer: its `family` and, for a kind of a user, its `description`.

    Raises:
        ValueError: The kind is neither registered nor described, or the description is damaged.
    """
    spec = get_kan_spec(layer)
    if record is None:
        return spec
    name, description = record["family"], record.get("description")
    if spec is not None and spec.family == name and (description is None or spec.matches is not matches_nothing):
        return spec
    if description is not None:  # of a layer of no registered kind, as the version read it that wrote the file
        return spec_from_file(name, description)
    if name in REGISTERED:  # a kind that was registered later takes the layer too
        return registered_spec(layer, [REGISTERED[name]]) or spec
    raise ValueError(
        f"The adapter is for KAN layers of the kind {name!r}, which its file does not describe. Call "
        "`peft_lotra.register_kan_layer` for it before the adapter is loaded."
    )


def known_kinds() -> list[str]:
    """The names of all registered kinds of layers, in the order of registration."""
    return list(REGISTERED)


def get_kan_spec(module: nn.Module) -> KANLayerSpec | None:
    """The kind of a module: the `kan_spec` of its class, the last registered match, or one by its gradients.

    `None` if it is no KAN layer.
    """
    own = getattr(type(module), "kan_spec", None)
    if isinstance(own, KANLayerSpec):
        return own
    spec = registered_spec(module)
    if spec is None:
        return infer_spec(module)
    if is_built_in(spec):
        return as_computed(spec, module)
    spec.check_names(module)
    return spec


class FoundKANLayer(NamedTuple):
    """A KAN layer that was recognized in a model.

    Attributes:
        name (`str`): The layer's name in the model, as `target_modules` takes it; `""` if it is the model itself.
        family (`str`): Its kind, e.g. `"efficient-kan"`.
        shape (`tuple[int, ...]`): (out, in, basis) of the coefficient tensor, or (out, in, basis, kernel).
        has_residual (`bool`): Whether the layer has a residual branch, i.e. one more slice of the basis mode.
    """

    name: str
    family: str
    shape: tuple[int, ...]
    has_residual: bool


class FoundKANLayers(Report, list[FoundKANLayer]):
    """The KAN layers of a model: a list that prints as a table.

    Attributes:
        candidates (`list[KANCandidate]`): Modules that may be KAN layers of an unknown kind.
    """

    candidates: list[KANCandidate]

    def as_dict(self) -> dict[str, Any]:
        """The layers and the candidates in plain values, for JSON."""
        return {"layers": [it._asdict() for it in self], "candidates": [it._asdict() for it in self.candidates]}

    def _table(self) -> TextTable:
        rows = [[it.name or "(the model)", it.family, str(it.shape), ("no", "yes")[it.has_residual]] for it in self]
        notes = [] if rows else ["no KAN layer was found"]
        for candidate in self.candidates:
            state = "verified by gradients" if candidate.is_verified else "not verified"
            notes += ["", f"{candidate.name or 'the model'}, a {candidate.cls}, may be a KAN layer ({state}):"]
            notes += candidate.registration.splitlines()
        return TextTable(["layer", "kind", ">coefficients", "residual"], rows, notes)


def find_kan_layers(model: nn.Module, candidates: bool = False) -> FoundKANLayers:
    """Lists the KAN layers of a model, adapted or not, in the order of `model.named_modules()`.

    Args:
        model (`nn.Module`): Any model.
        candidates (`bool`): Whether to look for modules that may be KAN layers of an unknown kind, too. They are run
            for that, and each comes with a call to paste that registers it.

    Returns:
        `FoundKANLayers`: A list that prints as a table. Its `candidates` are a list of [`KANCandidate`].

    Raises:
        ValueError: A layer is of a registered kind that does not fit it: a name is absent, or a pattern does not fit
            its parameter.

    Example:
        >>> from peft_lotra import find_kan_layers
        >>> from peft_lotra.kan import KAN
        >>> print(find_kan_layers(KAN([2, 4, 1])))
        layer     kind        coefficients  residual
        layers.0  peft-lotra     (4, 2, 8)  yes
        layers.1  peft-lotra     (1, 4, 8)  yes
    """
    found = FoundKANLayers()
    found.candidates, known = [], set()
    network = unwrap(model)
    with read_at_rest(network):
        for name, layer, spec in walk_kan_layers(network):
            tensor = spec.locate(layer)
            found.append(FoundKANLayer(name, spec.family, tensor.shape, tensor.has_residual))
            # an adapted layer is no candidate, nor is anything inside it
            known |= {id(inner) for inner in network.get_submodule(name).modules()}
        if candidates:
            found.candidates = find_candidates(network, known)
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
    return name.removeprefix(PREFIX)


_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)  # which no kind has to be compared with


def walk_kan_layers(
    module: nn.Module, name: str = "", seen: set[int] | None = None
) -> Iterator[tuple[str, nn.Module, KANLayerSpec]]:
    """The KAN layers of a model (of adapted layers the base layers) with their names and kinds.

    Left out are KAN layers inside of KAN layers and in the copies that PEFT's `modules_to_save` makes.
    """
    seen = set() if seen is None else seen
    if id(module) in seen or isinstance(module, tuple(NOT_SEARCHED)):
        return
    seen.add(id(module))
    spec = None
    while isinstance(base_layer := module._modules.get("base_layer"), nn.Module):
        spec = spec or vars(module).get("lotra_spec")  # of a kind that may not be registered
        module = base_layer
    if type(module) not in _CONTAINERS and (spec := spec or get_kan_spec(module)):
        yield name, module, spec
        return
    for child_name, child in module.named_children():
        yield from walk_kan_layers(child, f"{name}.{child_name}" if name else child_name, seen)


def copy_grid(grid: Mapping[str, Any]) -> Grid:
    """A copy of a grid, as `KANLayerSpec.read_grid` gives it, with tensors of its own."""
    return {name: v.detach().clone() if isinstance(v, torch.Tensor) else v for name, v in grid.items()}


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
