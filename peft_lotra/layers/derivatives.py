# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Layers and networks of other libraries as chains of stages, for the closed form of `peft_lotra.kan.jet`.

A layer is compared with its formula. A network is run once: its stages must follow each other with nothing between
them. Everything else is differentiated by transforms.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..derivatives.stages import Entry, Stage, is_known, join_stages, register, stages_of
from ..kan.basis import UniformGrid, in_transform
from ..kan.formula import LayerFormula
from ..kan.network import is_norm
from ..modules.calls import attributes_kept, buffers_kept, is_tracing
from .coefficients import CoefficientTensor
from .description import REGISTERED, KANLayerSpec
from .formula import State, find_formula, state_of
from .registry import get_kan_spec


Located = tuple[KANLayerSpec, CoefficientTensor]
_layers: WeakKeyDictionary[nn.Module, tuple[State, Located | None]] = WeakKeyDictionary()
_networks: WeakKeyDictionary[nn.Module, tuple[State, list[nn.Module] | None]] = WeakKeyDictionary()


def find_stages(module: nn.Module) -> list[Stage] | None:
    """The stages of a layer, or of a network, of another library; `None` if it is no chain of known stages."""
    if is_tracing():
        return None
    if _locate(module):
        formula = formula_of(module)
        return formula and [Stage(module, formula)]
    return join_stages(_units_in_a_row(module))


def formula_of(layer: nn.Module) -> LayerFormula | None:
    """Return the formula of a KAN layer of any library without adapters; `None` if it has none."""
    target = _locate(layer)
    reader = target and find_formula(layer, *target, for_jets=True)
    if reader is None:
        return None
    formula = reader.read(layer)
    grid = reader.spec.read_grid(layer)
    basis: Any = formula.basis
    if isinstance(basis, UniformGrid):
        # the closed form has no gradient in the knots
        is_trained = any(isinstance(value, Tensor) and value.requires_grad for value in grid.values())
        return None if is_trained else formula
    norm = f"{reader.spec.normalization}."
    terms = {*reader.tensor.parameters, reader.spec.bias, *(reader.spec.edge_scale or ())}
    named = (*layer.named_parameters(), *layer.named_buffers())
    tensors = [value for name, value in named if name not in terms and not name.startswith(norm)]
    return formula._replace(basis=basis._replace(tensors=tuple(tensors)))


def _locate(module: nn.Module) -> Located | None:
    """Return the kind of a layer and where its coefficients are; `None` if it has no formula by its kind."""
    registered, target = tuple(map(id, REGISTERED.values())), None
    if module in _layers and _layers[module][0] == registered:
        return _layers[module][1]
    spec = get_kan_spec(module)
    if spec is not None and (spec.basis or spec.splines or spec.derivatives):
        try:
            target = spec, spec.locate(module)
        except ValueError:  # it is no such layer
            pass
    _layers[module] = registered, target
    return target


# Whether a network is the composition of its layers


def _units_in_a_row(network: nn.Module) -> list[nn.Module]:
    """The stages of a network that is their composition; empty for any other network."""
    kept, units = _networks.get(network, ((), None))
    if network._modules and not in_transform():
        kinds = tuple(map(id, REGISTERED.values()))
        state = kinds, *state_of(network)
        if state != kept:
            units = _trace(network)
            _networks[network] = state, units
    return units or []


def _units(module: nn.Module) -> Iterator[nn.Module]:
    """The parts of a network that are stages, outermost first."""
    for child in module.children():
        if is_known(child) or is_norm(child) or _locate(child) is not None:
            yield child
        else:
            yield from _units(child)


def _trace(network: nn.Module) -> list[nn.Module] | None:
    """The parts that run one after the other, each on the output of the one before, itself; `None` otherwise."""
    units = list(dict.fromkeys(_units(network)))
    stages = [stage for unit in units for stage in stages_of(unit) or ()]
    if not any(stage.formula for stage in stages):
        return None
    events: list[tuple[nn.Module, Any, Any]] = []

    def record(module: nn.Module, args: tuple, output: Any) -> None:
        events.append((module, args[0] if len(args) == 1 else None, output))

    width = next(size for stage in stages if (size := stage.in_features) is not None)
    with torch.inference_mode(False), torch.no_grad(), attributes_kept(network), buffers_kept(network):
        x = torch.rand(3, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64, device="cpu")
        last: Any = x.to(next((p for p in network.parameters() if p.is_floating_point()), x))
        handles = [unit.register_forward_hook(record) for unit in units]
        try:
            events.append((network, network(last), None))
        except Exception:  # foreign code: another width, or more arguments
            return None
        finally:
            for handle in handles:
                handle.remove()
    for _, given, returned in events:
        if given is not last:
            return None
        last = returned
    return [module for module, *_ in events[:-1]]


register(nn.Module, Entry(find_stages))
