# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""The adapters of a bank at one moment, as rows of one matrix."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..kan.row_updates import PackedTucker, RowGroups, RowUpdates
from ..modules.checks import list_first
from ..tucker import Tucker, Update
from ..tuner.by_row import check_names
from ..tuner.linear_path import PATH


BASE = "__base__"
# The row of an id that belongs to no adapter. No matrix has so many rows, and reading it is an error everywhere.
NO_ROW = torch.iinfo(torch.int32).max


class Form(NamedTuple):
    """How adapters that were made alike are stored.

    Attributes:
        layers: The shape and the ranks of the update of each adapted layer.
        start: How the training started, as `init_weights` of a configuration names it.
    """

    layers: dict[str, PackedTucker]
    start: bool | str = True


class Snapshot(NamedTuple):
    """The adapters of a bank at one moment: their names, ids and components.

    A change makes another snapshot. Both share the matrix, but a change writes only rows that no earlier snapshot
    uses. So a thread that holds a snapshot reads the adapters as they were.

    Attributes:
        packed: (capacity, width). A row holds the components of one adapter in all layers. Row 0, of zeros, is the
            base. A parameter during a training.
        layers: How the components of each layer of the base are packed, in the order of the columns.
        forms: The forms of the adapters.
        form_of: The index of the form of the base and of each adapter, by name.
        ids: The id of the base, -1, and of each adapter, by name. An id is never given to a second adapter.
        row_of: (room + 2,), int64, the row of id n at n + 1; `NO_ROW` without an adapter, and always at the end.
        next_row: The first row that was never used.
        next_id: The first id that was never given.
    """

    packed: Tensor
    layers: dict[str, PackedTucker]
    forms: tuple[Form, ...]
    form_of: dict[str, int]
    ids: dict[str, int]
    row_of: Tensor
    next_row: int
    next_id: int

    @classmethod
    def of_rows(
        cls,
        packed: Tensor,
        layers: dict[str, PackedTucker],
        forms: Iterable[Form],
        form_of: dict[str, int],
    ) -> Snapshot:
        """Return the adapters whose forms are given by name, the base first, one for each row of a matrix."""
        count = len(form_of)
        ids = dict(zip(form_of, range(-1, count - 1), strict=True))
        row_of = torch.tensor([*range(count), NO_ROW], device=packed.device)
        return cls(packed, layers, tuple(forms), form_of, ids, row_of, count, count - 1)

    def columns(self, packed: Tensor) -> dict[str, Tensor]:
        """Split rows (n, width) by layer, into views (n, width of the layer)."""
        widths = [layer.width() for layer in self.layers.values()]
        columns = packed.split(widths, dim=1)
        return dict(zip(self.layers, columns, strict=True))

    def updates_of_samples(self, packed: Tensor, groups: RowGroups) -> dict[str, RowUpdates]:
        """Return the updates of samples, by layer, whose groups refer to these rows (n, width)."""
        updates = {}
        for name, columns in self.columns(packed).items():
            if columns.shape[1]:
                updates[name] = RowUpdates(columns, groups, self.layers[name])
        return updates

    def pack(self, updates: Mapping[str, Update]) -> Tensor:
        """Return the row (width,) of an adapter, zero in the layers that it does not adapt."""
        columns = []
        for name, layer in self.layers.items():
            columns.append(layer.pack([updates.get(name)], self.packed))
        return torch.cat(columns, dim=1)[0]

    # --- reading ---

    def ids_of(self, names: Sequence[str]) -> Tensor:
        """Return the ids of adapters (n,), -1 for `"__base__"`; raise a ValueError if a name is unknown."""
        if type(names) is not list:
            names = check_names(names)
        try:
            # a batch has thousands of names, of which a list comprehension would take twice as long
            ids = np.fromiter(map(self.ids.__getitem__, names), np.int64, len(names))
        except (KeyError, TypeError):
            check_known(check_names(names), self.ids)
            raise
        return torch.from_numpy(ids).to(self.row_of.device)

    def find_rows(self, ids: Tensor) -> Tensor:
        """Return the row of each id (n,), `NO_ROW` where an id belongs to no adapter."""
        if ids.dim() != 1 or ids.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"`ids` must be integers (rows,), got {ids.dtype} of the shape {tuple(ids.shape)}.")
        last = self.row_of.shape[0] - 1
        index = ids.to(self.row_of.device, torch.int64) + 1
        return self.row_of[index.clamp(-1, last)]  # the last one, also at -1, belongs to no adapter

    def rows_of(self, adapters: Sequence[str] | Sequence[int] | Tensor) -> Tensor:
        """Return the rows (n,) of adapters, by name or id; raise a ValueError if one is unknown."""
        first = None if isinstance(adapters, Tensor) else next(iter(adapters), "")
        if isinstance(first, str):
            return self.row_of[self.ids_of(adapters) + 1]  # pyright: ignore[reportArgumentType]
        ids = torch.as_tensor(adapters, device=self.row_of.device)
        rows = self.find_rows(ids)
        unknown = ids[rows == NO_ROW]
        if len(unknown):
            texts = map(str, unknown.unique().tolist())
            raise ValueError(f"No adapter has the id {list_first(texts)}. `bank.ids(names)` returns the ids.")
        return rows

    def gather(self, names: Sequence[str]) -> Tensor:
        """Return the components of adapters (n, width); raise a ValueError if a name is unknown."""
        return self.packed.index_select(0, self.rows_of(names))

    def updates_of(
        self,
        name: str,
    ) -> tuple[dict[str, Update], bool | str]:
        """Return the updates of an adapter, by layer, and how its training started.

        Raises:
            ValueError: The name is unknown, or the adapter is not finite.
        """
        packed = self.gather([name]).detach()
        check_finite(packed, [name], "Train it again.")
        columns = self.columns(packed)
        layers, start = self.forms[self.form_of[name]]
        updates = {}
        for layer, form in layers.items():
            padded = self.layers[layer].unpack(columns[layer])
            components = []
            for component, shape in zip(padded, form.component_shapes(), strict=True):
                is_full = 0 in shape
                block = (0, *_block(shape))
                components.append(None if is_full else component[block])
            updates[layer] = Update(1.0, Tucker(*components))
        return updates, start

    def fill_components(
        self,
        values_of: Callable[[Form, PackedTucker], Mapping[str, float]],
    ) -> Tensor:
        """Return a matrix like `packed` with one value in each component, and zero where lower ranks are filled up.

        Args:
            values_of: Returns the values of the components of a layer by name, 1 for others.
        """
        rows_of_forms = []
        for form in self.forms:
            updates = {}
            for name, layer in form.layers.items():
                values = {"core": 0.0} if name == PATH else values_of(form, layer)  # a path stays
                components = []
                for component, shape in zip(Tucker._fields, layer.component_shapes(), strict=False):
                    value = values.get(component, 1.0)
                    components.append(self.packed.new_full(shape, value))
                updates[name] = Update(1.0, Tucker(*components))
            rows_of_forms.append(self.pack(updates))

        rows = self.rows_of(list(self.ids))
        forms = list(self.form_of.values())
        filled = torch.zeros_like(self.packed)
        filled[rows] = torch.stack(rows_of_forms)[forms]
        return filled

    # --- changing ---

    def with_adapter(
        self,
        name: str,
        updates: Mapping[str, Update],
        start: bool | str,
    ) -> Snapshot:
        """Add an adapter, or replace the one of this name.

        Raises:
            ValueError: A component is not finite in the dtype of the bank.
        """
        form = Form({}, start)
        for layer, (_, tensor) in updates.items():
            form.layers[layer] = PackedTucker(tensor.shape, tensor.form)
        snapshot = self._with_room_for(self.layers, [form])
        if snapshot.next_row == len(snapshot.packed):
            snapshot = snapshot.rebuild(has_room=True)
        packed = snapshot.pack(updates)
        check_finite(packed.unsqueeze(0), [name], "If it is finite, store it in a larger `dtype`.")
        row = snapshot.next_row
        # no adapter of an earlier snapshot has this row
        snapshot.packed[row] = packed

        forms = snapshot.forms
        if form not in forms:
            forms = (*forms, form)
        next_id = snapshot.next_id + 1
        row_of = snapshot.row_of.clone()
        if next_id + 1 == len(row_of):
            row_of = F.pad(row_of, (0, len(row_of)), value=NO_ROW)
        if name in self.ids:
            row_of[self.ids[name] + 1] = NO_ROW
        row_of[next_id] = row
        return snapshot._replace(
            forms=forms,
            form_of={**self.form_of, name: forms.index(form)},
            ids={**self.ids, name: snapshot.next_id},
            row_of=row_of,
            next_row=row + 1,
            next_id=next_id,
        )

    def without_adapter(self, name: str) -> Snapshot:
        """Remove an adapter; its id belongs to none from then on."""
        form_of = dict(self.form_of)
        del form_of[name]
        ids = dict(self.ids)
        row_of = self.row_of.clone()
        row_of[ids.pop(name) + 1] = NO_ROW
        return self._replace(form_of=form_of, ids=ids, row_of=row_of)

    def rebuild(self, has_room: bool = False) -> Snapshot:
        """Move the adapters into a new matrix, without the rows of removed ones; `has_room`: unused rows follow."""
        names = list(self.ids)
        packed = self.gather(names)
        if has_room:
            # a power of two compiles few graphs, and half as many rows again moves few adapters
            needed = 3 * len(names) // 2
            capacity = max(4, 1 << needed.bit_length())
            packed = F.pad(packed, (0, 0, 0, capacity - len(names)))
        index = self.ids_of(names) + 1
        row_of = self.row_of.clone()
        row_of[index] = torch.arange(len(names), device=row_of.device)
        return self._replace(packed=packed, row_of=row_of, next_row=len(names))

    def compact(self) -> Snapshot:
        """Return the same adapters in the least room, without the forms and ranks of removed ones."""
        indices = {}
        form_of = {}
        for name, form in self.form_of.items():
            form_of[name] = indices.setdefault(form, len(indices))
        forms = tuple(self.forms[index] for index in indices)
        layers = {}
        for name, layer in self.layers.items():
            layers[name] = layer._replace(form=(0,) * len(layer.form))
        return self.rebuild()._with_room_for(layers, forms)._replace(forms=forms, form_of=form_of)

    def _with_room_for(self, layers: Mapping[str, PackedTucker], forms: Iterable[Form]) -> Snapshot:
        """Return the same adapters, packed as in `layers` with room for these forms."""
        layers = dict(layers)
        for form in forms:
            for name, layer in form.layers.items():
                layers[name] = layers[name].with_room_for(layer)
        if layers == self.layers:
            return self
        former = self.rebuild()
        width = sum(layer.width() for layer in layers.values())
        packed = former.packed.new_zeros(len(former.packed), width)
        snapshot = former._replace(packed=packed, layers=layers)
        columns = snapshot.columns(packed)
        for name, former_columns in former.columns(former.packed).items():
            components = layers[name].unpack(columns[name])
            former_components = self.layers[name].unpack(former_columns)
            for component, former_component in zip(components, former_components, strict=True):
                if component is None:
                    continue  # a full mode, whose former factor was the identity
                if former_component is not None:
                    block = _block(map(min, component.shape, former_component.shape))
                    component[block] = former_component[block]
                else:
                    # full modes get the identity as factor, but in the row of the base
                    identity = torch.eye(*component.shape[1:])
                    component[1:] = identity.to(component)
        return snapshot


def check_known(names: Iterable[str], known: Collection[str]) -> None:
    """Raise a ValueError that lists the names that a bank does not have."""
    unknown = [repr(name) for name in dict.fromkeys(names) if name not in known]
    if unknown:
        raise ValueError(f"The bank has no adapter {list_first(unknown)}.")


def _block(shape: Iterable[int]) -> tuple[slice, ...]:
    """Return the index of the first entries of each dimension."""
    return tuple(map(slice, shape))


def check_finite(packed: Tensor, names: Iterable[str], advice: str) -> None:
    """Raise a ValueError that names the adapters whose rows have NaN or infinity."""
    is_finite = packed.isfinite().all(dim=1).tolist()
    wrong = [repr(name) for name, finite in zip(names, is_finite, strict=True) if not finite]
    if wrong:
        raise ValueError(f"Adapters have values that are not finite in {packed.dtype}: {list_first(wrong)}. {advice}")
