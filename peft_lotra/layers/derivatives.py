# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Layers and networks of other libraries as chains of stages, for the closed form of `peft_lotra.kan.jet`.

A layer is compared with its description, values and derivatives. A network is run once: its stages must follow each
other with nothing between them. Everything else is differentiated by transforms.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..derivatives.bases import FunctionBasis
from ..derivatives.layers import evaluate_layer
from ..derivatives.stages import Branch, Entry, Stage, is_known, join_stages, register, stages_of
from ..derivatives.torch_fallback import elementwise_derivatives, jet_by_transforms
from ..kan.basis import in_transform, silu_derivatives
from ..kan.network import is_norm
from ..modules.calls import attributes_kept, call_with_parameters, is_tracing, runs_more_than_its_class
from .coefficients import CoefficientTensor, get_or_none
from .compare import agree, points_around
from .description import REGISTERED, Grid, KANLayerSpec
from .probe import moved
from .registry import get_kan_spec, same_grid


# Largest differences of value, first and second derivatives, as a share of the largest: the rounding of float32 in
# knots that the closed form of a uniform grid does not see, and of float64.
_TOLERANCES = {torch.float32: (1e-6, 1e-5, 1e-4), torch.float64: (1e-11, 1e-10, 1e-9)}

State = tuple[Any, ...]


class _Form(NamedTuple):
    """A way to compute a layer."""

    on_uniform_grid: bool
    with_silu: bool  # in the residual branch


class _Layer(NamedTuple):
    """A KAN layer, and for each of its states the grid and the form that agree, `None` if there is none."""

    spec: KANLayerSpec
    tensor: CoefficientTensor
    forms: dict[State, tuple[Grid, _Form | None]]


_layers: WeakKeyDictionary[nn.Module, tuple[State, _Layer | None]] = WeakKeyDictionary()
_networks: WeakKeyDictionary[nn.Module, tuple[State, list[nn.Module] | None]] = WeakKeyDictionary()


def find_stages(module: nn.Module) -> list[Stage] | None:
    """The stages of a layer, or of a network, of another library; `None` if it is no chain of known stages."""
    if is_tracing():
        return None
    if known := _known_layer(module):
        stage = layer_stage(module, known.spec)
        return stage and [stage]
    return join_stages(_units_in_a_row(module))


def layer_stage(layer: nn.Module, spec: KANLayerSpec, parameters: Mapping[str, Tensor] | None = None) -> Stage | None:
    """A layer as a stage, with `parameters` in the places of its own; `None` without a closed form."""
    known = None if is_tracing() else _known_layer(layer)
    if known is None or known.spec is not spec or (form := _form(layer, known)) is None:
        return None
    return _stage(form, layer, known, parameters)


def _known_layer(module: nn.Module) -> _Layer | None:
    registered, known = tuple(map(id, REGISTERED.values())), None
    if module in _layers and _layers[module][0] == registered:
        return _layers[module][1]
    spec = get_kan_spec(module)
    if spec is not None and (spec.derivatives is not None or spec.splines is not None):
        try:
            known = _Layer(spec, spec.locate(module), {})
        except ValueError:  # it is no such layer
            pass
    _layers[module] = registered, known
    return known


def _stage(form: _Form, layer: Any, known: _Layer, parameters: Mapping[str, Tensor] | None = None) -> Stage:
    spec = known.spec
    coefficients, residual = known.tensor.read_parts(layer, dict(parameters or {}))
    if (scale := spec.scale(layer)) is not None:
        coefficients = coefficients * scale.unsqueeze(-1)
    tensors = tuple(value for value in spec.read_grid(layer).values() if isinstance(value, Tensor))
    if form.on_uniform_grid:
        grid = cast(Any, spec.splines)(layer)
        last = residual if form.with_silu and residual is not None else torch.zeros_like(coefficients[:, :, 0])
        branches = [Branch(grid, torch.cat([coefficients, last.unsqueeze(-1)], -1))]
    else:
        basis = FunctionBasis(coefficients.shape[2], partial(cast(Any, spec.derivatives), layer), tensors)
        branches = [Branch(basis, coefficients, get_or_none(layer, spec.normalization or ""))]
    if residual is not None and not (form.on_uniform_grid and form.with_silu):
        of_others = partial(elementwise_derivatives, partial(cast(Any, spec.activation), layer))
        of = silu_derivatives if form.with_silu else of_others
        basis = FunctionBasis(1, lambda z, highest: [part.unsqueeze(-1) for part in of(z, highest)], tensors)
        branches.append(Branch(basis, residual.unsqueeze(-1)))
    bias = get_or_none(layer, spec.bias or "")
    return Stage(layer, branches=tuple(branches), bias=None if bias is None else bias.flatten())


# Whether a layer is as described


def _form(layer: nn.Module, known: _Layer) -> _Form | None:
    """The form that agrees with the layer. In transforms nothing can be compared: it is the one found before."""
    if runs_more_than_its_class(layer) or _trains_functions(layer, known):
        return None
    grid = known.spec.read_grid(layer)
    state = (known.tensor.get_parameter(layer).dtype, *_state_of(layer))
    compared, form = known.forms.get(state, ({}, None))
    if in_transform() or (state in known.forms and same_grid(compared, grid)):
        return form
    found = next((form for form in _forms(known.spec) if _agrees(form, layer, known)), None)
    if len(known.forms) > 8:  # states that come and go
        known.forms.clear()
    copied = {name: v.detach().clone() if isinstance(v, Tensor) else v for name, v in grid.items()}
    known.forms[state] = copied, found
    return found


