# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""The search for KAN layers in a model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from numbers import Integral
from typing import Any, NamedTuple

import torch
from torch import nn

from ..modules.calls import PREFIX, evaluating_without_trace, read_at_rest, unwrap
from ..modules.report import Report, TextTable
from .coefficients import CoefficientTensor
from .formula import find_formula
from .kinds import REGISTERED, KANLayerSpec, is_built_in
from .recognize import get_kan_spec, infer, is_no_layer, recognize


# The attributes in which libraries keep the number of inputs of a layer.
_INPUT_SIZES = "in_features in_channels inputdim in_dim input_dim input_size in_planes"
# Modules that the search for layers does not enter. `tuner.jets` adds PEFT's wrappers, which hold copies of modules.
NOT_SEARCHED: list[type[nn.Module]] = [torch.jit.ScriptModule]


class FoundKANLayer(NamedTuple):
    """A KAN layer that `find_kan_layers` recognized.

    Attributes:
        name (`str`): The layer's name in the model, as `target_modules` takes it; `""` if it is the model itself.
        kind (`str`): Its kind, e.g. `"efficient-kan"`.
        shape (`tuple[int, ...]`): (out, in, basis) of the coefficient tensor, or (out, in, basis, kernel).
        has_residual (`bool`): Whether the layer has a base branch, i.e. one more slice of the basis mode.
        parameters (`tuple[str, ...]`): The parameters that adapters change.
        runs_by (`str`): What computes its outputs with adapters: a `"formula"`, which is the fast path, or its own
            `"forward"` with updated parameters.
        adapters (`dict[str, tuple[int, ...]]`): The ranks of each adapter of the layer.
        left_out (`tuple[str, ...]`): Further trained parameters of a layer of no built-in kind, which adapters do not
            change.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    has_residual: bool
    parameters: tuple[str, ...] = ()
    runs_by: str = "forward"
    adapters: Mapping[str, tuple[int, ...]] = {}
    left_out: tuple[str, ...] = ()


class UnrecognizedModule(NamedTuple):
    """A module with matrices, and why `find_kan_layers` did not recognize it as a KAN layer.

    Attributes:
        name (`str`): Its name in the model.
        cls (`str`): The name of its class.
        reason (`str`): Why it was not recognized.
        registration (`str`): A call that describes it, to be pasted. It is empty unless the gradients of the layer
            verify a description.
    """

    name: str
    cls: str
    reason: str
    registration: str = ""


class FoundKANLayers(Report, list[FoundKANLayer]):
    """The KAN layers of a model: a list that prints as a table.

    Attributes:
        unrecognized (`list[UnrecognizedModule]`): Modules with matrices that are not recognized, one of each class and
            shapes. Linear layers, convolutions and other modules of libraries are left out.
    """

    unrecognized: list[UnrecognizedModule]

    def as_dict(self) -> dict[str, Any]:
        """Return the layers and the modules that may be layers in plain values, for JSON."""
        layers = [layer._asdict() for layer in self]
        return {"layers": layers, "unrecognized": [module._asdict() for module in self.unrecognized]}

    def _table(self) -> TextTable:
        rows = []
        notes = []
        for name, kind, shape, _, parameters, runs_by, adapters, left_out in self:
            ranks = [f"{adapter} {ranks}" for adapter, ranks in adapters.items()]
            row = [name or "(the model)", kind, str(shape), ", ".join(parameters), runs_by, ", ".join(ranks) or "-"]
            rows.append(row)
            if left_out:
                notes.append(f"{name or 'the model'} leaves out {', '.join(left_out)}")
        if not rows:
            notes.append("no KAN layer was found")
        for module in self.unrecognized:
            notes += ["", f"{module.name or 'the model'} ({module.cls}) is not recognized: {module.reason}"]
            if module.registration:
                notes += ["To adapt it, describe it:", *module.registration.splitlines()]
        if self.unrecognized:
            notes += [
                "",
                "Describe KAN layers by `register_kan_layer`. Layers that need other inputs are run with theirs by",
                "`find_kan_layers(model, *inputs)`. Modules that are no KAN layers take plain LoRA.",
            ]
        columns = ["layer", "kind", ">coefficients", "parameters", "runs by", "adapters"]
        return TextTable(columns, rows, notes)


def find_kan_layers(model: nn.Module, *inputs: Any, **kwargs: Any) -> FoundKANLayers:
    """List the KAN layers of a model, adapted or not, in the order of `model.named_modules()`.

    Args:
        model (`nn.Module`): Any model.
        *inputs, **kwargs: The arguments of a call of the model. It is run once, in evaluation mode, and each module is
            described with the arguments that it gets. Without them inputs are made up, as when an adapter is
            attached. A layer that is recognized with its own arguments only is listed as `unrecognized`, with the
            call that registers it.

    Returns:
        `FoundKANLayers`: A list that prints as a table. Its `unrecognized` are a list of [`UnrecognizedModule`].

    Raises:
        ValueError: A layer is of a registered kind that does not fit it: a name is absent, or a pattern does not fit
            its parameter.

    Example:
        >>> from peft_lotra import find_kan_layers
        >>> from peft_lotra.kan import KAN
        >>> print(find_kan_layers(KAN([2, 4, 1])))
        layer     kind        coefficients  parameters                  runs by  adapters
        layers.0  peft-lotra     (4, 2, 8)  spline_weight, base_weight  formula  -
        layers.1  peft-lotra     (1, 4, 8)  spline_weight, base_weight  formula  -
    """
    network = unwrap(model)
    layers = FoundKANLayers()
    with read_at_rest(network):
        recorded = _record_arguments(network, inputs, kwargs) if inputs or kwargs else {}
        recognized: dict[str, nn.Module] = {}
        for name, layer, spec in walk_kan_layers(network):
            recognized[name] = layer
            tensor = spec.locate(layer)
            module = network.get_submodule(name)
            layers.append(
                FoundKANLayer(
                    name,
                    spec.kind,
                    tensor.shape,
                    tensor.has_residual,
                    parameters=tuple(tensor.parameters),
                    runs_by="forward" if find_formula(layer, spec, tensor) is None else "formula",
                    adapters=dict(vars(module).get("lotra_r", {})),
                    left_out=_list_left_out(layer, spec, tensor),
                )
            )
        layers.unrecognized = _find_unrecognized(network, recognized, recorded)
    return layers


def _list_left_out(layer: nn.Module, spec: KANLayerSpec, tensor: CoefficientTensor) -> tuple[str, ...]:
    if is_built_in(spec):
        return ()
    described = {*tensor.parameters, *spec.grid, spec.bias, *(spec.edge_scale or ())}
    names = []
    for name, parameter in layer.named_parameters():
        if parameter.requires_grad and name not in described:
            names.append(name)
    return tuple(names)


def _find_unrecognized(
    model: nn.Module,
    recognized: Mapping[str, nn.Module],
    recorded: Mapping[nn.Module, Any],
) -> list[UnrecognizedModule]:
    """Return modules of users' classes with matrices, and those that are KAN layers with the arguments of a call."""
    result: dict[Any, UnrecognizedModule] = {}
    listed = {module for _, module in unrecognized_modules(model, recognized)}
    for name, module in _modules_outside(model, recognized):
        registered, reason = recognize(module)
        if registered is not None:  # a copy that `modules_to_save` trains
            continue
        spec = None
        if module in recorded:
            spec, _ = infer(module, *recorded[module])
        if module in listed or spec is not None or _has_matrices(module):
            registration = "" if spec is None else _write_registration(module, spec)
            shapes = tuple(value.shape for value in module.parameters())
            entry = UnrecognizedModule(name, type(module).__name__, reason, registration)
            result.setdefault((type(module), shapes), entry)
    return [*result.values()]


