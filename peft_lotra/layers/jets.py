# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Layers and networks of other libraries as stages of a chain, for the closed form of `peft_lotra.kan.jet`.

A description may be wrong, or a layer may compute more than is described. So a layer is compared with what is
described, values and derivatives, and a network is run once to see whether its layers follow each other with nothing
between them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..derivatives.bases import FunctionBasis
from ..derivatives.layers import evaluate_layer
from ..derivatives.stages import Branch, Stage, is_known, stages_of
from ..derivatives.torch_fallback import elementwise_derivatives, jet_by_transforms
from ..kan.basis import in_transform, silu_derivatives
from ..kan.network import is_norm
from ..modules.calls import attributes_kept, call_with_parameters
from .coefficients import CoefficientTensor, get_or_none
from .description import REGISTERED, Grid, KANLayerSpec
from .registry import get_kan_spec, same_grid


# What value, first and second derivatives may differ by, as a share of the largest: the rounding of float32 in knots
# that the closed form of a uniform grid does not see, and of float64.
_TOLERANCES = {torch.float32: (1e-6, 1e-5, 1e-4), torch.float64: (1e-11, 1e-10, 1e-9)}
_ROWS = 12  # of a comparison

State = tuple[Any, ...]


class _Form(NamedTuple):
    """A way to compute a layer that was found to agree with it, for one state of the layer and one grid."""

    grid: Grid
    on_uniform_grid: bool
    with_silu: bool  # in the residual branch
    reads: tuple[str, ...] = ()  # the layer's tensors that its functions depend on, as parameters in an activation


class _Layer(NamedTuple):
    """What is known of a KAN layer: its family, and by state the form that agrees, None if there is none."""

    spec: KANLayerSpec
    tensor: CoefficientTensor
    forms: dict[State, tuple[Grid, _Form | None]]


_layers: WeakKeyDictionary[nn.Module, _Layer | None] = WeakKeyDictionary()
_asked: WeakKeyDictionary[nn.Module, State] = WeakKeyDictionary()  # which families were asked about a module
_networks: WeakKeyDictionary[nn.Module, tuple[State, list[nn.Module] | None]] = WeakKeyDictionary()


def find_stages(module: nn.Module) -> list[Stage] | None:
    """The stages of a layer, or of a network, of another library; None if none is known, or it computes more."""
    if torch.compiler.is_compiling():
        return None
    known = _known_layer(module)
    if known is not None:
        stage = layer_stage(module, known.spec, known.tensor)
        return None if stage is None else [stage]
    if "act_fun" in module._modules and "symbolic_fun" in module._modules:
        return _pykan_stages(module)
    return _network_stages(module)


def layer_stage(
    layer: nn.Module, spec: KANLayerSpec, tensor: CoefficientTensor, parameters: Mapping[str, Tensor] | None = None
) -> Stage | None:
    """A layer as a stage, with `parameters` in the places of its own; None without a closed form."""
    form = None if torch.compiler.is_compiling() else _form(layer, spec, tensor)
    return None if form is None else _stage(form, layer, spec, tensor, parameters)


def _known_layer(module: nn.Module) -> _Layer | None:
    registered = tuple(map(id, REGISTERED.values()))
    if module not in _layers or _asked.get(module) != registered:  # a family may have been registered since
        _asked[module] = registered
        spec, known = get_kan_spec(module), None
        if spec is not None and spec.linear and (spec.derivatives is not None or spec.splines is not None):
            try:
                known = _Layer(spec, spec.locate(module), {})
            except ValueError:  # it is no such layer
                pass
        _layers[module] = known
    return _layers[module]


