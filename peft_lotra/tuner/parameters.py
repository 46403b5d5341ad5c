# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Parameters of adapted layers: what they must be, and what PEFT, accelerate and autocast do to them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized


def check_stored(name: str, layer: nn.Module, parameter: str) -> None:
    """Raises a ValueError for a parameter that is computed from others, by a parametrization or a pre-hook.

    The views of FSDP are attributes too, without a pre-hook.
    """
    path, _, leaf = parameter.rpartition(".")
    owner = layer.get_submodule(path)
    if is_parametrized(owner, leaf) or (leaf not in owner._parameters and owner._forward_pre_hooks):
        raise ValueError(
            f"`{parameter}` of `{name}` is computed from other parameters in each forward pass (pruning, "
            "weight_norm), so that an adapter would have no effect. Remove the reparametrization first."
        )


@contextmanager
def gradients_kept(layers: Iterable[Any], adapter: str) -> Iterator[None]:
    """Keeps what requires a gradient: PEFT replaces parameters that it casts by new ones, which do."""
    flags = [(layer, [part.requires_grad for part in layer.get_components(adapter)]) for layer in layers]
    yield
    for layer, before in flags:
        for part, flag in zip(layer.get_components(adapter), before, strict=True):
            part.requires_grad_(flag)


def refuse_grid_change(name: str, *args: Any, **kwargs: Any) -> None:
    """Raises the error of a call that changes what the coefficients mean."""
    raise RuntimeError(
        f"`{name}` would change what the coefficients of the adapters mean. Merge them first (`merge_and_unload()`), "
        "or pass a move of the grid alone to `peft_lotra.refit_adapters(model, inputs, move)`."
    )


@contextmanager
def loaded(layer: nn.Module) -> Iterator[None]:
    """Brings parameters that accelerate has offloaded to their device, and keeps its hooks from doing it again."""
    hooked = [module for module in layer.modules() if "_hf_hook" in vars(module) and module is not layer]
    if not hooked:
        yield
        return
    forwards = {}
    try:
        for module in hooked:
            module._hf_hook.pre_forward(module)  # pyright: ignore
            if "forward" in vars(module):
                forwards[module] = vars(module).pop("forward")
        yield
    finally:
        for module in hooked:
            vars(module).update({"forward": forwards[module]} if module in forwards else {})
            module._hf_hook.post_forward(module, torch.tensor([], device="cpu"))  # pyright: ignore
