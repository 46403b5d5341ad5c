# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""The adapters of a bank as rows of one matrix."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..kan.row_product import PackedTucker
from ..tucker import Tucker, Update


class Form(NamedTuple):
    """The form of an adapter.

    Attributes:
        layers: The shape and ranks of its update of each layer that it has.
        from_gradient: Whether it started from the gradient.
    """

    layers: dict[str, PackedTucker]
    from_gradient: bool = False


class Store(NamedTuple):
    """A matrix whose row n holds the components of adapter n in all layers; row 0, of zeros, is the base.

    Attributes:
        packed: (rows, width). Rows that belong to no adapter have any content.
        layers: How the components of each layer of the base are packed, by its name, in the order of the columns.
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
    def empty(cls, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> Store:
        layers = {name: PackedTucker(shape, (0,) * len(shape)) for name, shape in shapes.items()}
        form_of = torch.zeros(1, dtype=torch.int32, device="cpu")
        return cls(torch.zeros(1, 0, dtype=dtype, device="cpu"), layers, [Form({})], form_of)

    def columns(self) -> dict[str, Tensor]:
        """The columns of each layer, a view (rows, width of the layer)."""
        parts = self.packed.split([form.width() for form in self.layers.values()], dim=1)
        return dict(zip(self.layers, parts, strict=True))

    def pack(self, updates: Mapping[str, Update]) -> Tensor:
        """The row of an adapter, zero in the layers that it does not have."""
        parts = [form.pack([updates.get(name)], self.packed) for name, form in self.layers.items()]
        return torch.cat(parts, dim=1)[0]

    def write(self, row: int, updates: Mapping[str, Update], from_gradient: bool) -> None:
        """Makes an adapter the content of a row."""
        form = Form({n: PackedTucker(it.tensor.shape, it.tensor.ranks) for n, it in updates.items()}, from_gradient)
        if form not in self.forms:
            self.forms.append(form)
        matrix: Any = self.packed if row < len(self.packed) else self.added
        matrix[row if row < len(self.packed) else row - len(self.packed)] = self.pack(updates)
        self.form_of[row] = self.forms.index(form)

    def components(self, row: int) -> dict[str, Tucker]:
        """The components of an adapter, by layer, without the zeros that fill them up."""
        one, found = self.select([row]), {}
        columns = one.columns()
        for name, own in self.forms[int(one.form_of)].layers.items():
            parts = zip(self.layers[name].unpack(columns[name].detach()), own.component_shapes(), strict=True)
            found[name] = Tucker(*(part[0][tuple(map(slice, shape))].clone() for part, shape in parts))
        return found

    def entries(self) -> Tensor:
        """Which numbers are components of adapters, not zeros that fill them up, (capacity, width)."""
        found = []
        for form in self.forms:
            ones = {name: map(self.packed.new_ones, own.component_shapes()) for name, own in form.layers.items()}
            found.append(self.pack({name: Update(1.0, Tucker(*parts)) for name, parts in ones.items()}).bool())
        return torch.stack(found)[self.form_of.clamp(0)]

    def from_gradient(self) -> Tensor:
        """Which adapters started from the gradient, (capacity,)."""
        return torch.tensor([form.from_gradient for form in self.forms], device="cpu")[self.form_of.clamp(0)]

    def with_ranks(self, ranks: Mapping[str, tuple[int, ...]]) -> Store:
        """The same adapters where each layer has room for these ranks, too."""
        wider = {
            name: form._replace(ranks=tuple(map(max, form.ranks, ranks.get(name, form.ranks))))
            for name, form in self.layers.items()
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
