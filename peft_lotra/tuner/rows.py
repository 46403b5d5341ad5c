# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""What a forward pass carries to all layers: the adapter of each row, and the adapters hotswapped meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.autograd.graph import register_multi_grad_hook
from torch.utils._pytree import tree_leaves

from ..modules.calls import is_tracing
from ..tucker import Tucker


Replaced = dict[tuple[int, str], Tucker]  # the former components, by the id of a layer and adapter


class ForwardPass(NamedTuple):
    """What a forward pass carries to all layers.

    Attributes:
        names: The adapter of each row; None if all rows have the active ones.
        replaced: The components that a hotswap has replaced meanwhile.
        known: The numbers of rows of layers that get several rows for each of the batch, in a known order.
    """

    names: tuple[str, ...] | None
    replaced: Replaced
    known: set[int]


class PassVariable:
    """A value that a forward pass carries to all layers, in each thread its own.

    Layers that a backward pass computes again (gradient checkpointing) get it from `keep`.
    """

    def __init__(self, name: str) -> None:
        self.now: ContextVar[Any] = ContextVar(name, default=None)
        # of the backward pass with this number
        self._again: ContextVar[tuple[int, Any]] = ContextVar(f"{name}_again", default=(-1, None))

    def get(self) -> Any:
        """The value; None outside of a pass."""
        found, (task, kept) = self.now.get(), self._again.get()
        return kept if found is None and task != -1 and task == torch._C._current_graph_task_id() else found

    @contextmanager
    def set(self, value: Any) -> Iterator[None]:
        token = self.now.set(value)
        try:
            yield
        finally:
            self.now.reset(token)

    def keep(self, outputs: Any) -> None:
        """Keeps the value for the backward pass from these outputs, a tensor or a structure of them."""
        tensors = [it for it in tree_leaves(outputs) if isinstance(it, torch.Tensor) and it.requires_grad]
        value = self.now.get()

        def set_again(gradient: torch.Tensor) -> None:
            self._again.set((torch._C._current_graph_task_id(), value))

        if tensors:
            register_multi_grad_hook(tensors, set_again, mode="any")


FORWARD_PASS = PassVariable("lotra_forward_pass")  # a `ForwardPass`, set by `LoTRAModel`


def check_names(names: Any) -> tuple[str, ...]:
    """The names of adapters of rows as a tuple; a ValueError for what is no list of strings."""
    found = None if isinstance(names, (str, bytes)) or not isinstance(names, Iterable) else tuple(names)
    if found is None or not all(issubclass(kind, str) for kind in set(map(type, found))):
        raise ValueError(
            '`adapter_names` must be a list with the name of an adapter for each row, such as `["default"] * len(x)`, '
            f'or "__base__" for none, got {names!r:.100}.'
        )
    return found


def check_batch(count: int, args: tuple, kwargs: dict[str, Any]) -> None:
    """Raise a ValueError unless the inputs of a model have `count` rows, one for each adapter that is named.

    An input has the rows in its first dimension, or in the second of three, as recurrent networks do; there one
    adapter would also fit a single channel. Vectors count only where there is nothing else.
    """
    tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, torch.Tensor) and value.dim()]
    tensors = [tensor for tensor in tensors if tensor.dim() > 1] or tensors
    sizes = [tensor.shape[0] for tensor in tensors]
    sizes += [tensor.shape[1] for tensor in tensors if tensor.dim() == 3 and count != 1]
    if tensors and count not in sizes:
        raise ValueError(
            f"Length of `adapter_names` should be the same as the number of inputs, but got {count} and {sizes[0]} "
            "respectively. Pass an adapter for each row, such as `[name] * len(x)`."
        )


def pass_names(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """A forward pre-hook of PEFT's `modules_to_save` wrappers, which take the names of the rows as an argument."""
    found = None if is_tracing() else FORWARD_PASS.get()
    if found is not None and found.names is not None:
        own: Any = module.modules_to_save  # an adapter without a copy has the base's module
        kwargs = {**kwargs, "adapter_names": [name if name in own else "__base__" for name in found.names]}
    return args, kwargs


def rows_of_each(
    batch: int, names: Callable[[], Sequence[Any]], layer: str, known: set[int], args: tuple, kwargs: dict[str, Any]
) -> int:
    """How many rows a layer gets for each row of the batch; their `names` are read where they matter.

    The order of several is known if they are a view of a contiguous tensor (batch, ..., in), and in the layers behind
    one that gets such a view, by their number. That the first dimension of the input x is the batch is for the caller
    to see to.

    Raises:
        ValueError: The number of rows is another, and their order is not known; or x is transposed, and its first two
            sizes are equal.
    """
    x = args[0] if args else next(iter(kwargs.values()))
    if is_tracing() or not isinstance(x, torch.Tensor) or x.dim() == 0:
        return 1
    if batch == len(x) == 0:
        return 1
    times, rest = divmod(len(x), max(batch, 1))
    if times == 1 and not rest:
        is_square = x.dim() > 2 and x.shape[0] == x.shape[1]
        if is_square and 0 < x.stride(0) < x.stride(1) and len(set(names())) > 1:
            raise ValueError(
                f"The inputs of `{layer}` are a transposed tensor {tuple(x.shape)}: its rows may be in either order. "
                "Pass `x.contiguous()` if the first dimension is that of the batch, else transpose it back."
            )
    elif len(x) not in known:
        whole = x._base  # perhaps of more rows than the batch has
        is_known = len(set(names())) == 1 or (
            whole is not None
            and whole.dim() > 2
            and x.numel() == batch * whole[0].numel()
            and x.is_contiguous()
            and whole.is_contiguous()
        )
        if rest or not is_known:
            raise ValueError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{batch} and {len(x)} respectively, in `{layer}`. Let it have inputs (batch, ..., in), or call "
                "the model for the rows of each adapter."
            )
        known.add(len(x))
    return times


def run_by_name(names: Sequence[Any], run: Callable[[Any, tuple, dict], Any], args: tuple, kwargs: dict) -> Any:
    """Runs the rows of each name by themselves; returns the outputs in the order of the batch."""
    rows: dict[Any, list[int]] = {}
    for place, name in enumerate(names):
        rows.setdefault(name, []).append(place)
    if len(rows) == 1:
        return run(names[0], args, kwargs)

    def pick(value: Any, index: torch.Tensor) -> Any:
        is_batch = isinstance(value, torch.Tensor) and value.dim() and len(value) == len(names)
        return value[index.to(value.device)] if is_batch else value

    results = []
    for name, places in rows.items():
        index = torch.tensor(places, device="cpu")
        picked = {key: pick(value, index) for key, value in kwargs.items()}
        results.append(run(name, tuple(pick(value, index) for value in args), picked))
    order = torch.tensor([place for places in rows.values() for place in places], device="cpu").argsort()
    return _join(results, order)


def _join(results: Sequence[Any], order: torch.Tensor) -> Any:
    """Joins results, or each of their parts (pykan returns four), and puts the rows in order."""
    if isinstance(results[0], tuple):
        return tuple(_join(parts, order) for parts in zip(*results, strict=True))
    joined = torch.cat(list(results))
    per_row = len(joined) // len(order)  # several where a layer flattens the leading dimensions (ChebyKAN)
    rows = joined.unflatten(0, (len(order), per_row))[order.to(joined.device)]
    return rows.flatten(0, 1)
