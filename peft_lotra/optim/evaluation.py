# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""The evaluation of a residual function, also of one that differentiates by `torch.autograd.grad` itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch._functorch.eager_transforms import enable_inplace_requires_grad

from ..derivatives.torch_fallback import ExactNorms


# What torch says if a tensor cannot be differentiated, and if a function cannot run by `torch.func.vmap`.
_NOT_RECORDED = ("does not require grad", "not have been used in the graph")
_NOT_BY_ROWS = ("vmap", "functorch", "torch.func", "BatchedTensor")


class _Mode(ExactNorms):
    """Keeps the graphs of derivatives that a residual function takes, by which residuals depend on parameters."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.autograd.grad:
            kwargs = {**(kwargs or {}), "create_graph": True}
        elif func is torch.Tensor.backward:
            raise _Backward()
        return super().__torch_function__(func, types, args, kwargs)


class _Backward(Exception):
    """A residual function called `backward`."""


@contextmanager
def evaluating(name: Callable[[], str]) -> Iterator[None]:
    """Lets a residual function, of that name, differentiate in its rows as it would outside of an optimizer.

    Raises:
        ValueError: The function differentiates what was not recorded, calls `backward`, or cannot run by rows; the
            message says which lines to change to what.
    """
    try:
        with torch.enable_grad(), enable_inplace_requires_grad(True), _Mode():
            yield
    except _Backward:
        raise ValueError(
            f"{name()} calls `backward`, which returns no derivatives. Replace `u.sum().backward()` and `x.grad` by "
            "`(u_x,) = torch.autograd.grad(u.sum(), x)`, or all of it by `u, du, d2u = jet(model, x)`."
        ) from None
    except RuntimeError as error:
        if any(text in str(error) for text in _NOT_RECORDED):
            raise ValueError(
                f"{name()} differentiates a tensor that was not recorded: {error} Call `x.requires_grad_()` before "
                "`u = model(x)`, or give rows that require a gradient, or replace the lines with "
                "`torch.autograd.grad` by `u, du, d2u = jet(model, x)`."
            ) from error
        if any(text in str(error) for text in _NOT_BY_ROWS):
            raise ValueError(
                f"{name()} cannot be evaluated row by row, as it must for a model that is no chain of KAN layers: "
                f"{error} Replace `if` of tensors by `torch.where`, `.item()` by the tensor, writing into a tensor by "
                "a new tensor, and derivatives by `jet(model, x)`."
            ) from error
        raise


def without_modes(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Calls a function of this package within `evaluating` as outside of it."""
    with torch._C.DisableTorchFunction():
        return function(*args, **kwargs)