def _stage(
    form: _Form,
    layer: Any,
    spec: KANLayerSpec,
    tensor: CoefficientTensor,
    parameters: Mapping[str, Tensor] | None = None,
) -> Stage:
    coefficients, residual = tensor.read_parts(layer, dict(parameters or {}))
    read = tuple(value for name in form.reads if isinstance(value := get_or_none(layer, name), Tensor))
    scale = None if spec.scale is None else spec.scale(layer)
    if scale is not None:
        coefficients = coefficients * scale.unsqueeze(-1)
    if spec.edge_mask is not None:
        mask = spec.edge_mask(layer)
        coefficients = coefficients * mask.unsqueeze(-1)
        residual = None if residual is None else residual * mask
    branches = []
    if form.on_uniform_grid:
        assert spec.splines is not None
        grid = spec.splines(layer)
        assert grid is not None
        last = residual if form.with_silu and residual is not None else torch.zeros_like(coefficients[:, :, 0])
        branches.append(Branch(grid, torch.cat([coefficients, last.unsqueeze(-1)], -1)))
    else:
        assert spec.derivatives is not None
        basis = FunctionBasis(coefficients.shape[2], partial(spec.derivatives, layer), read)
        branches.append(Branch(basis, coefficients, get_or_none(layer, spec.normalization or "")))
    if residual is not None and not (form.on_uniform_grid and form.with_silu):
        derivatives = _silu if form.with_silu else partial(_activation, spec, layer)
        branches.append(Branch(FunctionBasis(1, derivatives, read), residual.unsqueeze(-1)))
    bias = get_or_none(layer, spec.bias or "")
    return Stage(layer, branches=tuple(branches), bias=None if bias is None else bias.flatten())


def _silu(z: Tensor, highest: int) -> list[Tensor]:
    return [part.unsqueeze(-1) for part in silu_derivatives(z, highest)]


def _activation(spec: KANLayerSpec, layer: nn.Module, z: Tensor, highest: int) -> list[Tensor]:
    assert spec.activation is not None
    return [part.unsqueeze(-1) for part in elementwise_derivatives(partial(spec.activation, layer), z, highest)]


# Whether a layer is as described


def _form(layer: nn.Module, spec: KANLayerSpec, tensor: CoefficientTensor) -> _Form | None:
    """The form that agrees with the layer; in transforms, where nothing can be compared, that found before."""
    known = _layers.get(layer)
    if known is None or known.spec is not spec:
        known = _layers[layer] = _Layer(spec, tensor, {})
    if layer._forward_hooks or layer._forward_pre_hooks:
        return None
    grid = spec.read_grid(layer)
    trained = any(isinstance(value, Tensor) and value.requires_grad for value in grid.values())
    state = (tensor.get_parameter(layer).dtype, trained, *_state_of(layer))
    compared, form = known.forms.get(state, ({}, None))
    if in_transform() or (state in known.forms and same_grid(compared, grid)):
        return form
    copied = {name: v.detach().clone() if isinstance(v, Tensor) else v for name, v in grid.items()}
    found = next((form for form in _forms(layer, spec, copied, trained) if _agrees(form, layer, spec, tensor)), None)
    found = None if found is None else found._replace(reads=_read_by_functions(found, layer, spec, tensor))
    if len(known.forms) > 8:  # states that come and go
        known.forms.clear()
    known.forms[state] = copied, found
    return found


def _state_of(module: nn.Module) -> State:
    """What a forward pass may depend on besides tensors, as far as it can be compared."""
    plain = tuple((name, v) for name, v in vars(module).items() if isinstance(v, (bool, int, float, str, type(None))))
    return plain, tuple(map(id, module._modules.values())), id(vars(module).get("forward"))


def _forms(layer: Any, spec: KANLayerSpec, grid: Grid, trained: bool) -> Iterator[_Form]:
    """Those to try; a grid that is trained has a gradient for each of its knots, and not for its ends alone."""
    x = torch.linspace(-3, 3, 13, dtype=_dtype_of(layer), device=_device_of(layer))
    with torch.no_grad():
        try:
            with_silu = spec.activation is not None and torch.equal(spec.activation(layer, x.clone()), F.silu(x))
        except Exception:  # a user's function
            with_silu = False
    if spec.splines is not None and not trained:
        yield _Form(grid, True, with_silu)
    if spec.derivatives is not None:
        yield _Form(grid, False, with_silu)


def _dtype_of(layer: nn.Module) -> torch.dtype:
    return next((p.dtype for p in layer.parameters() if p.is_floating_point()), torch.float32)


