# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""The adapters of a bank at one moment, as rows of one matrix."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..kan.row_product import PackedTucker
from ..modules.checks import list_first
from ..tucker import Tucker, Update
from ..tuner.by_row import check_names


BASE = "__base__"
# The row of an id that belongs to no adapter: no matrix has so many rows, so that reading it is an error everywhere.
NO_ROW = torch.iinfo(torch.int32).max


class Form(NamedTuple):
    """The form of an adapter.

    Attributes:
        layers: The shape and ranks of its update of each layer that it adapts.
        from_gradient: Whether it started from the gradient.
    """

    layers: dict[str, PackedTucker]
    from_gradient: bool = False


class Snapshot(NamedTuple):
    """The adapters of a bank at one moment: their names, ids and components.

    A change makes another snapshot. Both share the matrix, in which a change writes only rows that no adapter of an
    earlier snapshot has. So whoever holds a snapshot reads the adapters as they were.

    Attributes:
        packed: (capacity, width). Row n holds the components of one adapter in all layers; row 0, of zeros, the base.
        layers: How the components of each layer of the base are packed, in the order of the columns.
        forms: The forms that adapters have.
        form_of: (capacity,), int32, the form of each row, by its place in `forms`.
        ids: The id of each adapter, by name, -1 of the base. An id is never given to a second adapter.
        row_of: (room + 2,), int64, the row of id n at n + 1; `NO_ROW` where there is none, always at the end.
        next_row: The first row that was never used.
        next_id: The first id that was never given.
        added: (capacity - rows, width), further rows where `packed` is a mapped file; otherwise None.
        checksums: The CRC-32 of each row of a mapped file.
        trained: (capacity,), which rows are in training; None if none are.
    """

    packed: Tensor
    layers: dict[str, PackedTucker]
    forms: tuple[Form, ...]
    form_of: Tensor
    ids: dict[str, int]
    row_of: Tensor
    next_row: int
    next_id: int
    added: Tensor | None = None
    checksums: list[int] | None = None
    trained: Tensor | None = None

    @classmethod
    def of_rows(
        cls, packed: Tensor, layers: dict[str, PackedTucker], forms: Iterable[Form], form_of: Tensor, names: list[str]
    ) -> Snapshot:
        """Return the adapters of these names, the base first, one for each row of a matrix."""
        ids = {name: row - 1 for row, name in enumerate(names)}
        row_of = torch.tensor([*range(len(names)), NO_ROW], device=packed.device)
        return cls(packed, layers, tuple(forms), form_of, ids, row_of, len(names), len(names) - 1)

    def columns(self) -> dict[str, Tensor]:
        """Return the columns of each layer, views (rows, width of the layer)."""
        widths = [layer.width() for layer in self.layers.values()]
        return dict(zip(self.layers, self.packed.split(widths, dim=1), strict=True))

    def pack(self, updates: Mapping[str, Update]) -> Tensor:
        """Return the row (width,) of an adapter, zero in the layers that it does not adapt."""
        parts = [layer.pack([updates.get(name)], self.packed) for name, layer in self.layers.items()]
        return torch.cat(parts, dim=1)[0]

    # --- reading ---

    def ids_of(self, names: Sequence[str]) -> Tensor:
        """Return the ids of adapters (n,), -1 for `"__base__"`; raise a ValueError if a name is unknown."""
        names = check_names(names)
        try:
            ids = np.fromiter(map(self.ids.__getitem__, names), np.int64)
        except KeyError:
            unknown = [name for name in dict.fromkeys(names) if name not in self.ids]
            raise ValueError(f"The bank has no adapter {list_first(map(repr, unknown))}.") from None
        return torch.from_numpy(ids).to(self.row_of.device)

    def find_rows(self, ids: Tensor) -> Tensor:
        """Return the row of each id (n,), `NO_ROW` where an id belongs to no adapter."""
        if ids.dim() != 1 or ids.is_floating_point() or ids.is_complex() or not ids.dtype.is_signed:
            raise ValueError(f"`ids` must be integers (rows,), got {ids.dtype} of the shape {tuple(ids.shape)}.")
        last = self.row_of.shape[0] - 1
        place = ids.to(self.row_of.device, torch.int64) + 1
        return self.row_of[torch.where(place < 0, last, place).clamp(max=last)]

    def rows_of(self, adapters: Sequence[str] | Sequence[int] | Tensor) -> Tensor:
        """Return the rows (n,) of adapters, by name or id; raise a ValueError for what belongs to none."""
        if not isinstance(adapters, Tensor) and isinstance(next(iter(adapters), ""), str):
            return self.row_of[self.ids_of(adapters) + 1]  # pyright: ignore[reportArgumentType]
        ids = torch.as_tensor(adapters, device=self.row_of.device)
        rows = self.find_rows(ids)
        is_free = rows == NO_ROW
        if is_free.any():
            wrong = list_first(map(str, ids[is_free].unique().tolist()))
            raise ValueError(f"No adapter has the id {wrong}. `bank.ids(names)` returns the ids.")
        return rows

    def check_trained(self, rows: Tensor) -> None:
        """Raise a ValueError that names the adapters of these rows that are not in training."""
        idle = rows[~self.trained[rows]].tolist()  # pyright: ignore[reportOptionalSubscript]
        if idle:
            raise ValueError(
                f"Rows have adapters that are not in training: {self._list_names(idle)}. Leave them out, or call "
                "the model under `torch.no_grad()`."
            )

    def _list_names(self, rows: list[int]) -> str:
        """Return the names of the adapters in these rows, as text."""
        return list_first(repr(name) for name, number in self.ids.items() if int(self.row_of[number + 1]) in rows)

    def gather(self, rows: Tensor) -> Tensor:
        """Return these rows of the matrix, (n, width)."""
        if self.added is None:
            return self.packed[rows]
        count = len(self.packed)
        gathered = self.packed[rows.clamp(max=count - 1)]
        is_added = rows >= count
        gathered[is_added] = self.added[rows[is_added] - count]
        return gathered

    def gather_checked(self, rows: Tensor) -> Tensor:
        """Return these rows; those of a mapped file, which was not checked when it was loaded, are checked.

        Raises:
            ValueError: A row is not what was saved; the message names the adapters.
        """
        gathered = self.gather(rows)
        if self.checksums is None:
            return gathered
        damaged = []
        for row, content in zip(rows.tolist(), bytes_of(gathered), strict=True):
            if row < len(self.packed) and zlib.crc32(content) != self.checksums[row]:
                damaged.append(row)
        if damaged:
            names = self._list_names(damaged)
            raise ValueError(f"The mapped file has damaged adapters: {names}. Remove them from the bank.")
        return gathered

    def updates_of(self, name: str) -> tuple[dict[str, Update], bool]:
        """Return the updates of an adapter, by layer, and whether it started from the gradient.

        Raises:
            ValueError: The name is unknown, or the adapter is not finite, or damaged in a mapped file.
        """
        row = self.rows_of([name])
        packed = self.gather_checked(row).detach()
        check_finite(packed, [name], "Train it again.")
        columns = self._replace(packed=packed).columns()
        form = self.forms[int(self.form_of[int(row)])]
        updates = {}
        for layer, of_layer in form.layers.items():
            padded = self.layers[layer].unpack(columns[layer])
            components = []
            for value, shape in zip(padded, of_layer.component_shapes(), strict=True):
                components.append(value[0][tuple(map(slice, shape))] if all(shape) else None)
            updates[layer] = Update(1.0, Tucker(*components))
        return updates, form.from_gradient

    def pack_by_component(self, values_of: Callable[[Form, PackedTucker], Mapping[str, float]]) -> Tensor:
        """Return a row (width,) for each form, with a value in all entries of a component; zero fills up.

        Args:
            values_of: Returns the values that are not 1 by the names of components, for a layer of a form.
        """
        packed = []
        for form in self.forms:
            updates = {}
            for name, layer in form.layers.items():
                values = values_of(form, layer)
                components = []
                for component, shape in zip(Tucker._fields, layer.component_shapes(), strict=False):
                    components.append(self.packed.new_full(shape, values.get(component, 1.0)))
                updates[name] = Update(1.0, Tucker(*components))
            packed.append(self.pack(updates))
        return torch.stack(packed)

    # --- changing ---

    def with_adapter(self, name: str, updates: Mapping[str, Update], from_gradient: bool) -> Snapshot:
        """Add an adapter, or replace the one of this name.

        Raises:
            ValueError: A component is not finite in the dtype of the bank.
        """
        snapshot = self._with_room_for(updates)
        if snapshot.next_row == len(snapshot.form_of):
            snapshot = snapshot.rebuild(0 if snapshot.added is None else len(snapshot.packed), has_room=True)
        packed = snapshot.pack(updates)
        if not packed.isfinite().all():
            raise ValueError(f"it has values that are not finite in {packed.dtype}.")

        layers = {layer: PackedTucker(update.tensor.shape, update.tensor.form) for layer, update in updates.items()}
        form = Form(layers, from_gradient)
        forms = snapshot.forms if form in snapshot.forms else (*snapshot.forms, form)
        row = snapshot.next_row
        matrix, place = snapshot.packed, row
        if snapshot.added is not None:
            matrix, place = snapshot.added, row - len(snapshot.packed)
        # no adapter of an earlier snapshot has this row
        matrix[place] = packed
        snapshot.form_of[row] = forms.index(form)

        room = len(snapshot.row_of) if snapshot.next_id + 2 == len(snapshot.row_of) else 0
        row_of = torch.cat([snapshot.row_of, snapshot.row_of.new_full((room,), NO_ROW)])
        if name in self.ids:
            row_of[self.ids[name] + 1] = NO_ROW
        row_of[snapshot.next_id + 1] = row
        ids = {**snapshot.ids, name: snapshot.next_id}
        return snapshot._replace(forms=forms, ids=ids, row_of=row_of, next_row=row + 1, next_id=snapshot.next_id + 1)

    def without_adapter(self, name: str) -> Snapshot:
        """Remove an adapter; its id belongs to none from then on."""
        ids = dict(self.ids)
        row_of = self.row_of.clone()
        row_of[ids.pop(name) + 1] = NO_ROW
        return self._replace(ids=ids, row_of=row_of)

    def rebuild(self, start: int = 0, has_room: bool = False) -> Snapshot:
        """Move the adapters from row `start` on into a new matrix, without the rows of removed ones.

        Args:
            start: 0, or the number of rows of a mapped file, which then stay there.
            has_room: Whether there are rows for further adapters.
        """
        is_moved = (self.row_of >= start) & (self.row_of < NO_ROW)
        rows = self.row_of[is_moved]
        gathered = self.gather_checked(rows)
        # a power of two, so that few graphs are compiled, and at least half as many rows again, so that few are moved
        room = max(4, 1 << (3 * len(rows) // 2).bit_length()) - len(rows) if has_room else 0
        matrix = torch.cat([gathered, gathered.new_zeros(room, gathered.shape[1])])
        next_row = start + len(rows)
        row_of = self.row_of.clone()
        row_of[is_moved] = torch.arange(start, next_row, device=row_of.device)
        moved_forms = self.form_of[rows.to(self.form_of.device)]
        form_of = torch.cat([self.form_of[:start], moved_forms, moved_forms.new_zeros(room)])
        snapshot = self._replace(form_of=form_of, row_of=row_of, next_row=next_row)
        if start:
            return snapshot._replace(added=matrix)
        return snapshot._replace(packed=matrix, added=None, checksums=None)

    def _with_room_for(self, updates: Mapping[str, Update]) -> Snapshot:
        """Return the same adapters with room for these updates."""
        layers = dict(self.layers)
        for name, update in updates.items():
            layers[name] = layers[name].with_room_for(update.tensor)
        if layers == self.layers:
            return self
        narrow = self.rebuild()
        width = sum(layer.width() for layer in layers.values())
        wide = narrow._replace(packed=self.packed.new_zeros(len(narrow.packed), width), layers=layers)
        columns = wide.columns()
        for name, values in narrow.columns().items():
            components = layers[name].unpack(columns[name])
            for component, narrower in zip(components, self.layers[name].unpack(values), strict=True):
                if narrower is not None:
                    component[tuple(map(slice, narrower.shape))] = narrower
                elif component is not None:
                    # full modes get the identity as factor
                    is_adapted = torch.tensor([name in form.layers for form in self.forms])[narrow.form_of]
                    component[is_adapted] = torch.eye(*component.shape[1:]).to(component)
        return wide


def bytes_of(packed: Tensor) -> np.ndarray:
    """Return the bytes of each row, of which a file has the CRC-32."""
    return packed.view(torch.uint8).numpy()


def check_finite(packed: Tensor, names: Iterable[str], advice: str) -> None:
    """Raise a ValueError that names the adapters whose rows have NaN or infinity."""
    is_finite = packed.isfinite().all(dim=1).tolist()
    wrong = [name for name, finite in zip(names, is_finite, strict=True) if not finite]
    if wrong:
        names = list_first(map(repr, wrong))
        raise ValueError(f"Adapters have values that are not finite in {packed.dtype}: {names}. {advice}")
