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

"""Derivatives of a KAN with respect to its inputs, pushed through the layers together with the value (jets)."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..layer import KANLinear
from ..layer_records import active_recorder
from ..network import KAN
from ..slim_kan import SlimKANLinear
from .layers import Parts, block_size, own_layer, through_layer
from .norms import check_rows_apart, is_norm, norm_size, through_norm


_told_about: set[type] = set()


def jet(
    model: nn.Module, x: Tensor, directions: Tensor | None = None, *, collapse: bool | Sequence[float] = False
) -> tuple[Tensor, Tensor, Tensor]:
    r"""
    The value of a KAN and its first and second derivatives along straight lines, in one forward pass.

    With u(t) = model(x + t v) for each direction v, each layer takes (u, u', u'') to that of its output by

        y = A b(z),   y' = A [b'(z) z'],   y'' = A [b''(z) z'^2 + b'(z) z''],

    b being the basis functions and the residual function, whose derivatives are known in closed form: no graph is
    built in order to be differentiated, and one matrix product serves all 1 + 2 D streams. The result can itself be
    differentiated, in parameters and inputs, and runs under `torch.func` and `torch.compile(fullgraph=True)`.

    Fast for `KAN`, `KANModel`, `SlimKAN`, single layers, `nn.Sequential` of them, normalisations between them
    (`nn.LayerNorm` of the last dimension, batch normalisation in evaluation mode), and what PEFT makes of these, by
    LoTRA or by LoRA on `target_parameters`: with the adapters that are in force (active and not disabled, or merged),
    without their dropout. Other networks with KAN layers (pykan, efficient-kan, a class of your own around a `KAN`,
    modules with hooks) are differentiated by nested `torch.func.jvp`, which a warning says once for each class.

    Args:
        model: maps (..., I) to (..., O), each row by itself.
        x: points, shape (..., I), usually (N, I).
        directions: the D directions v, shape (D, I); by default the I coordinate axes. They need not have length 1:
            derivatives are in the parameter t.
        collapse: whether to return the sum of the second derivatives over the directions in their place. Then only
            that sum travels, 2 + D streams (collapsed Taylor mode, arXiv 2505.13644). D numbers make it a weighted
            sum: (1, 0) for u_xx and no u_tt.

    Returns:
        u (..., O), du (D, ..., O) and d2u (D, ..., O), or (..., O) with `collapse`.

    Raises:
        ValueError: `x`, `directions` or `collapse` has a wrong shape, or batch normalisation in training mode makes
            each row depend on the others.
        TypeError: `model` has no KAN layer, or `x` is not floating point.

    Source: Taylor-mode differentiation, A. Griewank and A. Walther, "Evaluating Derivatives" (2008), chapter 13.

    Example:

    ```py
    >>> u, du, d2u = jet(model, torch.rand(1000, 2))  # d2u[0] is d^2 u / d x_0^2
    ```
    """
    return _jet(model, x, directions, collapse)


def _jet(
    model: nn.Module,
    x: Tensor,
    directions: Tensor | None,
    collapse: bool | Sequence[float],
    only_second: bool = False,
) -> Parts:
    """As `jet`; with `only_second`, u and du may be None."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise TypeError(f"`x` must be a floating point tensor, but is {getattr(x, 'dtype', type(x).__name__)}.")
    layers = find_chain(model)
    if layers is None or not any(map(_is_layer, layers)):
        layers = None
        check_rows_apart(model)
        _check_kan(model)
    expected = "the model's number of inputs"
    if layers:
        expected = own_layer(layers[0]).in_features if _is_layer(layers[0]) else norm_size(layers[0])
    if x.dim() == 0 or (layers and x.shape[-1] != expected):
        raise ValueError(f"`x` has shape {tuple(x.shape)}, but its last dimension must be {expected}.")
    if directions is None:
        directions = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
    if directions.dim() != 2 or directions.shape[1] != x.shape[-1] or len(directions) == 0:
        raise ValueError(
            f"`directions` has shape {tuple(directions.shape)}, but must be (D, {x.shape[-1]}): one direction in the "
            "space of inputs in each row, at least one."
        )
    directions = directions.to(x)
    weights = None
    if collapse is not False:
        weights = torch.as_tensor([1.0] * len(directions) if collapse is True else collapse).to(x)
        if weights.shape != (len(directions),):
            raise ValueError(f"`collapse` has {weights.numel()} weights, but there are {len(directions)} directions.")
    if layers is None:
        return _jet_by_transforms(model, x, directions, weights)

    recorder = active_recorder()
    if recorder is not None and recorder.takes(x, directions, weights):
        return recorder.chain(lambda *inputs: _through(layers, *inputs, only_second), x, directions, weights)
    size = block_size(x, [layer for layer in layers if _is_layer(layer)], len(directions))
    if size is None:
        return _through(layers, x, directions, weights, only_second)
    blocks = [_through(layers, block, directions, weights, only_second) for block in x.split(size)]
    return tuple(None if parts[0] is None else torch.cat(parts, dim=-2) for parts in zip(*blocks, strict=True))


def _through(
    layers: list[nn.Module], x: Tensor, directions: Tensor, weights: Tensor | None, only_second: bool
) -> Parts:
    first = directions.reshape(-1, *[1] * (x.dim() - 1), x.shape[-1])
    second = None  # straight lines
    for left, layer in zip(range(len(layers), 0, -1), layers, strict=True):
        if _is_layer(layer):
            x, first, second = through_layer(layer, x, first, second, weights, only_second and left == 1)
        else:
            x, first, second = through_norm(layer, x, first, second, weights)
    return x, first, second if weights is None else second[0]


def recorded_value(model: nn.Module, x: Tensor) -> Tensor | None:
    """The value of a KAN, recorded; None where it is not (see `layer_records.py`), draws dropout, or has hooks or a
    `forward` put on a module, which a forward pass runs, unlike a jet."""
    recorder, layers = active_recorder(), find_chain(model)
    if layers is None or not recorder.takes(x) or torch.nn.modules.module._has_any_global_hook():
        return None
    for part in model.modules():
        changed = part._forward_hooks or part._forward_pre_hooks or "forward" in part.__dict__
        if changed or getattr(part, "is_random", False):
            return None
    no_directions = x.new_empty(0, x.shape[-1])
    return recorder.chain(lambda *inputs: _through(layers, *inputs, False), x, no_directions, None)[0]


def laplacian(model: nn.Module, x: Tensor) -> Tensor:
    """
    The sum of the second derivatives of `model` along the coordinate axes: (..., I) to (..., O).

    Value, gradient and Laplacian together are `jet(model, x, collapse=True)`, of which this is the last part.

    Raises:
        ValueError, TypeError: as `jet`.
    """
    return _jet(model, x, None, True, only_second=True)[2]


def hessian(model: nn.Module, x: Tensor, directions: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """
    As `jet`, with all mixed second derivatives, by polarisation: 2 u_vw = D^2_{v+w} u - D^2_v u - D^2_w u.

    Args:
        model, x, directions: as for `jet`. It costs a jet of D (D + 1) / 2 directions.

    Returns:
        u (..., O), du (D, ..., O) and d2u (D, D, ..., O), which is symmetric; d2u[a, b] is the second derivative along
        directions a and b.

    Raises:
        ValueError, TypeError: as `jet`.
    """
    if directions is None:
        directions = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
    if directions.dim() != 2:
        return jet(model, x, directions)  # which raises
    count = len(directions)
    pairs = [(a, b) for a in range(count) for b in range(a)]
    sums = [directions[a] + directions[b] for a, b in pairs]
    u, du, d2u = jet(model, x, torch.stack([*directions, *sums]) if count else directions)
    mixed = {(a, a): d2u[a] for a in range(count)}
    for (a, b), value in zip(pairs, d2u[count:], strict=True):
        mixed[a, b] = mixed[b, a] = (value - d2u[a] - d2u[b]) / 2
    full = torch.stack([mixed[a, b] for a in range(count) for b in range(count)])
    return u, du[:count], full.unflatten(0, (count, count))


# The layers of a network


def find_chain(model: nn.Module) -> list[nn.Module] | None:
    """The KAN layers, adapted or not, and normalisations that `model` is the composition of; None if it is not known
    to be one."""
    if model._forward_hooks or model._forward_pre_hooks:
        return None
    if _is_layer(model) or is_norm(model):
        return [model]
    if type(model) is nn.Sequential:
        parts = list(model)
    elif type(model).forward is KAN.forward:  # SlimKAN's too
        parts = list(model.layers)
    else:
        inner = _inner(model)
        return None if inner is None else find_chain(inner)
    chains = [find_chain(part) for part in parts]
    if not chains or any(chain is None for chain in chains):
        return None
    return [layer for chain in chains for layer in chain]


def _is_layer(module: nn.Module) -> bool:
    wrapper = module
    while isinstance(wrapper._modules.get("base_layer"), nn.Module):
        if not (hasattr(wrapper, "updates_in_force") or hasattr(wrapper, "parameter_name")):
            return False
        wrapper = wrapper.base_layer
    return type(own_layer(module)).forward in (KANLinear.forward, SlimKANLinear.forward)


def _inner(module: nn.Module) -> nn.Module | None:
    """The module that a wrapper passes its input to, and whose output it returns; None if it is no such wrapper."""
    if hasattr(module, "get_base_model"):  # PeftModel
        return module.get_base_model()
    if hasattr(module, "tuner_layer_cls"):  # LoTRAModel and other tuners
        return module.model
    if isinstance(getattr(module, "modules_to_save", None), nn.ModuleDict):  # PEFT's ModulesToSaveWrapper
        active = [] if module.disable_adapters else [n for n in module.active_adapters if n in module.modules_to_save]
        return module.modules_to_save[active[0]] if active else module.original_module
    if isinstance(module, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
        return module.module
    if isinstance(module, torch._dynamo.OptimizedModule):
        return module._orig_mod
    transformers_side = sys.modules.get("peft_lotra.kan.modeling_kan")  # not imported just to ask
    if transformers_side is not None and type(module).forward is transformers_side.KANModel.forward:
        return module.kan
    return None


# Other networks


def _check_kan(model: nn.Module) -> None:
    from ...families.registry import find_kan_layers, known_families

    if not find_kan_layers(model):
        raise TypeError(
            f"`model` is a {type(model).__name__} without any KAN layer that is known (families: "
            f"{', '.join(known_families())}). Differentiate it by torch.func, or describe its layers by "
            "`register_kan_layer`."
        )
    if type(model) not in _told_about:
        _told_about.add(type(model))
        warnings.warn(
            f"`jet` knows no closed form for a {type(model).__name__}, and differentiates it by nested "
            "`torch.func.jvp`, which is exact but slower.",
            stacklevel=4,
        )


def _jet_by_transforms(
    model: nn.Module, x: Tensor, directions: Tensor, weights: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    def value(point: Tensor) -> Tensor:
        output = model(point)
        return getattr(output, "logits", output)

    def along(point: Tensor, direction: Tensor) -> tuple[Tensor, Tensor]:
        return torch.func.jvp(value, (point,), (direction.expand_as(point),))

    parts = []
    for direction in directions:
        (u, du), (_, d2u) = torch.func.jvp(
            lambda point, direction=direction: along(point, direction), (x,), (direction.expand_as(x),)
        )
        parts.append((du, d2u))
    first, second = (torch.stack(part) for part in zip(*parts, strict=True))
    return u, first, second if weights is None else torch.tensordot(weights, second, 1)