def _agrees(form: _Form, layer: nn.Module, spec: KANLayerSpec, tensor: CoefficientTensor) -> bool:
    """Compares stage and layer in float64, at random parameters, so that each has its effect."""
    dtype = tensor.get_parameter(layer).dtype
    if dtype not in _TOLERANCES or tensor.get_parameter(layer).is_meta:
        return False
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode(False), torch.no_grad():
        exchanged = _in_float64(layer)
        for name, value in layer.named_parameters():
            if name in exchanged and name not in spec.grid:
                noise = torch.randn(value.shape, generator=generator, dtype=torch.float64, device="cpu")
                exchanged[name] += noise.to(value.device) * max(0.1, exchanged[name].std(correction=0).item())
        x = _points(spec, layer, tensor.shape[1], generator)

        def compare() -> bool:
            directions = torch.randn(2, x.shape[1], generator=generator, dtype=torch.float64, device="cpu").to(x)
            expected = jet_by_transforms(layer, x, directions, None)
            found = evaluate_layer(_stage(form, layer, spec, tensor), x, directions[:, None], None, None)
            agree = all(map(_is_close, found, expected, _TOLERANCES[dtype]))
            return agree and (form.on_uniform_grid or _third_derivatives_agree(spec, layer, x))

        try:
            return call_with_parameters(layer, exchanged, compare, (), {})
        except Exception:  # foreign code, which may raise anything
            return False


def _in_float64(layer: nn.Module) -> dict[str, Tensor]:
    """Copies of the floating point tensors of a layer, by name."""
    named = (*layer.named_parameters(), *layer.named_buffers())
    return {name: value.detach().clone().double() for name, value in named if value.is_floating_point()}


def _read_by_functions(
    form: _Form, layer: nn.Module, spec: KANLayerSpec, tensor: CoefficientTensor
) -> tuple[str, ...]:
    """The names of the tensors of a layer that its functions have a gradient towards."""
    with torch.inference_mode(False), torch.enable_grad():
        copies = {name: value.requires_grad_() for name, value in _in_float64(layer).items()}
        x = _points(spec, layer, tensor.shape[1], torch.Generator().manual_seed(0))

        def values() -> list[Tensor]:
            bases = [branch.basis for branch in _stage(form, layer, spec, tensor).branches]
            found = [basis.derivatives(x, 0)[0].sum() for basis in bases if isinstance(basis, FunctionBasis)]
            return [part for part in found if part.requires_grad]

        found = call_with_parameters(layer, copies, values, (), {})
        if not found:
            return ()
        gradients = torch.autograd.grad(found, list(copies.values()), allow_unused=True)
    return tuple(name for name, gradient in zip(copies, gradients, strict=True) if gradient is not None)


def _is_close(found: Tensor, expected: Tensor, tolerance: float) -> bool:
    return found.shape == expected.shape and bool(
        (found - expected).abs().max() <= tolerance * expected.abs().max().clamp(min=1e-3)
    )


def _third_derivatives_agree(spec: KANLayerSpec, layer: nn.Module, x: Tensor) -> bool:
    """Whether the third derivatives, which gradients need, are those of the second ones."""
    assert spec.derivatives is not None
    with torch.enable_grad():
        point = x.detach().requires_grad_()
        *_, second, third = spec.derivatives(layer, point, 3)
        if not second.requires_grad:
            return not third.any()
        for k in range(second.shape[-1]):
            (slope,) = torch.autograd.grad(second[..., k].sum(), point, retain_graph=True, materialize_grads=True)
            if not _is_close(third[..., k], slope, 1e-9):
                return False
    return True


def _points(spec: KANLayerSpec, layer: nn.Module, width: int, generator: torch.Generator) -> Tensor:
    """Points (rows, in) over the grid, and somewhat beyond."""
    grids = [v.double() for v in spec.read_grid(layer).values() if isinstance(v, Tensor) and v.numel() > 1]
    low = min((grid.min().item() for grid in grids), default=-2.0)
    high = max((grid.max().item() for grid in grids), default=2.0)
    share = torch.rand(_ROWS, width, generator=generator, dtype=torch.float64, device="cpu") * 1.1 - 0.05
    return (low + (high - low) * share).to(_device_of(layer))


def _few_points(width: int, network: nn.Module) -> Tensor:
    x = torch.rand(3, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64, device="cpu")
    return x.to(_device_of(network), _dtype_of(network))


def _device_of(layer: nn.Module) -> torch.device:
    return next((p.device for p in layer.parameters()), torch.device("cpu"))


# Whether a network is the composition of its layers


