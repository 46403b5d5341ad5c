# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""A network plus a linear function of its inputs, which adapters save and train next to their updates."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn
from torch.nn import functional as F

from ..layers.search import walk_kan_layers
from ..modules.calls import check_module, evaluating_without_trace, is_tracing
from ..modules.checks import check_count
from .by_row import FORWARD_PASS, MixedBatch, run_by_adapter


PATH = "linear_path"  # the name in `LinearPath`, by which `modules_to_save` finds it


class _Path(nn.Module):
    """The numbers of a path: scale, W (out, in) and b (out,)."""

    def __init__(self, in_features: int, out_features: int, like: Tensor) -> None:
        super().__init__()
        self.scale = nn.Parameter(like.new_ones(()))
        self.weight = nn.Parameter(like.new_zeros(out_features, in_features))
        self.bias = nn.Parameter(like.new_zeros(out_features))

    @torch.no_grad()
    def set(self, scale: float, weight: Tensor, bias: Tensor) -> None:
        """Give the path these values. They stay while adapters are trained, since they require no gradient."""
        self.scale.fill_(scale)
        self.weight.copy_(weight)
        self.bias.copy_(bias)
        self.requires_grad_(False)

    def values(self) -> Tensor:
        """Return W, b and scale as one vector."""
        values = [self.weight.flatten(), self.bias, self.scale.view(1)]
        return torch.cat(values).detach()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.scale * y + F.linear(x, self.weight, self.bias)


class LinearPath(nn.Module):
    r"""A network plus a linear function of its inputs:

        y(x) = scale * network(x) + W x + b,    scale = 1, W = 0, b = 0 at first.

    KANs carry linear parts of a new task badly, and the path carries them. A new path changes no output. [`fit_path`]
    finds scale, W and b in closed form.

    Adapters need no further setting: the path is in `modules_to_save` of each new [`LoTRAConfig`]. So each adapter has
    a path of its own. It trains with the adapter, unless [`fit_path`] has fitted it in the adapted model. It is saved,
    loaded, exchanged by [`hotswap_adapter`], and chosen row by row by `adapter_names`. `merge_and_unload` returns a
    `LinearPath` of the merged network. `unload` returns the former one.
    `add_weighted_adapter` sums changes: W, b and scale become those of the base plus the sum of
    weight * (adapter - base). `storage="float16"` rounds the components only. The path keeps its dtype in a file,
    since W x and b may cancel.

    Args:
        network: The network. It maps one tensor (batch, ..., in) to one tensor (batch, ..., out), row by row. Images
            must be flattened: `LinearPath(nn.Sequential(nn.Unflatten(-1, (3, 8, 8)), network), 192, 10)`.
        in_features, out_features: The sizes in and out. By default the inputs of the first layer, and the outputs of
            a trial.

    Attributes:
        network: The network.
        linear_path: The path of the base. In an adapted model, PEFT's wrapper around the paths of all adapters.

    Raises:
        TypeError: `network` is no module.
        ValueError: The sizes cannot be found. In the forward pass: the input or the output has another shape.

    Example:
        >>> from peft import get_peft_model
        >>> from peft_lotra import LinearPath, LoTRAConfig
        >>> from peft_lotra.kan import KAN
        >>> model = get_peft_model(LinearPath(KAN([3, 8, 2])), LoTRAConfig())
        >>> path = model.get_base_model().path  # of the active adapter
        >>> tuple(path.weight.shape), tuple(path.bias.shape), path.scale.item()
        ((2, 3), (2,), 1.0)
        >>> model.peft_config["default"].modules_to_save
        ['linear_path']
    """

    def __init__(
        self,
        network: nn.Module,
        in_features: int | None = None,
        out_features: int | None = None,
    ) -> None:
        super().__init__()
        check_module(network, "network")
        floats = [tensor for tensor in network.parameters() if tensor.is_floating_point()]
        like = floats[0].detach() if floats else torch.empty(0)
        if in_features is None:
            in_features = _find_inputs(network)
        if out_features is None:
            out_features = _find_outputs(network, in_features, like)
        self.in_features = check_count(in_features, "in_features")
        self.out_features = check_count(out_features, "out_features")
        self.network = network
        self.linear_path = _Path(self.in_features, self.out_features, like)

    def forward(self, x: Tensor) -> Tensor:
        """Compute the outputs (batch, ..., out) for inputs (batch, ..., in)."""
        y = self.network(x)
        self.check_shapes(x, y)
        wrapper = self.linear_path
        if isinstance(wrapper, ModulesToSaveWrapper) and not (wrapper.disable_adapters or is_tracing()):
            current = FORWARD_PASS.get()
            if current is not None and current.names:
                return self._run_rows(current.names, x, y)
        return wrapper(x, y)

    @property
    def path(self) -> _Path:
        """The `scale`, `weight` (out, in) and `bias` (out,) in use, of the active adapter or of the base."""
        return active_module(self.linear_path)

    def path_of(self, adapter: str) -> _Path:
        """Return the path of an adapter. An adapter without one has the path of the base."""
        modules: Any = self.linear_path._modules
        copies = modules.get("modules_to_save", {})
        return copies[adapter] if adapter in copies else modules.get("original_module", self.linear_path)

    def _run_rows(self, names: Sequence[str], x: Tensor, y: Tensor) -> Tensor:
        """Add the path of a row's own adapter to each row."""
        if len(names) != len(x):
            raise ValueError(
                f"Length of `adapter_names` should be the same as the number of inputs, but got {len(names)} and "
                f"{len(x)} respectively, in a `LinearPath`. Let it have inputs (batch, ..., in)."
            )

        def run(name: str, args: tuple, kwargs: dict) -> Tensor:
            return self.path_of(name)(*args)

        batch = MixedBatch(len(names), None, lambda: names, lambda: None, run)
        return run_by_adapter(batch, 1, (x, y), {})

    def check_shapes(self, x: Tensor, y: Any) -> None:
        """Raise a ValueError unless x is (batch, ..., in) and y is (batch, ..., out)."""
        shape = tuple(y.shape) if isinstance(y, Tensor) else type(y).__name__
        sizes = (self.in_features, self.out_features)
        if isinstance(y, Tensor) and y.dim() == x.dim() and (x.shape[-1], y.shape[-1]) == sizes:
            return
        count = self.out_features * (x[0].numel() + 1) + 1
        raise ValueError(
            f"`network` maps {tuple(x.shape)} to {shape}, but a path of the sizes {sizes} is for (batch, ..., "
            f"{sizes[0]}) to (batch, ..., {sizes[1]}). Wrap it so that it takes and returns one flat tensor, as by "
            f"`nn.Sequential(nn.Unflatten(-1, {tuple(x.shape[1:])}), network)`, with a path of {count:,} parameters."
        )