def _write_registration(module: nn.Module, spec: KANLayerSpec) -> str:
    """Return a call that registers the kind of a module."""
    name = type(module).__name__
    coefficients = spec.parts[0] if len(spec.parts) == 1 else [*spec.parts]
    fields = {"coefficients": coefficients, "residual": spec.residual, "grid": spec.grid}
    lines = [f'"{name}",', f'matches=lambda m: type(m).__name__ == "{name}",']
    for field, value in fields.items():
        if value:
            text = repr(value).replace("'", '"')
            lines.append(f"{field}={text},")
    if spec.axes:
        axes = spec.axes
        for attribute in _INPUT_SIZES.split():
            if isinstance(getattr(module, attribute, None), Integral):
                axes = f'lambda m: {{"i": m.{attribute}}}'
                break
        lines.append(f"axes={axes},")
    indented = [f"    {line}\n" for line in lines]
    return f"register_kan_layer(\n{''.join(indented)})"


def unrecognized_modules(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
) -> list[tuple[str, nn.Module]]:
    """Return the modules that may be KAN layers: they look like one, or another of their class is one."""
    classes = {type(layer) for layer in layers.values()}
    modules = []
    for name, module in _modules_outside(model, layers):
        if type(module) in classes or _may_be_kan(module):
            modules.append((name, module))
    return modules


