# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Batches in which each row has an adapter of its own: the rows of each adapter run together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from ..families.coefficients import CoefficientTensor
from ..modules.calls import call_with_parameters
from ..modules.locks import cached
from ..tucker import Update, reconstruct, tucker_of
from .merging import are_stored, without_autocast


# A chunk has a copy of the parameters, which costs about as much as this many rows.
_CHUNK_COST = 16
# How many basis functions of how many rows are evaluated in one call: more do not stay in the cache.
_MAX_BASIS = 2**17
# How many numbers all copies of the parameters may have together.
_MAX_COPIES = 2**24


class RowNames(list):
    """The name of the adapter of each row; the rows are sorted once for all layers."""

    @classmethod
    def of(cls, names: Any) -> RowNames:
        """The names that a user gives; a ValueError for what is no list of strings."""
        names = None if isinstance(names, (str, bytes)) or not isinstance(names, Iterable) else cls(names)
        if names is None or not all(isinstance(name, str) for name in names):
            raise ValueError(
                "`adapter_names` must be a list with the name of an adapter for each row of the batch, such as "
                '`["default"] * len(x)`, or "__base__" for none.'
            )
        return names

    def for_rows(self, rows: int) -> RowNames:
        """The names for a layer with this number of rows: several for each row of the batch, where tokens, patches or
        channels have been flattened into rows (`x.reshape(batch * tokens, features)`)."""
        times, rest = divmod(rows, len(self) or 1)
        if times < 2 or rest:
            return self
        if times not in self._longer:
            self._longer[times] = RowNames(name for name in self for _ in range(times))
        return self._longer[times]

    @cached
    def _longer(self) -> dict[int, RowNames]:
        return {}

    @cached
    def distinct(self) -> list[str]:
        """The names that occur, in the order of their first rows."""
        return list(dict.fromkeys(self))

    @cached
    def rows(self) -> tuple[torch.Tensor, ...]:
        """The rows (n,) of each of the distinct names, int64."""
        position = {name: index for index, name in enumerate(self.distinct)}
        names = torch.tensor([position[name] for name in self], dtype=torch.int64, device="cpu")
        return names.argsort(stable=True).split(names.bincount().tolist())

    @cached
    def chunks(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The rows in chunks of one length, each of one adapter; a chunk that is too short repeats its last row.

        Returns the name of each chunk (chunks,), as an index into `distinct`; the rows of each chunk (chunks, length);
        and the place of each row of the batch among those of all chunks (batch,).
        """
        counts = torch.tensor([len(rows) for rows in self.rows], device="cpu")
        longest = int(counts.max())
        lengths = {-(-longest // 2**halvings) for halvings in range(longest.bit_length())}
        length = min(lengths, key=lambda length: int((-(-counts // length)).sum()) * (length + _CHUNK_COST))
        chunks, places = [], torch.empty(len(self), dtype=torch.int64, device="cpu")
        for rows in self.rows:
            places[rows] = torch.arange(len(rows), device="cpu") + len(chunks) * length
            chunks += torch.cat([rows, rows[-1:].expand(-len(rows) % length)]).split(length)
        return (
            torch.arange(len(counts), device="cpu").repeat_interleave(-(-counts // length)),
            torch.stack(chunks),
            places,
        )


def batch_sizes(value: Any) -> list[int]:
    """The lengths of all tensors among the arguments of a model."""
    if isinstance(value, torch.Tensor):
        return [len(value)] if value.dim() else []
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, (tuple, list)) else ()
    return [size for part in parts for size in batch_sizes(part)]


class MixedBatch(NamedTuple):
    """Runs a layer on a batch whose rows have adapters of their own: `mixed_batch.output(base_layer, updates, *args)`.

    The cost grows with the adapters in the batch, not with those that are loaded. Small layers run on all rows at
    once, by `torch.vmap` over copies of their parameters; the others run once for each adapter.
    """

    names: RowNames
    tensor: CoefficientTensor
    run: Callable[[Sequence[Update], tuple, dict[str, Any]], Any]  # runs the layer with the same updates for all rows

    def output(self, base_layer: nn.Module, updates: Sequence[Sequence[Update]], *args: Any, **kwargs: Any) -> Any:
        """What the layer returns, in the order of the batch. Tensors whose first dimension is the batch are split.

        There are `updates` for each of the distinct names, or none for rows that get the base layer.
        """
        if len(updates) == 1 or not any(updates):
            return self.run(updates[0] if updates else [], args, kwargs)
        size = sum(parameter.numel() for parameter in self.tensor.read_parameters(base_layer).values())
        chunks, length = self.names.chunks[1].shape
        at_once = _MAX_BASIS * self.tensor.shape[0] // (size * length)
        # the parameters that a Slim layer seems to have are computed, and cannot be exchanged
        if at_once >= 2 and size * chunks <= _MAX_COPIES and are_stored(base_layer, self.tensor.parameters):
            try:
                return _run_together(self, base_layer, updates, args, kwargs, at_once)
            except RuntimeError:
                pass  # torch.vmap does not go through every layer. Any other error is raised again below.
        return _run_one_by_one(self, updates, args, kwargs)


def _run_together(
    batch: MixedBatch,
    base_layer: nn.Module,
    updates: Sequence[Sequence[Update]],
    args: tuple,
    kwargs: dict[str, Any],
    at_once: int,
) -> Any:
    """Runs the layer on `at_once` chunks in one call."""
    names = batch.names
    adapters, rows, places = names.chunks
    stacked = _parameters_of_each(batch.tensor, base_layer, updates)
    parameters = {name: value[adapters] for name, value in stacked.items()}
    axes = _each(args, kwargs, lambda value: 0 if _is_batch(value, names) else None)

    def run(parameters: dict[str, torch.Tensor], args: tuple, kwargs: dict[str, Any]) -> Any:
        return call_with_parameters(base_layer, parameters, base_layer, args, kwargs)

    results = torch.vmap(run, in_dims=(0, *axes), chunk_size=at_once)(parameters, *_pick(args, kwargs, names, rows))
    return _in_order(results, lambda chunks: chunks.flatten(0, 1), rows.numel(), places)


def _parameters_of_each(
    tensor: CoefficientTensor, base_layer: nn.Module, updates: Sequence[Sequence[Update]]
) -> dict[str, torch.Tensor]:
    """The parameters in force with each of the updates, stacked; without an update those of the base."""
    alike: dict[Any, list[int]] = {}  # updates of the same ranks are reconstructed together
    for index, mine in enumerate(updates):
        shapes = tuple((component.shape, component.dtype) for update in mine for component in update.tensor)
        alike.setdefault(shapes, []).append(index)
    base = tensor.read_parameters(base_layer)
    stacked: dict[str, list[torch.Tensor]] = {name: [] for name in base}
    for shapes, members in alike.items():
        parts: dict[str, torch.Tensor] = {}
        if shapes:
            parts = torch.vmap(tensor.split)(_deltas([update for index in members for update in updates[index]]))
        for name, parameter in base.items():
            value = parameter.expand(len(members), *parameter.shape)
            stacked[name].append((value + parts[name]).to(value.dtype) if name in parts else value)
    order = torch.tensor([index for members in alike.values() for index in members], device="cpu").argsort()
    return {name: torch.cat(values)[order] for name, values in stacked.items()}


def _deltas(updates: Sequence[Update]) -> torch.Tensor:
    """The updates (updates, out, in, basis [, kernel]) of components of the same shapes."""
    components = tucker_of(*map(torch.stack, zip(*(update.tensor for update in updates), strict=True)))
    # in half precision, which is slow on the CPU, the update would lose its digits
    if components.core.device.type == "cpu" and components.core.itemsize == 2:
        components = components.map(torch.Tensor.float)
    with without_autocast(updates):
        deltas = torch.vmap(reconstruct)(*components)
        scales = deltas.new_tensor([update.scale for update in updates])
        return deltas * scales.view(-1, *[1] * (deltas.dim() - 1))


def _run_one_by_one(
    batch: MixedBatch, updates: Sequence[Sequence[Update]], args: tuple, kwargs: dict[str, Any]
) -> Any:
    """Runs the rows of each adapter by themselves."""
    names = batch.names
    results: Any = [
        batch.run(mine, *_pick(args, kwargs, names, rows)) for mine, rows in zip(updates, names.rows, strict=True)
    ]
    if isinstance(results[0], tuple):
        results = tuple(map(list, zip(*results, strict=True)))
    return _in_order(results, torch.cat, len(names), torch.cat(names.rows).argsort())


def _is_batch(value: Any, names: RowNames) -> bool:
    return isinstance(value, torch.Tensor) and value.dim() > 0 and len(value) == len(names)


def _each(args: tuple, kwargs: dict, function: Callable[[Any], Any]) -> tuple[tuple, dict[str, Any]]:
    return tuple(map(function, args)), {key: function(value) for key, value in kwargs.items()}


def _pick(args: tuple, kwargs: dict, names: RowNames, rows: torch.Tensor) -> tuple[tuple, dict[str, Any]]:
    """The arguments of a layer, with the given rows of each batch."""
    return _each(args, kwargs, lambda value: value[rows] if _is_batch(value, names) else value)


def _in_order(results: Any, join: Callable[[Any], torch.Tensor], rows: int, places: torch.Tensor) -> Any:
    """Joins results, or each of their parts (pykan returns four), and puts the rows in order."""
    if isinstance(results, tuple):
        return tuple(_in_order(part, join, rows, places) for part in results)
    result = join(results)
    per_row = len(result) // rows  # several in a layer that flattens the leading dimensions (ChebyKAN)
    if per_row == 1:
        return result[places]
    return result.unflatten(0, (rows, per_row))[places].flatten(0, 1)