def active_module(module: nn.Module) -> Any:
    """Return what a wrapper of `modules_to_save` runs now, or a module that is not wrapped."""
    if not isinstance(module, ModulesToSaveWrapper):
        return module
    if not module.disable_adapters:
        for adapter in module.active_adapters:
            if adapter in module.modules_to_save:
                return module.modules_to_save[adapter]
    return module.original_module


def add_path(network: LinearPath, change: Tensor) -> dict[str, Tensor]:
    """Return the tensors of the base's path plus a change of its `values`, by name."""
    base = network.path_of("__base__")
    values = base.values().to(change) + change
    sizes = [base.weight.numel(), base.bias.numel(), 1]
    weight, bias, scale = values.split(sizes)
    return {
        "weight": weight.view_as(base.weight),
        "bias": bias.clone(),
        "scale": scale.squeeze().clone(),
    }


def linear_paths(model: nn.Module) -> Iterator[LinearPath]:
    """Iterate over the networks with a path in a model."""
    return (module for module in model.modules() if isinstance(module, LinearPath))


def _find_inputs(network: nn.Module) -> int | None:
    """Return the number of inputs of the first layer; None if no layer is known."""
    kan_layers = {layer: spec for _, layer, spec in walk_kan_layers(network)}
    for module in network.modules():
        if module in kan_layers:
            return kan_layers[module].locate(module).shape[1]
        if isinstance(module, nn.Linear):
            return module.in_features
    return None


def _find_outputs(network: nn.Module, in_features: int | None, like: Tensor) -> int:
    """Return the number of outputs, from a trial with zeros (2, in)."""
    problem = "it has no layer whose inputs are known"
    if in_features is not None:
        problem = f"for (2, {in_features}) it returns no tensor (2, out)"
        try:
            with evaluating_without_trace(network):
                y = network(like.new_zeros(2, in_features))
            if y.shape[:-1] == (2,):
                return y.shape[-1]
        except Exception as error:  # any, from the code of users
            problem = f"for (2, {in_features}) it raised {type(error).__name__}: {error}"
    raise ValueError(
        f"`network` must map (batch, ..., in) to (batch, ..., out), but {problem:.300}. Pass `in_features` and "
        "`out_features`, or wrap it so that it takes and returns one flat tensor."
    )
