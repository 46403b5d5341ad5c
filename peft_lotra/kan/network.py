# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""A Kolmogorov-Arnold network as a stack of layers."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import PyTorchModelHubMixin, hf_hub_download
from huggingface_hub.constants import SAFETENSORS_SINGLE_FILE
from safetensors.torch import load_model
from torch import Tensor, nn

from ..modules.checks import check_count
from .input_map import TanhBound
from .layer import KANLinear, SplineLayer
from .recording_hook import current_hook


Norm = Literal["batch", "layer", "tanh"] | None


class LayerStack(nn.Module, PyTorchModelHubMixin, library_name="peft-lotra", tags=["kan"]):
    """The composition of its `layers`, an `nn.ModuleList`; entries between KAN layers are normalizations or bounds."""

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        """Compute the outputs (..., widths[-1]) for inputs (..., widths[0]). Raise as `KANLinear.forward`."""
        hook = current_hook()
        y = None if hook is None else hook.value(self, x)
        if y is not None:
            return y
        for layer in self.layers:
            x = layer(x)
        return x

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> str | None:
        """Save the weights, and the arguments that build a network of the same sizes, ranks, grids and norms.

        Args:
            save_directory: The folder, which is made if there is none.
            kwargs: As for `huggingface_hub.PyTorchModelHubMixin`.

        Raises:
            ValueError: No arguments build such layers: their grids differ in size, or they have adapters.
        """
        arguments = arguments_of(type(self), list(self.layers))
        if arguments is None:
            raise ValueError(
                f"No arguments of `{type(self).__name__}` build these layers: they have adapters, or several grid "
                "sizes. Merge or unload adapters; other networks are saved by `safetensors.torch.save_model`."
            )
        dtype = str(next(self.parameters()).dtype).removeprefix("torch.")
        # `push_to_hub` passes a config, too, with the arguments that the network was built with
        return super().save_pretrained(save_directory, **{**kwargs, "config": {**arguments, "dtype": dtype}})

    @classmethod
    def _from_pretrained(
        cls: Any,
        *,
        model_id: str,
        dtype: str | torch.dtype | None = None,
        **kwargs: Any,
    ) -> Any:
        """Build the network and load its weights: safetensors only, all of them, of the dtype of the file."""
        names = inspect.signature(cls.__init__).parameters
        arguments = {name: kwargs.pop(name) for name in names if name in kwargs}
        path = Path(model_id, SAFETENSORS_SINGLE_FILE)
        if not path.parent.is_dir():
            path = hf_hub_download(model_id, SAFETENSORS_SINGLE_FILE, **kwargs)
        if isinstance(dtype, str):
            dtype = getattr(torch, dtype)
        model = cls(dtype=dtype, **arguments)
        load_model(model, path)
        model.name_or_path = model_id  # by which adapters know their base
        return model.eval()


class KAN(LayerStack):
    """A Kolmogorov-Arnold network of B-splines: a stack of `KANLinear` layers.

    Activations start with about the same variance at each depth.

    Args:
        widths: Sizes of the input, of each hidden layer and of the output; at least two.
        grid_size, spline_order, grid_range, device, dtype: As for `KANLinear`, the same in each layer.
        norm: "batch" or "layer" puts a normalization between the layers, whose outputs start with the mean and the
            variance of the uniform law on `grid_range`; "tanh" puts a `TanhBound` there, so that no activation leaves
            the grids.

    Attributes:
        layers: The layers, an `nn.ModuleList`, with the normalizations between them.

    Raises:
        ValueError: `widths` are fewer than two or not positive integers, or an argument that `KANLinear` refuses.

    Source: Liu et al., "KAN: Kolmogorov-Arnold Networks", arXiv 2404.19756, eq. (2.7).

    Example:
        >>> import torch
        >>> from peft_lotra.kan import KAN
        >>> KAN([2, 5, 1])(torch.rand(10, 2)).shape
        torch.Size([10, 1])
    """

    def __init__(
        self,
        widths: Sequence[int],
        grid_size: int = 5,
        spline_order: int = 3,
        grid_range: tuple[float, float] = (-1, 1),
        norm: Norm = None,
        device=None,
        dtype=None,
    ) -> None:
        arguments = (grid_size, spline_order, grid_range, device, dtype)
        layers = [KANLinear(n_in, n_out, *arguments) for n_in, n_out in pairs(widths)]
        super().__init__(with_norms(layers, norm, device, dtype))

    @torch.no_grad()
    def update_grid(self, x: Tensor, margin: float = 0.01) -> None:
        """Move the grids of all layers to the samples that reach them, first layer first, and keep the function.

        Args:
            x: Samples of the network's input, shape (..., widths[0]).
            margin: As in `KANLinear.update_grid`.

        Raises:
            ValueError: As `KANLinear.update_grid`, for the inputs of any layer. All layers are as before then.
        """
        moved = copy.deepcopy(self.layers)
        for layer in moved:
            if hasattr(layer, "update_grid"):  # not normalizations and Slim layers; adapted layers refuse
                layer.update_grid(x, margin)  # pyright: ignore[reportCallIssue] (torch declares Tensor | Module)
            x = layer(x)
        # not of batch norms: the samples have moved the running statistics of the copies
        for layer, moved_layer in zip(self.layers, moved, strict=True):
            if hasattr(layer, "update_grid"):
                layer.load_state_dict(moved_layer.state_dict())


