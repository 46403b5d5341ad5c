# Copyright 2026 the peft-lotra authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""The KAN families: where each library keeps its coefficients, and how a new one is described.

KAN libraries differ in the name and the axis order of a parameter, not in kind: every layer maps x (..., in) to
y[o] = sum_{i,k} A[o,i,k] basis_k(x[i]), plus a residual branch sum_i W[o,i] silu(x[i]) in most of them. A family is
therefore described (`KANLayerSpec`), not re-implemented.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from ..functional import unwrap
from ..kan.basis import UniformGrid
from .coefficients import CoefficientTensor, get_or_none
from .layout import parse_layout
from .slim import SlimLayer


@dataclass(frozen=True)
class KANLayerSpec:
    """The description of a KAN family; see [`register_kan_layer`] for its fields."""

    family: str
    matches: Callable[[nn.Module], bool]
    coefficients: tuple[str, str]
    residual: tuple[str, str] | None = None
    grid: tuple[str, ...] = ()
    grid_methods: tuple[str, ...] = ()
    network_methods: Mapping[str, str | None] = field(default_factory=dict)
    checkpoint_methods: tuple[str, ...] = ()
    basis: Callable[[nn.Module, torch.Tensor], torch.Tensor] | None = None
    splines: Callable[[nn.Module], UniformGrid | None] | None = None
    activation: Callable[[nn.Module, torch.Tensor], torch.Tensor] | None = None
    scale: Callable[[nn.Module], torch.Tensor | None] | None = None
    bias: str | None = None
    axes: Callable[[nn.Module], Mapping[str, int]] | None = None

    def __reduce__(self):
        # Predicates may be lambdas, which do not pickle: an unpickled model finds its family in the registry.
        return _get_registered, (self.family,)

    def locate(self, layer: nn.Module) -> CoefficientTensor:
        """Finds the coefficients of a layer of this family.

        Raises:
            ValueError: A pattern does not fit the parameter; the message repeats both.
        """
        name, pattern = self.coefficients
        layout = parse_layout(pattern)
        lengths = dict(self.axes(layer)) if self.axes is not None else {}
        parameters = {name: layout}
        if self.residual is not None and get_or_none(layer, self.residual[0]) is not None:
            parameters[self.residual[0]] = parse_layout(self.residual[1])
        # The residual weights (out, in) settle what a flattened coefficient pattern leaves open, so they come first.
        for parameter_name, parameter_layout in reversed(parameters.items()):
            parameter = get_or_none(layer, parameter_name)
            try:
                if parameter is None:
                    raise ValueError("There is no such parameter.")
                lengths = parameter_layout.axis_lengths(parameter.shape, lengths)
            except ValueError as error:
                raise ValueError(
                    f"{type(layer).__name__} was recognised as a KAN layer of the family {self.family!r}, but its "
                    f"parameter `{parameter_name}` is not as described. {error}"
                ) from error
        return CoefficientTensor(self.family, parameters, lengths)

    def read_grid(self, layer: nn.Module) -> dict[str, torch.Tensor | int | float]:
        """The state that gives the coefficients of a layer their meaning, by name; what a layer lacks is left out."""
        if isinstance(layer, SlimLayer):
            return {f"layer.{name}": value for name, value in layer.spec.read_grid(layer.layer).items()}
        values = {name: get_or_none(layer, name) for name in self.grid}
        return {name: value for name, value in values.items() if value is not None}


_SPECS: dict[str, KANLayerSpec] = {}