def _modules_outside(model: nn.Module, layers: Iterable[str]) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules that are no part of a KAN layer, with their names."""
    inside: set[nn.Module] = set()
    for name in layers:
        inside.update(model.get_submodule(name).modules())
    for name, module in model.named_modules():
        if module not in inside:
            yield name, module


def _may_be_kan(module: nn.Module) -> bool:
    """Return whether a module of a user's class has parameters of three axes, or named as in a registered kind.

    An axis of length one in front is for a batch, as in position embeddings and class tokens. Complex parameters are
    those of spectral convolutions.
    """
    if is_no_layer(module):
        return False
    names: set[str] = set()
    for spec in REGISTERED.values():
        names |= dict(spec.parts).keys()
    names -= {"weight", "scale", "coefficients"}
    for name, value in module.named_parameters(recurse=False):
        if name in names or (value.dim() > 2 and len(value) > 1 and not value.is_complex()):
            return True
    return False


def _has_matrices(module: nn.Module) -> bool:
    """Return whether a module of a user's class has parameters of two axes or more."""
    return not is_no_layer(module) and any(value.dim() > 1 for value in module.parameters(recurse=False))


def _record_arguments(
    model: nn.Module,
    inputs: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> dict[nn.Module, tuple[tuple[Any, ...], dict[str, Any]]]:
    """Run a model once in evaluation mode, without a trace; return the arguments of the first call of each module."""
    recorded: dict[nn.Module, Any] = {}

    def record(
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        recorded.setdefault(module, (args, kwargs))

    with ExitStack() as stack:
        stack.enter_context(evaluating_without_trace(model))
        for module in model.modules():
            handle = module.register_forward_pre_hook(record, with_kwargs=True)
            stack.callback(handle.remove)
        model(*inputs, **kwargs)
    return recorded


def find_layer(model: nn.Module, name: str) -> nn.Module:
    """Return the module of a name as `find_kan_layers` gives it, or with PEFT's prefix "base_model.model."."""
    network = unwrap(model)
    try:
        return network.get_submodule(short_name(name))
    except AttributeError:
        names = ", ".join(repr(layer.name) for layer in find_kan_layers(network)) or "none"
        raise ValueError(f"The model has no module {name!r}. Its KAN layers: {names}.") from None


def short_name(name: str) -> str:
    """Return the name of a module in the base model, without the prefix of PEFT."""
    return name.removeprefix(PREFIX)


def walk_kan_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module, KANLayerSpec]]:
    """Yield the KAN layers of a model with their names and kinds. An adapted layer yields its base layer.

    Left out are KAN layers inside of KAN layers and in the copies that PEFT's `modules_to_save` makes.
    """
    seen: set[nn.Module] = set()
    outer = None
    # a module that a skipped one shares is met again under a name of its own
    for name, module in model.named_modules(remove_duplicate=False):
        is_inside = outer is not None and name.startswith(outer)
        if module in seen or is_inside:
            continue
        if isinstance(module, tuple(NOT_SEARCHED)):
            outer = f"{name}." if name else ""
            continue
        seen.add(module)
        layer = module
        spec = None
        while isinstance(base_layer := layer._modules.get("base_layer"), nn.Module):
            spec = spec or vars(layer).get("lotra_spec")  # of a kind that may not be registered
            layer = base_layer
        spec = spec or get_kan_spec(layer)
        if spec is not None:
            seen.update(module.modules())
            yield name, layer, spec