class BatchNorm(nn.BatchNorm1d):
    """`nn.BatchNorm1d` of the last dimension, whatever the leading ones."""

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        return super().forward(rows).view_as(x)


NORMS: dict[str, Any] = {"batch": BatchNorm, "layer": nn.LayerNorm, "tanh": TanhBound}


def arguments_of(cls: Any, layers: Sequence[nn.Module]) -> dict[str, Any] | None:
    """Return the arguments of a class of KANs that build such layers; None if no arguments do."""
    splines = [layer for layer in layers if isinstance(layer, SplineLayer)]
    if not splines:
        return None
    first = splines[0]
    arguments: dict[str, Any] = {
        "widths": [first.in_features, *(layer.out_features for layer in splines)],
        "grid_size": first.grid_size,
        "spline_order": first.spline_order,
        "grid_range": first.grid_range,
        "norm": None,
    }
    for norm, kind in NORMS.items():
        if any(type(layer) is kind for layer in layers):
            arguments["norm"] = norm
    components = [getattr(layer, "components", None) for layer in splines]
    if any(components):
        arguments["ranks"] = [tucker and tucker.form for tucker in components]
    try:
        built = cls(**arguments, device="meta")
    except TypeError:
        return None
    return arguments if repr(built.layers) == repr(nn.ModuleList(layers)) else None


def pairs(widths: Sequence[int]) -> list[tuple[int, int]]:
    """Return (in, out) of each layer; raise a `ValueError` unless `widths` are at least two positive integers."""
    try:
        sizes = [check_count(width, "widths") for width in widths]
    except (TypeError, ValueError):
        sizes = []
    if len(sizes) < 2:
        raise ValueError(
            f"`widths` is {widths!r:.100}, but must be the sizes of all layers, positive integers such as [2, 16, 1]."
        )
    return list(pairwise(sizes))


def with_norms(
    layers: Sequence[Any],
    norm: Norm,
    device=None,
    dtype=None,
) -> list[nn.Module]:
    """Put a normalization after each layer but the last; raise a `ValueError` for an unknown `norm`."""
    if norm is not None and norm not in NORMS:
        raise ValueError(f"`norm` is {norm!r}, but must be None, 'batch', 'layer' or 'tanh'.")
    if norm is None:
        return list(layers)

    modules: list[nn.Module] = []
    for layer in layers:
        modules.append(layer)
        low, high = layer.grid_range
        if norm == "tanh":
            modules.append(TanhBound(layer.out_features, low, high))
            continue
        module = NORMS[norm](layer.out_features, device=device, dtype=dtype)
        # the mean and the deviation of the uniform law on the grid
        nn.init.constant_(module.weight, (high - low) / math.sqrt(12))
        nn.init.constant_(module.bias, (low + high) / 2)
        modules.append(module)
    return modules[:-1]


def is_norm(module: nn.Module) -> bool:
    """Return whether a module normalizes the last dimension of each row independently of the other rows."""
    if type(module) is nn.LayerNorm:
        return len(module.normalized_shape) == 1
    if type(module) in (BatchNorm, nn.BatchNorm1d):
        return not module.training and bool(module.track_running_stats)
    return False
