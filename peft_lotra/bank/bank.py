# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding

from ..hub.card import README, write_bank_card
from ..kan.row_updates import PackedTucker, RowGroups, group_rows
from ..modules.calls import LayerLock, check_loaded, places, unwrap
from ..modules.folders import replacing_files
from ..tucker import full_shape
from ..tuner.base_record import record_layer
from ..tuner.config import LoTRAConfig
from ..tuner.layer import LoTRALayer, check_unmerged
from ..tuner.linear_path import PATH, LinearPath
from ..tuner.saving import write_updates
from ..tuner.targets import find_targets
from .layer import ROWS, BankModel, BankPass, find_pass, refuse_adapters, run_in_bank, run_path_in_bank
from .reading import Adapter, check_methods, match_layers, read_adapter
from .snapshot import BASE, Form, Snapshot, check_finite, check_known
from .storage import read_bank, write_bank


class AdapterBank:
    r"""
    Store thousands of LoTRA adapters of one base as the rows of one matrix, and serve them in one batch.

    A batch whose rows have different adapters takes one evaluation of the base. An adapted layer computes

        y[n, o] = sum_{i,k} (A[o, i, k] + D_n[o, i, k]) f_k(x[n, i]),  D_n = core x1 factor_out x2 factor_in x3
        factor_basis, the update of the adapter of row n,

    The functions f_k and the product with A are computed once, the product with D_n from the components of each row.
    Layers whose kind has no `basis` (pykan, convolutions) run once for each adapter in the batch. If they normalize by
    the whole batch (KALN), a batch of several adapters is refused. Zeros fill lower ranks. A full mode has no factor,
    or the identity where other adapters have one. Both are exact. Adapters that save modules are refused.

    Args:
        base (`nn.Module`): The model that the adapters are for. It is not changed.
        dtype (`torch.dtype`, *optional*): The dtype in which adapters are stored, e.g. `torch.bfloat16`; by default
            the dtype of the base, but at least float32.

    Raises:
        ValueError: The base has no KAN layers, merged adapters, or adapters of other methods such as LoRA.

    Example:
        >>> import torch
        >>> from peft import get_peft_model
        >>> from peft_lotra import AdapterBank, LoTRAConfig
        >>> from peft_lotra.kan import KAN
        >>> base = KAN([2, 4, 1])
        >>> bank = AdapterBank(base)
        >>> adapted = get_peft_model(KAN([2, 4, 1]), LoTRAConfig(r=2))
        >>> bank.add("anna", adapted, check_base="ignore")
        >>> model = bank.attach(base)
        >>> y = model(torch.rand(2, 2), adapter_names=["anna", "__base__"])
        >>> y.shape, bank.names
        (torch.Size([2, 1]), ['anna'])
    """

    def __init__(
        self,
        base: nn.Module,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.base = unwrap(base)
        check_unmerged(self.base)
        check_loaded(self.base, "base")
        check_methods(self.base, "The base")
        self.record = {}
        layers = {}
        for name, target in find_targets(LoTRAConfig(), self.base).items():
            self.record[name] = record_layer(LoTRALayer(*target, name))
            shape = full_shape(target.tensor)
            layers[name] = PackedTucker(shape, (0,) * len(shape))
            if dtype is None:
                stored = target.tensor.get_parameter(target.layer)
                dtype = torch.promote_types(stored.dtype, torch.float32)
        if isinstance(self.base, LinearPath):
            count = self.base.path_of(BASE).values().numel()
            layers[PATH] = PackedTucker((count, 1, 1), (0, 0, 0))  # the change of its values
        packed = torch.zeros(1, 0, dtype=dtype, device="cpu")
        # read once by whoever needs several of its fields, and replaced as a whole, under the lock
        self.snapshot = Snapshot.of_rows(packed, layers, [Form({})], {BASE: 0})
        self.traced_pass: BankPass | None = None  # the pass that a compiler traces
        self._lock = LayerLock()
        self._agreeing_records = []  # records of bases that agreed with this one
        self._replaced: list[tuple[nn.Module, str, Any]] = []  # attributes before `attach`; None for new ones
        self._loaded_from: str | None = None  # a folder or repository, if only some of its adapters were loaded

    @classmethod
    def from_folders(
        cls,
        base: nn.Module,
        folders: Mapping[str, Any] | Iterable[Any],
        dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> AdapterBank:
        """Return a bank of saved adapters.

        Args:
            base (`nn.Module`): The model that the adapters are for.
            folders (`dict` or `list`): Folders by the names of the adapters, or folders whose names are these names.
            dtype (`torch.dtype`, *optional*): As for a new bank.
            kwargs: Arguments of `add`.
        """
        bank = cls(base, dtype)
        if isinstance(folders, Mapping):
            pairs = folders.items()
        else:
            pairs = [(Path(path).name, path) for path in folders]
        for name, path in pairs:
            bank.add(name, path, **kwargs)
        return bank

    # --- the adapters ---

    @property
    def names(self) -> list[str]:
        """The names of the adapters, in the order in which they were added."""
        return list(self.snapshot.ids)[1:]

    def __len__(self) -> int:
        return len(self.snapshot.ids) - 1

    def __contains__(self, name: object) -> bool:
        return name != BASE and name in self.snapshot.ids

    def __repr__(self) -> str:
        packed = self.snapshot.packed
        return f"AdapterBank({len(self)} adapters of {packed.shape[1]} parameters, {packed.dtype}, {packed.device})"

    def ids(self, names: Sequence[str]) -> Tensor:
        """Return the ids of adapters, (n,) int64, on the device of the bank; -1 for `"__base__"`.

        An adapter keeps its id until it is removed or replaced. No other adapter ever gets it.

        Raises:
            ValueError: A name is unknown; the message has the first three.
        """
        return self.snapshot.ids_of(names)

    def add(
        self,
        name: str,
        adapter: Adapter | AdapterBank,
        *,
        alpha: float = 1.0,
        replace: bool = False,
        check_base: str | None = "error",
    ) -> None:
        """Add an adapter; on an error the bank is as before.

        Args:
            name (`str`): Its name in the bank.
            adapter: One of the following.

                * A folder or a repository that `save_pretrained` wrote.
                * A PeftModel, whose active adapter is added.
                * A state dict as `get_peft_model_state_dict` returns it.
                * Another bank of the same base, whose adapter of this name is copied.
                * The `LoTRAConfig` of a new adapter, which starts as `get_peft_model` starts it.
            alpha (`float`): Scale of the update. Only for state dicts, which do not store it.
            replace (`bool`): Whether an adapter of this name may be replaced. Passes that have begun go on with it.
            check_base (`str`, *optional*): As in `LoTRAConfig`. A state dict says nothing of its base.

        Raises:
            ValueError: The name is known, or the adapter is of another base, grid or kind of layer, or damaged.
        """
        if not isinstance(name, str) or name in ("", BASE):
            raise ValueError(
                f"An adapter cannot be called {name!r:.100}: pass a string; '__base__' stands for the base."
            )
        try:
            if isinstance(adapter, AdapterBank):
                if adapter.base is not self.base:
                    raise ValueError("the other bank has another base. Load it by `AdapterBank.load(base, folder)`.")
                updates, start = adapter.snapshot.updates_of(name)
            else:
                updates, start = read_adapter(adapter, self.base, alpha, check_base, self._agreeing_records)
            with self._change() as snapshot:
                if name in self and not replace:
                    raise ValueError("the bank has an adapter of this name already. Pass `replace=True`.")
                self.snapshot = snapshot.with_adapter(name, updates, start)
        except (ValueError, TypeError, OSError) as error:
            raise ValueError(f"The adapter {name!r} was not added: {error}") from error

    @contextmanager
    def _change(self) -> Iterator[Snapshot]:
        """Yield the adapters while no other thread changes them."""
        with self._lock, torch.inference_mode(False), torch.no_grad():
            if self.snapshot.packed.requires_grad:
                raise ValueError("Adapters of the bank are in training: call `finish()` of their optimizer first.")
            yield self.snapshot

    def remove(self, name: str) -> None:
        """Remove an adapter. Passes that have begun go on with it."""
        with self._change() as snapshot:
            check_known([name], self.names)
            self.snapshot = snapshot.without_adapter(name)

    def compact(self) -> None:
        """Free the memory of removed adapters, their ranks, and the room for more."""
        with self._change() as snapshot:
            self.snapshot = snapshot.compact()

    def to(self, device: torch.device | str) -> AdapterBank:
        """Move the adapters to a device. A pass moves the adapters of its rows to the device of each layer."""
        with self._change() as snapshot:
            snapshot = snapshot.rebuild()
            packed = snapshot.packed.to(device)
            row_of = snapshot.row_of.to(device)
            self.snapshot = snapshot._replace(packed=packed, row_of=row_of)
        return self

    # --- training ---

    def start_training(
        self,
        names: Sequence[str] | None = None,
    ) -> tuple[nn.Parameter, Tensor]:
        """Make adapters trainable, by default all; `peft_lotra.BankAdamW` trains them.

        From then on the bank takes and loses no adapters, until `stop_training`.

        Returns:
            The components of all adapters as a parameter (room, width). Its gradient is sparse, with the rows of the
            adapters in the batch. And a mask (room, width) of the trained entries, without the entries that fill lower
            ranks and full modes.

        Raises:
            ValueError: A name is unknown, or the bank is empty, of half precision, or trained already.
        """
        with self._change() as snapshot:
            snapshot = snapshot.rebuild()  # a matrix of its own, since passes that have begun read the former one
            rows = snapshot.rows_of(self.names if names is None else names)
            packed = nn.Parameter(snapshot.packed)
            if packed.itemsize < 4:
                raise ValueError("Only adapters of float32 or float64 are trained: load the bank with such a `dtype`.")
            if not len(rows) or 0 in rows:
                raise ValueError("There is no adapter to train, or '__base__' is named, which has none.")
            trained = torch.zeros(len(packed), dtype=torch.bool, device=rows.device)
            trained[rows] = True
            is_component = snapshot.fill_components(lambda form, layer: {}).bool()
            self.snapshot = snapshot._replace(packed=packed)
        return packed, is_component & trained.unsqueeze(1)

    def stop_training(self) -> None:
        """End what `start_training` began; the adapters stay as they are trained."""
        with self._lock, torch.inference_mode(False):
            # a copy, since the optimizer still has the parameter
            packed = self.snapshot.packed.detach().clone()
            self.snapshot = self.snapshot._replace(packed=packed)

    def mean_by_adapter(self, errors: Tensor, ids: Tensor) -> Tensor:
        """Return the mean error of each adapter, (room,), at its id; NaN without rows.

        Args:
            errors (`torch.Tensor`): The error of each row, (rows,).
            ids (`torch.Tensor`): The id of the adapter of each row, (rows,).

        Raises:
            ValueError: An id belongs to no adapter.
            RuntimeError: There is not one id for each error.
        """
        snapshot = self.snapshot
        snapshot.rows_of(ids)  # refuses unknown ids
        room = len(snapshot.row_of) - 1
        index = ids.to(errors.device, torch.int64) + 1  # the base comes first, and is left out
        sums = errors.new_zeros(room).index_add(0, index, errors)
        counts = index.bincount(minlength=room)
        # not 0 / 0, whose gradient is NaN too
        means = sums / counts.clamp(1)
        return means.masked_fill(counts == 0, torch.nan)[1:]

    # --- files ---

    def save(
        self,
        folder: str | os.PathLike,
        skip: Sequence[str] = (),
    ) -> None:
        """Write all adapters into one file, adapter_bank.safetensors, with a table of their names.

        Args:
            folder (`str`): The folder, which is made if there is none.
            skip (`list[str]`): Adapters that are left out, for instance because they are not finite.

        Raises:
            ValueError: A name in `skip` is unknown; or an adapter has NaN or infinity. Or the bank holds only some
                adapters of this folder, and the others would be lost. The folder stays as it was.
        """
        self._check_whole(os.path.realpath(folder))
        with replacing_files(folder) as stage:
            snapshot = self.snapshot  # not earlier: another thread may have saved a later one while this one waited
            skipped = {skip} if isinstance(skip, str) else set(skip)
            check_known(skipped, list(snapshot.ids)[1:])
            names = [name for name in snapshot.ids if name not in skipped]
            write_bank(stage, snapshot, names, self.record)

    def _check_whole(self, target: str) -> None:
        """Raise a ValueError if the target has adapters that `load(names=...)` left out."""
        if self._loaded_from == target:
            raise ValueError(
                f"The bank holds only some adapters of {target}, and the others would be lost. Save it elsewhere, or "
                "load the whole bank and add these to it: `whole.add(name, bank, replace=True)`."
            )

    @classmethod
    def load(
        cls,
        base: nn.Module,
        folder: str | os.PathLike,
        dtype: torch.dtype | None = None,
        check_base: str | None = "error",
        names: Sequence[str] | None = None,
        revision: str | None = None,
    ) -> AdapterBank:
        """Read a bank that `save` or `push_to_hub` wrote.

        Args:
            base (`nn.Module`): The model that the adapters are for.
            folder (`str`): The folder, or the repository on the Hub.
            dtype (`torch.dtype`, *optional*): As for a new bank; by default the dtype of the file.
            check_base (`str`, *optional*): As in `LoTRAConfig`.
            names (`list[str]`, *optional*): The adapters to keep, by default all.
            revision (`str`, *optional*): The revision of the repository.

        Raises:
            ValueError: There is no bank in the folder, or no adapter of a name; it is damaged (the message has the
                names), or of another base.
        """
        folder = os.fspath(folder)
        bank = cls(base, dtype)
        snapshot = read_bank(folder, bank.base, check_base, names, revision)
        if dtype is not None:
            snapshot = snapshot._replace(packed=snapshot.packed.to(dtype))
            check_finite(snapshot.packed, snapshot.ids, "Load the bank in another `dtype`.")
        bank.snapshot = snapshot
        if names is not None:
            is_folder = os.path.isdir(folder)
            bank._loaded_from = os.path.realpath(folder) if is_folder else folder
        return bank

    def _write_for_hub(
        self,
        folder: str,
        repo_id: str,
        base_model: str | None = None,
        base_code: str | None = None,
    ) -> None:
        """Write the file and the card that `peft_lotra.push_to_hub` uploads."""
        self._check_whole(repo_id)
        snapshot = self.snapshot
        names = list(snapshot.ids)
        write_bank(folder, snapshot, names, self.record)
        write_bank_card(folder, repo_id, names[1:], self.base, base_model, base_code)

    def export(self, name: str, folder: str | os.PathLike) -> None:
        """Write one adapter as a folder that `PeftModel.from_pretrained` loads; its alpha is in the cores."""
        updates, start = self.snapshot.updates_of(name)
        with replacing_files(folder, README) as stage:
            write_updates(stage, updates, start, self.record, self.base)

    # --- serving ---

    def attach(self, model: nn.Module | None = None) -> BankModel:
        """Put the bank into a model, by default its base, until `detach`.

        The KAN layers of the model get another module around them. A PeftModel goes on as before in calls of its own;
        its adapters take no part in calls of the returned model. In passes with adapters, parameters of KAN
        layers get no gradients.

        Args:
            model (`nn.Module`, *optional*): A model with the layers of the base.

        Returns:
            `BankModel`: It takes the arguments of the model, and `adapter_names=`, a name for each row, or `ids=`.
                Without them, a call is the base's.

        Raises:
            ValueError: The bank is attached; the model is another base, or has merged adapters, or adapters of other
                methods; the base has changed since the bank was created: load its weights first.
        """
        network = unwrap(self.base if model is None else model)
        check_unmerged(network)
        check_methods(network, "The model")
        try:
            targets, names = match_layers(self.record, network, "error")
        except ValueError as error:
            raise ValueError(
                "The model is another base, or has changed since the bank was created. Load its weights first, then "
                "create the bank and add the adapters."
            ) from error
        if self._replaced or any("lotra_bank" in vars(module) for module in network.modules()):
            raise ValueError("The bank, or another bank of the model, is attached: call its `detach()` first.")
        self._replaced = [(module, "training", module.training) for module in network.modules()]

        bank_layers: dict[Any, LoTRALayer] = {}
        for name, name_in_model in names.items():
            layer = network.get_submodule(name_in_model)
            bank_layer = layer
            if not isinstance(layer, LoTRALayer):  # others stay, since PEFT goes on to find them
                bank_layer = LoTRALayer(*targets[name_in_model], name)
                vars(bank_layer).update(training=layer.training, update_layer=refuse_adapters)
                bank_layers[layer] = bank_layer
            attributes = vars(bank_layer)
            for key in ("forward", "lotra_bank"):
                self._replaced.append((bank_layer, key, attributes.get(key)))
            forward = partial(run_in_bank, bank_layer, bank_layer.forward)
            attributes.update(forward=forward, lotra_bank=self, lotra_bank_name=name)

        if isinstance(network, LinearPath):
            path = network.linear_path
            self._replaced.append((path, "forward", None))
            vars(path)["forward"] = partial(run_path_in_bank, self, network, path.forward)

        for parent, name, child in places(network):
            if child in bank_layers:
                self._replaced.append((parent, name, child))
                parent._modules[name] = bank_layers[child]

        served = BankModel(network, self)
        self._replaced.append((served, "is_attached", False))
        return served

    def detach(self) -> None:
        """Take the bank out of the model that it is attached to, which is as before, also in its modes."""
        for module, name, value in self._replaced:
            if value is None:
                delattr(module, name)
            else:
                setattr(module, name, value)
        self._replaced = []

    @contextmanager
    def rows(
        self,
        rows: Sequence[str] | Sequence[int] | Tensor | None,
    ) -> Iterator[None]:
        """Give the rows that adapted layers get these adapters, names or ids; None for none.

        For models that change the order of rows on their way, and for calls of a part of a model.

        Raises:
            ValueError: A name is unknown, an id belongs to no adapter, or the bank is attached to no model.
        """
        if rows is not None and not self._replaced:
            raise ValueError("The bank is attached to no model: call `attach()` first.")
        with ROWS.set(self._pass_of(rows)):
            yield

    def _pass_of(
        self,
        adapters: Sequence[str] | Sequence[int] | Tensor | None,
    ) -> BankPass:
        """Return the pass of rows with these adapters; without them the pass that is set, or a pass of the base."""
        current: Any
        if adapters is None:
            current = find_pass(self) or BankPass(self, {}, set())  # pyright: ignore[reportArgumentType]
        else:
            snapshot = self.snapshot
            rows = snapshot.rows_of(adapters)
            distinct, groups = group_rows(rows)
            if snapshot.packed.requires_grad and torch.is_grad_enabled():
                packed = embedding(distinct, snapshot.packed, sparse=True)
            elif groups.size == 1:
                # each layer gathers its columns
                packed = snapshot.packed
                groups = RowGroups(rows)
            else:
                packed = snapshot.packed.index_select(0, distinct)
            updates = snapshot.updates_of_samples(packed, groups)
            current = BankPass(self, updates, set())
        return current._replace(outer=ROWS.get())
