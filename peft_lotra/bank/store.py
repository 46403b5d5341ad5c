# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""The adapters of a bank as rows of one matrix."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..kan.row_product import PackedTucker
from ..tucker import Tucker, Update


# The form of one adapter: for each layer that it has, the ranks, and the size of the basis mode.
Form = dict[str, tuple[tuple[int, ...], int]]


class Store(NamedTuple):
    """A matrix whose row n holds the components of adapter n in all layers; row 0, of zeros, is the base.

    Attributes:
        packed: (rows, width). Rows that belong to no adapter have any content.
        layers: How the components of each layer are packed, by its name, in the order of the columns.
        forms: The forms that adapters have.
        form_of: (capacity,), int32, the place in `forms` of each row, -1 if it is free.
        added: (capacity - rows, width), further rows, where `packed` is a mapped file; else None.
    """

    packed: Tensor
    layers: dict[str, PackedTucker]
    forms: list[Form]
    form_of: Tensor
    added: Tensor | None = None

    @classmethod
    def empty(cls, dtype: torch.dtype) -> Store:
        form_of = torch.zeros(1, dtype=torch.int32, device="cpu")
        return cls(torch.zeros(1, 0, dtype=dtype, device="cpu"), {}, [{}], form_of)

    def columns(self) -> dict[str, Tensor]:
        """The columns of each layer, a view (rows, width of the layer)."""
        parts = self.packed.split([form.width() for form in self.layers.values()], dim=1)
        return dict(zip(self.layers, parts, strict=True))

    def pack(self, updates: Mapping[str, Update]) -> Tensor:
        """The row of an adapter, zero in the layers that it does not have."""
        parts = [form.pack([updates.get(name)], self.packed) for name, form in self.layers.items()]
        return torch.cat(parts, dim=1)[0]

    def write(self, row: int, updates: Mapping[str, Update]) -> None:
        """Makes an adapter the content of a row."""
        form: Form = {name: (it.tensor.ranks, it.tensor.shape[2]) for name, it in updates.items()}
        if form not in self.forms:
            self.forms.append(form)
        if self.added is None or row < len(self.packed):
            self.packed[row] = self.pack(updates)
        else:
            self.added[row - len(self.packed)] = self.pack(updates)
        self.form_of[row] = self.forms.index(form)

    def _sizes(self, name: str, ranks: tuple[int, ...], basis: int) -> list[tuple[int, ...]]:
        shape = self.layers[name].shape
        return PackedTucker((*shape[:2], basis, *shape[3:]), ranks).component_shapes()

    def components(self, row: int) -> dict[str, Tucker]:
        """The components of an adapter, by layer, without the zeros that fill them up."""
        one = self.select([row])
        found, columns = {}, one.columns()
        for name, (ranks, basis) in self.forms[int(one.form_of)].items():
            parts = self.layers[name].unpack(columns[name].detach())
            sizes = self._sizes(name, ranks, basis)
            cut = [part[0][tuple(map(slice, size))] for part, size in zip(parts, sizes, strict=True)]
            found[name] = Tucker(*(part.clone() for part in cut))
        return found

    def entries(self) -> Tensor:
        """Which numbers are components of adapters, not zeros that fill them up, (capacity, width)."""
        found = []
        for form in self.forms:
            sizes = {name: self._sizes(name, *of_layer) for name, of_layer in form.items()}
            ones = {name: Tucker(*(self.packed.new_ones(it) for it in own)) for name, own in sizes.items()}
            found.append(self.pack({name: Update(1.0, tensor) for name, tensor in ones.items()}).bool())
        return torch.stack(found)[self.form_of.clamp(0)]

    def with_layers(self, layers: Mapping[str, PackedTucker]) -> Store:
        """The same adapters where each layer has room for these ranks, too."""
        wider = {
            name: form
            if (own := self.layers.get(name)) is None
            else PackedTucker(form.shape, tuple(map(max, form.ranks, own.ranks)))
            for name, form in {**self.layers, **layers}.items()
        }
        if wider == self.layers:
            return self
        width, former = sum(form.width() for form in wider.values()), self.in_memory()
        new = former._replace(packed=self.packed.new_zeros(len(former.packed), width), layers=wider)
        columns = new.columns()
        for name, old in former.columns().items():
            for part, value in zip(wider[name].unpack(columns[name]), self.layers[name].unpack(old), strict=True):
                part[tuple(map(slice, value.shape))] = value
        return new

    def with_row(self, row: int) -> Store:
        """The same adapters with room for this row, and for as many rows as there are."""
        if row < len(self.form_of):
            return self
        grown, first = (self.packed, 0) if self.added is None else (self.added, len(self.packed))
        missing = first + max(4, 1 << (row - first).bit_length()) - len(self.form_of)
        grown = torch.cat([grown, grown.new_zeros(missing, grown.shape[1])])
        form_of = torch.cat([self.form_of, self.form_of.new_full((missing,), -1)])
        return self._replace(form_of=form_of, **{"packed" if self.added is None else "added": grown})

    def rows(self, index: Tensor) -> Tensor:
        """These rows, in this order, (len(index), width)."""
        if self.added is None:
            return self.packed[index]
        place = index - len(self.packed)
        found, is_added = self.packed[index.clamp(max=len(self.packed) - 1)], place >= 0
        found[is_added] = self.added[place[is_added]]
        return found

    def select(self, rows: Sequence[int]) -> Store:
        """These rows alone, in this order, in memory."""
        index = torch.tensor(rows, device=self.packed.device)
        return self._replace(packed=self.rows(index), form_of=self.form_of[index.cpu()], added=None)

    def in_memory(self) -> Store:
        """The same adapters in one matrix, if a part of them is mapped."""
        return self if self.added is None else self.select(range(len(self.form_of)))