def register_kan_layer(
    family: str,
    *,
    matches: type[nn.Module] | Callable[[nn.Module], bool],
    coefficients: tuple[str, str],
    residual: tuple[str, str] | None = None,
    grid: tuple[str, ...] = (),
    grid_methods: tuple[str, ...] = (),
    network_methods: Mapping[str, str | None] | None = None,
    checkpoint_methods: tuple[str, ...] = (),
    basis: Callable[[nn.Module, torch.Tensor], torch.Tensor] | None = None,
    splines: Callable[[nn.Module], UniformGrid | None] | None = None,
    activation: Callable[[nn.Module, torch.Tensor], torch.Tensor] | None = None,
    scale: Callable[[nn.Module], torch.Tensor | None] | None = None,
    bias: str | None = None,
    axes: Callable[[nn.Module], Mapping[str, int]] | None = None,
) -> KANLayerSpec:
    """Teaches LoTRA a family of KAN layers. The last one registered is asked first; a known name is replaced.

    Example:

    ```py
    >>> register_kan_layer(
    ...     "my-kan",
    ...     matches=MyKANLayer,                       # or a predicate: lambda m: hasattr(m, "spline_coeffs")
    ...     coefficients=("spline_coeffs", "i o k"),  # the parameter, and its layout
    ...     residual=("base_coeffs", "o i"),
    ... )
    ```

    Args:
        family (`str`): The name under which the family is reported.
        matches (`type` or `Callable`): The class of the layers, or a predicate on a module. Prefer a predicate on the
            parameters' names where users copy the file and rename the class.
        coefficients (`tuple[str, str]`): The parameter that holds the coefficients (dotted names reach into
            sub-modules) and its layout as an einops pattern: `o` and `i` are the output and input features, any other
            axes make up the basis mode in the order in which they appear. `"o i k"`, `"i o k"`, `"o (i k)"`,
            `"t o i g"`; `"o ((i k) + i)"` where the residual weights are packed behind the coefficients.
        residual (`tuple[str, str]`, *optional*): The parameter of the residual branch and its layout, of `o` and `i`.
            A layer on which it is absent or `None` has no residual branch.
        grid (`tuple[str, ...]`): The state that gives the coefficients their meaning: tensors and numbers. What a
            layer does not have is passed over.
        grid_methods (`tuple[str, ...]`): The layer's methods that change that state, or cut or permute the
            coefficients. They raise while an adapter is attached and not merged.
        network_methods (`dict[str, str | None]`, *optional*): Methods of the network around the layer that rebuild it
            from its state dict, replace its layers or move their grids. They raise until the adapters are unloaded;
            where the value is the name of an argument, only if that argument is true.
        checkpoint_methods (`tuple[str, ...]`): Methods of the network around the layer that save it. They save the
            network with its adapters merged, under its original names.
        basis (`Callable`, *optional*): `basis(layer, x)` with x (batch, in) returns the basis functions
            (batch, in, basis) that the coefficients multiply. With it adapted layers are evaluated on the fast path,
            as basis(x) . (scale * coefficients) + activation(x) . residual + bias, if that is what the layer computes:
            the two are compared on a few points when an adapter is attached, and when the grid has changed.
        splines (`Callable`, *optional*): `splines(layer)` returns the [`UniformGrid`] that the basis consists of,
            or `None`. They are then evaluated in closed form, much faster than most layers do it themselves.
        activation (`Callable`, *optional*): `activation(layer, x)` returns what the residual weights multiply
            (batch, in).
        scale (`Callable`, *optional*): `scale(layer)` returns factors (out, in) of the coefficients, or `None`.
        bias (`str`, *optional*): The parameter that is added to the output. It may be absent or `None`.
        axes (`Callable`, *optional*): `axes(layer)` returns the lengths of axes that no shape determines, e.g.
            `{"k": layer.num_grids}` for the layout `"o (i k)"`.

    Returns:
        `KANLayerSpec`: The description.

    Raises:
        ValueError: A pattern is malformed, or has no basis axis.
    """
    if not parse_layout(coefficients[1]).basis:
        raise ValueError(
            f"Pattern {coefficients[1]!r} of the coefficients of {family!r} has no basis axis: name at least one axis "
            "besides `o` and `i`, e.g. 'o i k'."
        )
    if residual is not None and parse_layout(residual[1]).basis:
        raise ValueError(
            f"Pattern {residual[1]!r} of the residual weights of {family!r} has an axis besides `o` and `i`: expected "
            "'o i' or 'i o'."
        )
    if residual is not None and parse_layout(coefficients[1]).packed_residual is not None:
        raise ValueError(f"The coefficients of {family!r} already contain the residual weights: drop `residual`.")
    if isinstance(matches, type):
        cls = matches

        def matches(module: nn.Module) -> bool:
            return isinstance(module, cls)

    spec = KANLayerSpec(
        family,
        matches,
        tuple(coefficients),
        None if residual is None else tuple(residual),
        tuple(grid),
        tuple(grid_methods),
        dict(network_methods or {}),
        tuple(checkpoint_methods),
        basis,
        splines,
        activation,
        scale,
        bias,
        axes,
    )
    _SPECS.pop(family, None)
    _SPECS[family] = spec
    return spec


