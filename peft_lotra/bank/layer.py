# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""What stands in a model while a bank is attached to it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..kan.row_updates import RowGroups, RowUpdates
from ..modules.calls import is_tracing
from ..tucker import Tucker, Update
from ..tuner.by_row import MixedBatch, PassVariable, check_batch, find_row_counts, run_mixed_batch
from ..tuner.linear_path import PATH, LinearPath
from .snapshot import NO_ROW


class BankPass(NamedTuple):
    """A forward pass whose samples have different adapters.

    Attributes:
        bank: The bank, an object of any type, whose layers they are for.
        updates: The updates of the samples, by layer; none in a pass of the base.
        row_counts, find_row_counts: See `ForwardPass`.
        outer: The pass around this one, perhaps of another bank.
    """

    bank: Any
    updates: dict[str, RowUpdates]
    row_counts: set[int]
    find_row_counts: Callable[[], set[int]] = set
    outer: Any = None


ROWS = PassVariable("lotra_bank_rows")  # a `BankPass`


@torch.compiler.disable
def find_pass(bank: Any) -> BankPass | None:
    """Return the innermost pass of a bank; None outside of one."""
    current = ROWS.get()
    while current is not None and current.bank is not bank:
        current = current.outer
    return current


def run_in_bank(
    layer: Any,
    forward: Callable,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Run a `LoTRALayer` of a network that serves a bank.

    In passes of the bank, samples have its adapters. Other passes take `forward`.
    """
    is_traced = is_tracing()
    bank = layer.lotra_bank
    name = layer.lotra_bank_name
    current = bank.traced_pass  # not None inside of a compiled `BankModel`
    if not is_traced or current is None:
        is_compiled = current is not None
        current = find_pass(bank)  # pyright: ignore[reportCallIssue]
        if is_compiled and current is None:
            raise RuntimeError("A compiled bank must be one graph: pass `fullgraph=True` to find the break.")
    if current is None:
        return forward(*args, **kwargs)
    if layer.merged_adapters:  # by `layer.merge()`; the model refuses to merge
        raise ValueError(
            f"Adapters are merged into `{layer.lotra_name}`, to which the bank would add its own. Call "
            "`unmerge_adapter()` first."
        )

    if name not in current.updates:
        return layer._run((), None, args, kwargs)
    if not is_traced:
        layer.check_grid(args)

    updates = current.updates[name]
    packed, groups, form = updates

    def run(row: int, args: tuple, kwargs: dict[str, Any]) -> Any:
        stored = layer.lotra_tensor.get_parameter(layer._modules["base_layer"])
        packed_components = Tucker(*form.unpack(packed[row : row + 1]))
        components = packed_components.map(lambda component: component[0].to(stored))
        return layer._call_base([Update(1.0, components)], args, kwargs)

    def read_rows() -> list[int]:
        return groups.of_rows().tolist()

    batch = MixedBatch(groups.batch(), current, read_rows, lambda: updates, run)
    return run_mixed_batch(layer, batch, args, kwargs)


def run_path_in_bank(
    bank: Any,
    network: LinearPath,
    forward: Callable,
    x: Tensor,
    y: Tensor,
) -> Tensor:
    """Add the path of a network that serves a bank; in passes of the bank, samples have its paths."""
    current = bank.traced_pass or find_pass(bank)  # pyright: ignore[reportCallIssue]
    if current is None:
        return forward(x, y)
    base: Any = network.path_of("__base__")
    total = type(base).forward(base, x, y)  # which `forward` of the module may have replaced
    updates = current.updates.get(PATH)
    if updates is None:
        return total
    packed, groups, _ = updates
    rows = groups.of_rows().to(packed.device)
    change = packed.index_select(0, rows).to(y)
    size = network.out_features
    weight, bias, scale = change.split([size * network.in_features, size, 1], 1)
    weight = weight.unflatten(1, (size, -1))
    samples, outputs = (tensor.unsqueeze(1).flatten(1, -2) for tensor in (x, y))  # (batch, rows, in or out)
    added = torch.baddbmm(bias.unsqueeze(1), samples, weight.mT)
    added = torch.addcmul(added, scale.unsqueeze(1), outputs)
    return total + added.view_as(y)


def refuse_adapters(adapter_name: str, config: Any) -> None:
    """Raise a ValueError in place of `update_layer`, since PEFT would leave the base trainable."""
    raise ValueError(
        "The network serves an AdapterBank, perhaps as a copy of one. Adapt a copy made before `attach()`, or train "
        "in the bank, by `bank.add(name, LoTRAConfig(...))` and `BankAdamW`."
    )


class BankModel(nn.Module):
    """A model whose rows have the adapters of a bank, see `AdapterBank.attach`.

    Attributes:
        model (`nn.Module`): The model.
        bank (`AdapterBank`): The bank.
    """

    def __init__(self, model: nn.Module, bank: Any) -> None:
        super().__init__()
        self.model = model
        self.bank = bank
        self.is_attached = True

    def forward(
        self,
        *args: Any,
        adapter_names: Any = None,
        ids: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Return the output of the model.

        Args:
            adapter_names (`list[str]`): The adapter of each row, `"__base__"` for none.
            ids (`torch.Tensor`): The same by id, (rows,) int64, -1 for none; see `AdapterBank.ids`.

        Raises:
            ValueError: A name is unknown, an id belongs to no adapter, or there is not one for each row; both
                arguments are given; the bank was detached.
            RuntimeError: The same of an id in a compiled or exported model.
        """
        bank = self.bank
        if adapter_names is not None and (ids is not None or is_tracing()):
            raise ValueError(
                "Pass `adapter_names` or `ids`, not both. A compiled model takes only `ids=bank.ids(names)`."
            )
        adapters = ids if adapter_names is None else adapter_names
        if adapters is not None and not self.is_attached:
            raise ValueError("The bank was detached from this model: use the model that `bank.attach()` returns.")
        if is_tracing():
            bank.traced_pass = self._trace_pass(ids, args, kwargs)
            try:
                return self.model(*args, **kwargs)
            finally:
                bank.traced_pass = None

        count = 0 if adapters is None else len(adapters)

        def count_rows() -> set[int]:
            layers = [module for module in self.model.modules() if "lotra_bank" in vars(module)]
            with ROWS.set(BankPass(bank, {}, set())):
                return find_row_counts(self.model, layers, count, args, kwargs)

        current = bank._pass_of(adapters)
        if adapters is not None:
            argument = "ids" if adapter_names is None else "adapter_names"
            check_batch(count, args, kwargs, argument)
            current = current._replace(find_row_counts=count_rows)
        with ROWS.set(current):
            outputs = self.model(*args, **kwargs)
            ROWS.keep(outputs)
        return outputs

    def _trace_pass(
        self,
        ids: torch.Tensor | None,
        args: tuple,
        kwargs: dict[str, Any],
    ) -> BankPass:
        """Return the pass of a graph, whose ids are an input."""
        snapshot = self.bank.snapshot
        if ids is None:
            return BankPass(self.bank, {}, set())
        check_batch(ids.shape[0], args, kwargs, "ids")
        rows = snapshot.find_rows(ids)
        is_known = (rows != NO_ROW).all()
        torch._assert_async(is_known, "An id belongs to no adapter.")  # pyright: ignore[reportPrivateImportUsage]
        if torch.compiler.is_exporting():
            # ONNX would broadcast a single id, but it stacks only tensors of one length
            columns = [rows]
            for leaf in tree_leaves((args, kwargs)):
                is_matrix = isinstance(leaf, torch.Tensor) and leaf.dim() > 1
                if is_matrix and leaf.shape[0] == ids.shape[0]:
                    columns.append(leaf.flatten(1)[:, 0].to(rows))
            rows = torch.stack(columns)[0]
        updates = snapshot.updates_of_samples(snapshot.packed, RowGroups(rows))
        return BankPass(self.bank, updates, set())