def _trains_functions(layer: nn.Module, known: _Layer) -> bool:
    """Whether tensors that may shape the functions, e.g. knots, are trained: the closed form has no gradient there."""
    spec = known.spec
    others = {*known.tensor.parameters, spec.bias, (spec.edge_scale or ("",))[0]}
    named, norm = (*layer.named_parameters(), *layer.named_buffers()), f"{spec.normalization}."
    return any(v.requires_grad and name not in others and not name.startswith(norm) for name, v in named)


def _state_of(module: nn.Module) -> State:
    """The comparable part of what a forward pass may depend on besides tensors."""
    plain = tuple((name, v) for name, v in vars(module).items() if isinstance(v, (bool, int, float, str, type(None))))
    return plain, tuple(map(id, module._modules.values())), id(vars(module).get("forward"))


def _forms(spec: KANLayerSpec) -> list[_Form]:
    """The ways to compute a layer of a kind, the fastest first."""
    functions = {True: spec.splines, False: spec.derivatives}
    residuals = (False,) if spec.activation is None else (True, False)
    return [_Form(grid, silu) for grid, found in functions.items() if found is not None for silu in residuals]


def _agrees(form: _Form, layer: nn.Module, known: _Layer) -> bool:
    """Compares stage and layer in float64, at random parameters, so that each has its effect."""
    spec, like = known.spec, known.tensor.get_parameter(layer)
    if like.dtype not in _TOLERANCES or like.is_meta:
        return False
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode(False), torch.no_grad():
        named = (*layer.named_parameters(), *layer.named_buffers())
        values = {name: v.detach().clone().double() for name, v in named if v.is_floating_point()}
        exchanged = moved(values, {name for name, _ in layer.named_parameters()}.difference(spec.grid), torch.randn)
        grids = [v.flatten() for v in spec.read_grid(layer).values() if isinstance(v, Tensor) and v.numel() > 1]
        low, high = torch.cat(grids or [torch.tensor([-2.0, 2.0], device="cpu")]).double().cpu().aminmax()
        x = points_around(low, high, known.tensor.shape[1]).to(like.device)
        directions = torch.randn(2, x.shape[1], generator=generator, dtype=torch.float64, device="cpu").to(x)

        def compare() -> bool:
            expected = jet_by_transforms(layer, x, directions, 2, None)
            found = evaluate_layer(_stage(form, layer, known), [x, directions[:, None]], 2, None)
            is_right = all(map(agree, found, expected, _TOLERANCES[like.dtype], [1e-3] * 3))
            return is_right and (form.on_uniform_grid or _higher_derivatives_agree(spec, layer, x))

        try:
            return call_with_parameters(layer, exchanged, compare, (), {})
        except Exception:  # foreign code, which may raise anything
            return False


def _higher_derivatives_agree(spec: KANLayerSpec, layer: nn.Module, x: Tensor) -> bool:
    """Whether each derivative from the third on, which gradients need, is that of the one before."""
    derivatives: Any = partial(cast(Any, spec.derivatives), layer)
    found = derivatives(x, 5)[2:]
    of_order = [lambda z, d=d: derivatives(z, d)[d] for d in range(2, 1 + len(found))]
    slopes = [elementwise_derivatives(function, x, 1)[1] for function in of_order]
    pairs = zip(found[1:], slopes, strict=True)
    return bool(found) and all(agree(part.flatten(1), slope.flatten(1), 1e-9, 1e-3) for part, slope in pairs)


# Whether a network is the composition of its layers


def _units_in_a_row(network: nn.Module) -> list[nn.Module]:
    """The stages of a network that is their composition; empty for any other network."""
    kept, units = _networks.get(network, ((), None))
    if network._modules and not in_transform():
        kinds = tuple(map(id, REGISTERED.values()))
        state = kinds, *((id(part), part.training, *_state_of(part)) for part in network.modules())
        if state != kept:
            units = _trace(network)
            _networks[network] = state, units
    return units or []


def _units(module: nn.Module) -> Iterator[nn.Module]:
    """The parts of a network that are stages, outermost first."""
    for child in module.children():
        if is_known(child) or is_norm(child) or _known_layer(child) is not None:
            yield child
        else:
            yield from _units(child)


def _trace(network: nn.Module) -> list[nn.Module] | None:
    """The parts that run one after the other, each on the output of the one before, itself; `None` otherwise."""
    units = list(dict.fromkeys(_units(network)))
    stages = [stage for unit in units for stage in stages_of(unit) or ()]
    if not any(stage.is_layer for stage in stages):
        return None
    events: list[tuple[nn.Module, Any, Any]] = []

    def record(module: nn.Module, args: tuple, output: Any) -> None:
        events.append((module, args[0] if len(args) == 1 else None, output))

    width = next(size for stage in stages if (size := stage.in_features) is not None)
    with torch.inference_mode(False), torch.no_grad(), attributes_kept(network):
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