def _get_registered(family: str) -> KANLayerSpec:
    if family not in _SPECS:
        raise ValueError(f"The KAN family {family!r} is not registered: call `register_kan_layer` for it first.")
    return _SPECS[family]


def known_families() -> list[str]:
    """The names of all registered families, in the order in which they were registered."""
    return list(_SPECS)


def get_kan_spec(module: nn.Module) -> KANLayerSpec | None:
    """The description of the family that the module belongs to, or `None` if it is no KAN layer that is known."""
    if isinstance(module, SlimLayer):  # it answers for the layer in it, which another family would recognise
        return _SPECS["slim"]
    for spec in reversed(_SPECS.values()):
        try:
            if spec.matches(module):
                return spec
        except AttributeError:  # a predicate that reads what this module does not have says no
            continue
    return None


@dataclass(frozen=True)
class FoundKANLayer:
    """A KAN layer that was recognised in a model.

    Attributes:
        name (`str`): Its name in the model, as `target_modules` takes it; `""` if it is the model itself.
        family (`str`): The family it was recognised as.
        shape (`tuple[int, int, int]`): (out, in, basis) of its coefficient tensor.
        has_residual (`bool`): Whether it has a residual branch, i.e. one more slice of the basis mode.
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
        ValueError: A layer was recognised but a pattern of its family does not fit its parameters.
    """
    found = []
    for name, layer, spec in walk_kan_layers(unwrap(model)):
        tensor = spec.locate(layer)
        found.append(FoundKANLayer(name, spec.family, tensor.shape, tensor.has_residual))
    return found


def find_layer(model: nn.Module, name: str) -> nn.Module:
    """The module of a name as `find_kan_layers` gives it, or as PEFT writes it ("base_model.model.layers.0").

    Raises:
        ValueError: There is none; the message lists the KAN layers.
    """
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
    """The KAN layers of a model with their names and families; of adapted layers, the base layers.

    Nothing is searched inside KAN layers, nor inside the copies that PEFT's `modules_to_save` makes.
    """
    seen = set() if seen is None else seen
    if id(module) in seen or isinstance(module, AuxiliaryTrainingWrapper):
        return
    seen.add(id(module))
    while isinstance(module._modules.get("base_layer"), nn.Module):
        module = module.base_layer
    spec = get_kan_spec(module)
    if spec is not None:
        yield name, module, spec
        return
    for child_name, child in module.named_children():
        yield from walk_kan_layers(child, f"{name}.{child_name}" if name else child_name, seen)


def same_grid(first: Mapping[str, object], second: Mapping[str, object]) -> bool:
    """Whether two grids, as `KANLayerSpec.read_grid` gives them, are equal, casts and devices apart."""
    return first.keys() == second.keys() and all(_same(value, second[name]) for name, value in first.items())


def _same(first: object, second: object) -> bool:
    if not (isinstance(first, torch.Tensor) and isinstance(second, torch.Tensor)):
        return type(first) is type(second) and first == second
    narrow, wide = sorted((first, second), key=torch.Tensor.element_size)  # compared in the fewer digits
    return narrow.shape == wide.shape and torch.equal(narrow, wide.to(narrow))
