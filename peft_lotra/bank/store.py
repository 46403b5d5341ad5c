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
        packed: (capacity, width). Rows that belong to no adapter have any content.
        forms: How the components of each layer are packed, by the name of the layer, in the order of the columns.
    """

    packed: Tensor
    forms: dict[str, PackedTucker]

    @classmethod
    def empty(cls, dtype: torch.dtype) -> Store:
        return cls(torch.zeros(1, 0, dtype=dtype, device="cpu"), {})

    def columns(self) -> dict[str, Tensor]:
        """The columns of each layer, a view (capacity, width of the layer)."""
        parts = self.packed.split([form.width() for form in self.forms.values()], dim=1)
        return dict(zip(self.forms, parts, strict=True))

    def pack(self, updates: Mapping[str, Update]) -> Tensor:
        """The row of an adapter, zero in the layers that it does not have."""
        parts = [form.pack([updates.get(name)], self.packed) for name, form in self.forms.items()]
        return torch.cat(parts, dim=1)[0]

    def _sizes(self, name: str, ranks: tuple[int, ...], basis: int) -> list[tuple[int, ...]]:
        shape = self.forms[name].shape
        return PackedTucker((*shape[:2], basis, *shape[3:]), ranks).component_shapes()

    def components(self, row: int, form: Form) -> dict[str, Tucker]:
        """The components of an adapter, by layer, without the zeros that fill them up."""
        found, columns = {}, self.columns()
        for name, (ranks, basis) in form.items():
            parts = self.forms[name].unpack(columns[name][row : row + 1])
            sizes = self._sizes(name, ranks, basis)
            cut = [part[0][tuple(map(slice, size))] for part, size in zip(parts, sizes, strict=True)]
            found[name] = Tucker(*(part.detach().clone() for part in cut))
        return found

    def entries(self, form: Form) -> Tensor:
        """Which columns have the components of an adapter, not zeros that fill them up, (width,)."""
        sizes = {name: self._sizes(name, ranks, basis) for name, (ranks, basis) in form.items()}
        ones = {name: Update(1.0, Tucker(*(self.packed.new_ones(it) for it in own))) for name, own in sizes.items()}
        return self.pack(ones).bool()

    def with_forms(self, forms: Mapping[str, PackedTucker]) -> Store:
        """The same adapters where each layer has room for these ranks, too."""
        wider = {
            name: form
            if (own := self.forms.get(name)) is None
            else PackedTucker(form.shape, tuple(map(max, form.ranks, own.ranks)))
            for name, form in {**self.forms, **forms}.items()
        }
        if wider == self.forms:
            return self
        width = sum(form.width() for form in wider.values())
        new = Store(self.packed.new_zeros(len(self.packed), width), wider)
        columns = new.columns()
        for name, old in self.columns().items():
            for part, value in zip(wider[name].unpack(columns[name]), self.forms[name].unpack(old), strict=True):
                part[tuple(map(slice, value.shape))] = value
        return new

    def with_capacity(self, capacity: int) -> Store:
        """The same adapters in a matrix of more rows."""
        missing = capacity - len(self.packed)
        return self._replace(packed=torch.cat([self.packed, self.packed.new_zeros(missing, self.packed.shape[1])]))

    def select(self, rows: Sequence[int] | Tensor) -> Store:
        """These rows, in this order."""
        return self._replace(packed=self.packed[torch.as_tensor(rows, device=self.packed.device)])
