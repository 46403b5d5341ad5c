# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""What stands in a model while a bank is attached to it."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn

from ..kan.row_product import RowGroups, RowUpdates
from ..tucker import Tucker, Update
from ..tuner.by_row import find_row_evaluation
from ..tuner.layer import LoTRALayer
from ..tuner.rows import PassVariable, rows_of_each, run_by_name
from ..tuner.slim import SlimLoTRALayer
from .store import Store


class Rows(NamedTuple):
    """The adapters of the rows of a forward pass.

    Attributes:
        bank: The bank, an object of any type, whose layers they are for.
        store: The adapters of the bank when the pass began, perhaps those of the batch alone.
        groups: The rows of the batch, by the rows of `store`; None in a pass of the base.
        known: See `ForwardPass`; None in a traced pass.
    """

    bank: Any
    store: Store
    groups: RowGroups | None = None
    known: set[int] | None = None


ROWS = PassVariable("lotra_bank_rows")  # `Rows`


@torch.compiler.disable
def _rows_of_pass() -> Rows | None:
    return ROWS.get()


class BankLayer(LoTRALayer):
    """A KAN layer whose rows have the adapters of a bank; without rows it is its base layer."""

    lotra_bank: Any  # set by the bank, with its name of the layer
    lotra_bank_name: str

    def update_layer(self, adapter_name: str, config: Any) -> None:
        if not self.lotra_r:  # not of a PeftModel, so that PEFT would leave the base trainable
            raise ValueError(
                "The network serves an AdapterBank, perhaps as a copy of one. Adapt a copy made before `attach()`, or "
                "train in the bank, by `bank.add(name, LoTRAConfig(...))` and `BankAdamW`."
            )
        super().update_layer(adapter_name, config)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        is_traced = torch.compiler.is_compiling()
        traced = self.lotra_bank.traced_rows  # not None inside of a compiled `BankModel`
        rows = traced if is_traced and traced is not None else _rows_of_pass()  # pyright: ignore[reportCallIssue]
        if traced is not None and not is_traced and rows is None:
            raise RuntimeError("A compiled bank must be one graph: pass `fullgraph=True` to find the break.")
        if rows is None or rows.bank is not self.lotra_bank:
            return super().forward(*args, **kwargs)
        groups, name = rows.groups, self.lotra_bank_name
        if groups is None or not rows.store.layers[name].width():
            return self._run((), None, args, kwargs)
        times, read_numbers = 1, lambda: groups.of_rows().tolist()
        if rows.known is not None:
            self.check_grid()
            if not self._has_seen_inputs:
                self._warn_of_far_inputs(args[0] if args else None)
            times = rows_of_each(groups.batch(), read_numbers, self.lotra_name, rows.known, args, kwargs)
        form, packed = rows.store.layers[name], rows.store.columns()[name]
        if (run_together := find_row_evaluation(self, args, kwargs)) is not None:
            return run_together(RowUpdates(packed, groups, form))
        if is_traced:
            raise RuntimeError(
                f"`{self.lotra_name}` ({self.lotra_spec.family}) runs once for each adapter, which a graph cannot do. "
                "Give its kind `basis` in `register_kan_layer`, or call the model that is not compiled."
            )

        def run(row: int, args: tuple, kwargs: dict[str, Any]) -> Any:
            stored = self.lotra_tensor.get_parameter(self._modules["base_layer"])
            parts = [part[0].to(stored) for part in form.unpack(packed[row : row + 1])]
            return self._call_base([Update(1.0, Tucker(*parts))], args, kwargs)

        return run_by_name([row for row in read_numbers() for _ in range(times)], run, args, kwargs)


class SlimBankLayer(BankLayer, SlimLoTRALayer):
    """The same of a Slim layer."""


class BankModel(nn.Module):
    """A model whose rows have the adapters of a bank, see `AdapterBank.attach`.

    Attributes:
        model (`nn.Module`): The model.
        bank (`AdapterBank`): The bank.
    """

    def __init__(self, model: nn.Module, bank: Any, needs_adapters: bool) -> None:
        super().__init__()
        self.model, self.bank, self.needs_adapters = model, bank, needs_adapters

    def forward(self, *args: Any, adapter_names: Any = None, ids: Any = None, **kwargs: Any) -> Any:
        """The output of the model.

        Args:
            adapter_names (`list[str]`): The adapter of each row, `"__base__"` for none.
            ids (`torch.Tensor`): The same by number, (rows,) int64, -1 for none; see `AdapterBank.ids`.
        """
        given = [rows for rows in (adapter_names, ids) if rows is not None]
        has_rows = not torch.compiler.is_compiling() and ROWS.get() is not None
        if len(given) == 2 or (self.needs_adapters and not given and not has_rows):
            raise ValueError(
                f"`adapter_names` and `ids` name the adapter of each row: pass one of them, got {len(given)}."
            )
        bank = self.bank
        if not torch.compiler.is_compiling():
            with bank.rows(given[0] if given else None):
                outputs = self.model(*args, **kwargs)
                ROWS.keep(outputs)
            return outputs
        if adapter_names is not None:
            raise ValueError("A compiled model takes `ids`, not `adapter_names`: pass `ids=bank.ids(names)`.")
        if bank.store.added is not None:
            raise ValueError("A compiled model takes no mapped bank: call `bank.compact()`, which reads all of it.")
        if bank.store.packed.requires_grad and torch.is_grad_enabled():
            raise ValueError("Adapters are not trained by a compiled model: call the model that is not compiled.")
        bank.traced_rows = Rows(bank, bank.store, None if ids is None else RowGroups(ids + 1))
        try:
            return self.model(*args, **kwargs)
        finally:
            bank.traced_rows = None
