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

"""Batches in which each row has an adapter of its own: the rows of each adapter run together."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import torch

from ..functional import call_with_parameters
from ..tucker import reconstruct


if TYPE_CHECKING:
    from .layer import LoTRALayer

# A chunk costs about as much as this many rows, beside its own: it has a copy of the parameters.
_CHUNK_COST = 16
# How many basis functions of how many rows are evaluated in one call. More do not stay in the cache, so that several
# calls are faster than one. A layer of which not even two chunks may share a call runs once for each adapter.
_MAX_BASIS = 2**17
# How many numbers all copies of the parameters may have together.
_MAX_COPIES = 2**24


class RowNames(list):
    """The name of the adapter of each row. The rows are sorted once for all layers that the batch passes through."""

    @cached_property
    def distinct(self) -> list[str]:
        """The names that occur, in the order of their first rows."""
        return list(dict.fromkeys(self))

    @cached_property
    def rows(self) -> tuple[torch.Tensor, ...]:
        """The rows (n,) of each of the distinct names, int64."""
        position = {name: index for index, name in enumerate(self.distinct)}
        names = torch.tensor([position[name] for name in self], dtype=torch.int64)
        return names.argsort(stable=True).split(names.bincount().tolist())

    @cached_property
    def chunks(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The rows in chunks of one length, each of one adapter; a chunk that is too short repeats its last row.

        Returns:
            The name of each chunk (chunks,), as its position in `distinct`; the rows of each chunk (chunks, length);
            and the place of each row of the batch among those of all chunks (batch,).
        """
        counts = torch.tensor([len(rows) for rows in self.rows])
        longest = int(counts.max())
        lengths = {-(-longest // 2**halvings) for halvings in range(longest.bit_length())}
        length = min(lengths, key=lambda length: int((-(-counts // length)).sum()) * (length + _CHUNK_COST))
        chunks, places = [], torch.empty(len(self), dtype=torch.int64)
        for rows in self.rows:
            places[rows] = torch.arange(len(rows)) + len(chunks) * length
            chunks += torch.cat([rows, rows[-1:].expand(-len(rows) % length)]).split(length)
        return torch.arange(len(counts)).repeat_interleave(-(-counts // length)), torch.stack(chunks), places


def mixed_batch_forward(layer: LoTRALayer, args: tuple, kwargs: dict[str, Any], names: RowNames) -> Any:
    """Runs a layer on a batch whose rows have adapters of their own.

    The cost grows with the adapters in the batch, not with those that are loaded. Small layers run on all rows at
    once, by `torch.vmap` over copies of their parameters; the others run once for each adapter.

    Args:
        layer (`LoTRALayer`): The layer.
        args, kwargs: What the layer is called with; tensors whose first dimension is the batch are split.
        names (`RowNames`): The adapter of each row. Rows of adapters that the layer does not have, such as
            "__base__", get the base layer.

    Returns:
        What the layer returns, its rows in the order of the batch.
    """
    here = [name if name in layer.lotra_core else None for name in names.distinct]
    if len(set(here)) <= 1:
        return layer._adapted_forward([name for name in here[:1] if name is not None], args, kwargs)
    size = sum(attrgetter(name)(layer.base_layer).numel() for name in layer.lotra_tensor.parameters)
    chunks, length = names.chunks[1].shape
    at_once = _MAX_BASIS * layer.out_features // (size * length)
    if at_once >= 2 and size * chunks <= _MAX_COPIES:
        try:
            return _run_together(layer, args, kwargs, here, names, at_once)
        except RuntimeError:
            pass  # torch.vmap does not go through every layer. Whatever else it was is raised again below.
    return _run_one_by_one(layer, args, kwargs, here, names)


def _run_together(
    layer: LoTRALayer, args: tuple, kwargs: dict, here: list[str | None], names: RowNames, at_once: int
) -> Any:
    """Runs so many chunks in one call. Raises `RuntimeError` where `torch.vmap` does not go through the layer."""

    def run(parameters: dict[str, torch.Tensor], args: tuple, kwargs: dict) -> Any:
        return call_with_parameters(layer.base_layer, parameters, layer.base_layer, args, kwargs)

    adapters, rows, places = names.chunks
    parameters = {name: value[adapters] for name, value in _parameters_of_each(layer, here).items()}
    axes = (
        tuple(0 if _is_batch(value, names) else None for value in args),
        {key: 0 if _is_batch(value, names) else None for key, value in kwargs.items()},
    )
    results = torch.vmap(run, in_dims=(0, *axes), chunk_size=at_once)(parameters, *_pick(args, kwargs, names, rows))
    return _in_order(results, lambda chunks: chunks.flatten(0, 1), rows.numel(), places)


def _parameters_of_each(layer: LoTRALayer, names: list[str | None]) -> dict[str, torch.Tensor]:
    """The parameters in force for each of the adapters, stacked; those of the base for `None`."""
    components = [() if name is None else layer.get_components(name) for name in names]
    alike: dict[Any, list[int]] = {}  # adapters of the same ranks are reconstructed together
    for index, mine in enumerate(components):
        alike.setdefault(tuple((component.shape, component.dtype) for component in mine), []).append(index)
    base = {name: attrgetter(name)(layer.base_layer) for name in layer.lotra_tensor.parameters}
    stacked: dict[str, list[torch.Tensor]] = {name: [] for name in base}
    for shapes, members in alike.items():
        parts = {}
        if shapes:
            scales = [layer.lotra_scaling[names[index]] for index in members]
            mine = [torch.stack(same) for same in zip(*(components[index] for index in members), strict=True)]
            parts = torch.vmap(layer.lotra_tensor.split)(_deltas(mine, scales))
        for name, parameter in base.items():
            value = parameter.expand(len(members), *parameter.shape)
            stacked[name].append((value + parts[name]).to(value.dtype) if name in parts else value)
    order = torch.tensor([index for members in alike.values() for index in members]).argsort()
    return {name: torch.cat(values)[order] for name, values in stacked.items()}


def _deltas(components: list[torch.Tensor], scales: list[float]) -> torch.Tensor:
    """The updates (adapters, out, in, basis) of stacked components."""
    device = components[0].device
    # as in LoTRALayer: neither autocast nor half precision, which is slow on the CPU, must cost the update its digits
    if device.type == "cpu" and components[0].itemsize == 2:
        components = [component.float() for component in components]
    with torch.autocast(device.type, enabled=False):
        deltas = torch.vmap(reconstruct)(*components)
        return deltas * deltas.new_tensor(scales).view(-1, 1, 1, 1)


def _run_one_by_one(layer: LoTRALayer, args: tuple, kwargs: dict, here: list[str | None], names: RowNames) -> Any:
    """Runs the rows of each adapter by themselves."""
    results = [
        layer._adapted_forward([] if name is None else [name], *_pick(args, kwargs, names, rows))
        for name, rows in zip(here, names.rows, strict=True)
    ]
    places = torch.cat(names.rows).argsort()
    if isinstance(results[0], tuple):
        results = tuple(map(list, zip(*results, strict=True)))
    return _in_order(results, torch.cat, len(names), places)


def _is_batch(value: Any, names: RowNames) -> bool:
    return isinstance(value, torch.Tensor) and value.dim() > 0 and len(value) == len(names)


def _pick(args: tuple, kwargs: dict, names: RowNames, rows: torch.Tensor) -> tuple[tuple, dict[str, Any]]:
    """What a layer is called with, the given rows of all that is a batch."""
    return (
        tuple(value[rows] if _is_batch(value, names) else value for value in args),
        {key: value[rows] if _is_batch(value, names) else value for key, value in kwargs.items()},
    )


def _in_order(results: Any, join: Callable[[Any], torch.Tensor], rows: int, places: torch.Tensor) -> Any:
    """Joins results, or each of the parts of which they consist (pykan returns four), and takes the rows in order.

    A layer that flattens the leading dimensions (ChebyKAN) returns several consecutive rows for each.
    """
    if isinstance(results, tuple):
        return tuple(_in_order(part, join, rows, places) for part in results)
    result = join(results)
    per_row = len(result) // rows
    if per_row == 1:
        return result[places]
    return result.unflatten(0, (rows, per_row))[places].flatten(0, 1)