def _network_stages(network: nn.Module) -> list[Stage] | None:
    if not network._modules:
        return None
    kept, units = _networks.get(network, ((), None))
    if not in_transform():
        families = tuple(map(id, REGISTERED.values()))
        state = families, *((id(part), part.training, *_state_of(part)) for part in network.modules())
        if state != kept:
            units = _trace(network)
            _networks[network] = state, units
    return _join(stages_of(unit) for unit in units or ())


def _join(parts: Iterable[list[Stage] | None]) -> list[Stage] | None:
    found = list(parts)
    return None if not found or None in found else [stage for stages in found for stage in stages or ()]


def _pykan_stages(network: Any) -> list[Stage] | None:
    """The stages of pykan's MultKAN without products of nodes or symbolic functions: an affine map follows each layer.

    It is compared with the network for each state of its switches.
    """
    depth, widths = network.depth, network.width
    with torch.no_grad():
        symbolic = network.symbolic_enabled and any(bool(part.mask.any()) for part in network.symbolic_fun)
    if symbolic or any(not isinstance(width, int) and len(width) > 1 and width[1] for width in widths):
        return None
    stages = _join(stages_of(layer) for layer in list(network.act_fun)[:depth])
    if stages is None or len(stages) != depth or not all(stage.branches for stage in stages):
        return None
    found = []
    for depth, stage in enumerate(stages):
        scale = network.node_scale[depth] * network.subnode_scale[depth]
        bias = network.node_scale[depth] * network.subnode_bias[depth] + network.node_bias[depth]
        branches = [part._replace(weight=part.weight * scale[:, None, None]) for part in stage.branches]
        found.append(stage._replace(branches=tuple(branches), bias=bias))
    if in_transform():
        return None if _networks.get(network, ((), None))[1] is None else found
    state = (tuple(network.input_id.tolist()), network.symbolic_enabled, str(widths), *map(id, network.act_fun))
    kept, units = _networks.get(network, ((), None))
    if state != kept:
        x = _few_points(found[0].branches[0].weight.shape[1], network)
        with torch.inference_mode(False), torch.no_grad(), attributes_kept(network, of_transforms=False):
            zero = x.new_zeros(1, 1, x.shape[1])
            jets = x, zero, None
            for stage in found:
                jets = evaluate_layer(stage, *jets, None)
            expected = network(x)
        units = [] if _is_close(jets[0], expected, 1e-4) else None
        _networks[network] = state, units
    return None if units is None else found


def _units(module: nn.Module) -> Iterator[nn.Module]:
    """The parts of a network that are stages, outermost first."""
    for child in module.children():
        if is_known(child) or is_norm(child) or _known_layer(child) is not None:
            yield child
        else:
            yield from _units(child)


def _trace(network: nn.Module) -> list[nn.Module] | None:
    """The parts that run one after the other, each on the output of the one before, itself; None for anything else."""
    units = list(dict.fromkeys(_units(network)))
    stages = [stage for unit in units for stage in stages_of(unit) or ()]
    if not any(stage.is_kan for stage in stages):
        return None
    events: list[tuple[nn.Module, Any, Any]] = []

    def record(module: nn.Module, args: tuple, output: Any) -> None:
        events.append((module, args[0] if len(args) == 1 else None, output))

    width = next(size for stage in stages if (size := stage.in_features) is not None)
    with torch.inference_mode(False), torch.no_grad(), attributes_kept(network, of_transforms=False):
        x = _few_points(width, network)
        handles = [unit.register_forward_hook(record) for unit in units]
        try:
            output = network(x)
        except Exception:  # foreign code: another width, or more arguments
            return None
        finally:
            for handle in handles:
                handle.remove()
    last: Any = x
    for _, given, returned in events:
        if not _is_same(given, last):
            return None
        last = returned[0] if isinstance(returned, tuple) else returned  # of a layer of pykan
    return [module for module, _, _ in events] if events and _is_same(output, last) else None


def _is_same(tensor: Any, other: Any) -> bool:
    """Whether two tensors are one, or views of all of the same memory."""
    return tensor is other or (
        isinstance(tensor, Tensor)
        and isinstance(other, Tensor)
        and tensor.shape == other.shape
        and tensor.stride() == other.stride()
        and tensor.data_ptr() == other.data_ptr()
        and tensor.dtype == other.dtype
    )
