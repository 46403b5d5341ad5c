# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import os
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from tempfile import TemporaryDirectory
from typing import Any

import torch
from huggingface_hub import CommitInfo
from torch import Tensor, nn
from torch.nn.functional import embedding

from ..hub.push import fetch_card, upload
from ..kan.row_product import RowGroups, group_rows
from ..kan.slim_kan import SlimKANLinear
from ..layers.slim import SlimLayer
from ..modules.calls import LayerLock, places, unwrap
from ..tucker import Update, full_shape
from ..tuner.base_record import record_layer
from ..tuner.config import LoTRAConfig
from ..tuner.layer import LoTRALayer, check_unmerged
from ..tuner.rows import check_names
from ..tuner.targets import find_targets
from .layer import ROWS, BankLayer, BankModel, Rows, SlimBankLayer
from .reading import Adapter, match_layers, read_adapter
from .storage import export_adapter, read_bank, write_bank, write_card
from .store import Store


# Rows of removed adapters that are not written to yet: passes that have begun may read them.
_SPARE = 64


class AdapterBank:
    r"""
    The LoTRA adapters of one base, thousands of them, side by side as rows of one matrix.

    A batch whose rows have different adapters takes one evaluation of the base: an adapted layer computes

        y[n, o] = sum_{i,k} (A[o, i, k] + D_n[o, i, k]) f_k(x[n, i]),  D_n = core x1 factor_out x2 factor_in x3
        factor_basis, the update of the adapter of row n,

    where the functions f_k and the part of A are computed once, and that of D_n from the components of each row.
    Layers whose kind has no `basis` (pykan, convolutions) run once for each adapter in the batch. Lower ranks are
    filled with zeros, which is exact. Adapters that save modules are not taken.

    Args:
        base (`nn.Module`): The model that the adapters are for. It is not changed.
        dtype (`torch.dtype`, *optional*): The dtype in which adapters are stored, e.g. `torch.bfloat16`; by default
            that of the base, but at least float32.

    Raises:
        ValueError: The base has no KAN layers, or merged adapters.

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

    def __init__(self, base: nn.Module, dtype: torch.dtype | None = None) -> None:
        if dtype is not None and not dtype.is_floating_point:
            raise ValueError(f"`dtype` is {dtype}, but must be a floating type.")
        self.base = unwrap(base)
        check_unmerged(self.base)
        targets = find_targets(LoTRAConfig(), self.base)
        self.record = {name: record_layer(LoTRALayer(*target, name)) for name, target in targets.items()}
        shapes = {name: full_shape(target.tensor) for name, target in targets.items()}
        target = next(iter(targets.values()))
        stored = target.tensor.get_parameter(target.layer)
        self.store = Store.empty(shapes, dtype or torch.promote_types(stored.dtype, torch.float32))
        self.traced_rows: Rows | None = None  # the rows of the pass that a compiler traces
        self._rows: dict[str, int] = {}  # of the matrix, by name
        self._free: list[int] = []
        self._known: list[Any] = []  # records of bases that agreed with this one
        self._before: list[tuple[nn.Module, str, Any]] = []  # attributes of the model before it was attached to
        self._trained: Tensor | None = None  # which rows of the matrix are in training
        self._lock = LayerLock()

    @classmethod
    def from_folders(
        cls,
        base: nn.Module,
        folders: Mapping[str, Any] | Iterable[Any],
        dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> AdapterBank:
        """A bank of saved adapters: `folders` by the names of the adapters, or paths whose last parts are the names.

        `kwargs` are those of `add`.
        """
        bank = cls(base, dtype)
        of_path = lambda path: (os.path.basename(os.path.normpath(path)), path)  # noqa: E731
        for name, folder in folders.items() if isinstance(folders, Mapping) else map(of_path, folders):
            bank.add(name, folder, **kwargs)
        return bank

    # --- the adapters ---

    @property
    def names(self) -> list[str]:
        """The names of the adapters, in the order in which they were added."""
        return list(self._rows)

    def __len__(self) -> int:
        return len(self._rows)

    def __contains__(self, name: object) -> bool:
        return name in self._rows

    def __repr__(self) -> str:
        packed = self.store.packed
        return f"AdapterBank({len(self)} adapters of {packed.shape[1]} numbers, {packed.dtype}, {packed.device})"

    def ids(self, names: Sequence[str]) -> Tensor:
        """The numbers of adapters, (rows,) int64, on the device of the bank; -1 for `"__base__"`.

        An adapter keeps its number until it is removed or replaced, or `compact` is called.

        Raises:
            ValueError: A name is unknown; the message has the first three.
        """
        return self._index(check_names(names)) - 1

    def _index(self, names: Sequence[str] | Sequence[int] | Tensor) -> Tensor:
        """The rows of the matrix (rows,) of adapters, by name or number; a ValueError for what is none."""
        rows = self._rows
        if isinstance(names, Tensor) or isinstance(next(iter(names), None), int):
            ids = names if isinstance(names, Tensor) else torch.tensor(names, device="cpu")
            if ids.dim() != 1 or ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
                raise ValueError(f"`ids` must be integers (rows,), got {ids.dtype} of the shape {tuple(ids.shape)}.")
            index = ids.to(torch.int64) + 1
            inside = (index >= 0) & (index < len(self.store.form_of))
            used = inside.cpu() & (self.store.form_of[(index * inside).cpu()] >= 0)
            if not bool(used.all()):
                wrong = ", ".join(map(str, ids.cpu()[~used].unique()[:3].tolist()))
                raise ValueError(f"No adapter has the number {wrong}. `bank.ids(names)` has them.")
            return index
        found = [0 if name == "__base__" else rows.get(name, -1) for name in check_names(names)]
        if -1 in found:
            unknown = [name for name in dict.fromkeys(names) if name != "__base__" and name not in rows]
            raise ValueError(f"The bank has no adapter {', '.join(map(repr, unknown[:3]))} ({len(unknown)} unknown).")
        # `torch.tensor` of a list takes several times as long
        return torch.frombuffer(array("q", found), dtype=torch.int64).to(self.store.packed.device)

    def add(
        self,
        name: str,
        adapter: Adapter | AdapterBank,
        *,
        adapter_name: str | None = None,
        alpha: float = 1.0,
        replace: bool = False,
        check_base: str | None = "error",
    ) -> None:
        """Adds an adapter; on an error the bank is as before.

        Args:
            name (`str`): Its name in the bank.
            adapter: A folder or a repository that `save_pretrained` wrote, a PeftModel, a state dict as
                `get_peft_model_state_dict` returns it, another bank of the same base, whose adapter of this name is
                copied, or the `LoTRAConfig` of a new one, which starts as `get_peft_model` starts it.
            adapter_name (`str`, *optional*): Which adapter of a PeftModel; by default the active one.
            alpha (`float`): The factor of the update, of a state dict alone: it has none.
            replace (`bool`): Whether an adapter of this name may be replaced. Passes that have begun go on with it.
            check_base (`str`, *optional*): As in `LoTRAConfig`. A state dict says nothing of its base.

        Raises:
            ValueError: The name is known, or the adapter is of another base, grid or kind of layer, or damaged.
        """
        if not isinstance(name, str) or not name or name == "__base__":
            raise ValueError(f"The name of an adapter must be a string other than '__base__', got {name!r:.100}.")
        if name in self._rows and not replace:
            raise ValueError(f"The bank has an adapter {name!r} already. Pass `replace=True`, or another name.")
        self._check_resting()
        try:
            if isinstance(adapter, AdapterBank):
                updates, from_gradient = adapter._updates_of(name, self.base)
            else:
                updates, from_gradient = read_adapter(adapter, self.base, adapter_name, alpha, check_base, self._known)
        except (ValueError, TypeError, OSError) as error:
            raise ValueError(f"The adapter {name!r} was not added: {error}") from error
        with self._lock, torch.inference_mode(False), torch.no_grad():
            used = 1 + len(self._rows) + len(self._free)
            row = self._free.pop(0) if len(self._free) > _SPARE else used
            store = self.store.with_ranks({layer: it.tensor.ranks for layer, it in updates.items()}).with_row(row)
            store.write(row, updates, from_gradient)
            self.store = store
            if name in self._rows:
                self._release(self._rows[name])
            self._rows[name] = row

    def _updates_of(self, name: str, base: nn.Module) -> tuple[dict[str, Update], bool]:
        """The updates of an adapter, for a bank of this base, and whether it started from the gradient."""
        if base is not self.base:
            raise ValueError(
                "the other bank has another base. Load it with this one, `AdapterBank.load(base, folder)`."
            )
        row = int(self._index([name]))
        updates = {layer: Update(1.0, parts) for layer, parts in self.store.components(row).items()}
        return updates, bool(self.store.from_gradient()[row])

    def remove(self, name: str) -> None:
        """Removes an adapter. Its number may be given to another one."""
        self._check_resting()
        if name not in self._rows:
            raise ValueError(f"The bank has no adapter {name!r} to remove.")
        with self._lock:
            self._release(self._rows.pop(name))

    def _release(self, row: int) -> None:
        self.store.form_of[row] = -1
        self._free.append(row)

    def compact(self) -> None:
        """Gives back the memory of removed adapters, and of the room for more; adapters get new numbers."""
        self._check_resting()
        with self._lock, torch.inference_mode(False), torch.no_grad():
            self.store = self.store.select([0, *self._rows.values()])
            self._rows, self._free = {name: row for row, name in enumerate(self._rows, 1)}, []

    def to(self, device: torch.device | str) -> AdapterBank:
        """Moves the adapters to a device; those of each row are taken to that of the layer in each pass."""
        self._check_resting()
        store = self.store.in_memory()
        self.store = store._replace(packed=store.packed.to(device))
        return self

    # --- training ---

    def start_training(self, names: Sequence[str] | None = None) -> tuple[nn.Parameter, Tensor]:
        """Makes adapters trainable, by default all; `peft_lotra.optim.BankAdamW` trains them.

        From then on all rows of passes with gradients must have one of them, and the bank takes and loses none.

        Returns:
            The numbers of all adapters as a parameter (room, width), whose gradient is sparse, with the rows of the
            adapters in the batch; and which of the numbers are trained (room, width): not zeros that fill lower ranks.

        Raises:
            ValueError: A name is unknown, or the bank is empty, of half precision, or trained already.
        """
        self._check_resting()
        rows = self._index((self.names or ["__base__"]) if names is None else names)
        if self.store.packed.dtype.itemsize < 4 or not bool((rows > 0).all()):
            raise ValueError("Only adapters of float32 or float64 are trained: load the bank with such a `dtype`.")
        with torch.inference_mode(False), torch.no_grad():
            store = self.store.in_memory()
            self._trained = torch.zeros(len(store.packed), dtype=torch.bool, device=rows.device)
            self._trained[rows] = True
            packed = nn.Parameter(store.packed)
            self.store = store._replace(packed=packed)
            return packed, store.entries() & self._trained.unsqueeze(1)

    def check_trained(self, ids: Tensor) -> Tensor:
        """The rows of the matrix (rows,) of adapters, by number; a ValueError if one is not in training."""
        rows = self._index(ids).to(self.store.packed.device)
        wrong = [] if self._trained is None else rows[~self._trained[rows]][:3].tolist()
        if wrong:
            names = [name for name, row in {"__base__": 0, **self._rows}.items() if row in wrong]
            raise ValueError(
                f"Rows of the batch have adapters that are not in training: {', '.join(map(repr, names))}. Leave them "
                "out, or call the model under `torch.no_grad()`."
            )
        return rows

    def stop_training(self) -> None:
        """Ends what `start_training` began; the adapters stay as they are trained."""
        self.store, self._trained = self.store._replace(packed=self.store.packed.detach()), None

    def _check_resting(self) -> None:
        if self._trained is not None:
            raise ValueError("Adapters of the bank are in training: call `finish()` of their optimizer first.")

    def mean_by_adapter(self, errors: Tensor, ids: Tensor) -> Tensor:
        """The mean error of each adapter, (room,), at its number; NaN where it has no rows.

        Args:
            errors (`torch.Tensor`): The error of each row, (rows,).
            ids (`torch.Tensor`): The number of the adapter of each row, (rows,).

        Raises:
            ValueError: A number belongs to no adapter, or the shapes differ.
        """
        index = self._index(ids)
        if errors.shape != index.shape:
            raise ValueError(f"`errors` must have one number for each of {len(ids)} rows, got {tuple(errors.shape)}.")
        sums = errors.new_zeros(len(self.store.form_of)).index_add(0, index, errors)
        return (sums / index.bincount(minlength=len(sums)))[1:]

    # --- files ---

    def save(self, folder: str | os.PathLike) -> None:
        """Writes all adapters into one file, adapter_bank.safetensors, with a table of their names."""
        write_bank(folder, self.store.select([0, *self._rows.values()]), self.names, self.record)

    @classmethod
    def load(
        cls,
        base: nn.Module,
        folder: str | os.PathLike,
        dtype: torch.dtype | None = None,
        mapped: bool = False,
        skip_damaged: bool = False,
        check_base: str | None = "error",
        names: Sequence[str] | None = None,
        revision: str | None = None,
    ) -> AdapterBank:
        """Reads a bank that `save` or `push_to_hub` wrote.

        Args:
            base (`nn.Module`): The model that the adapters are for.
            folder (`str`): The folder, or the repository on the Hub.
            dtype (`torch.dtype`, *optional*): As of a new bank; by default that of the file.
            mapped (`bool`): Whether adapters stay in the file until they are used, for banks larger than memory: the
                operating system keeps those that were used last. They are not checked. Those that are added later are
                in memory; `compact`, `to`, training, and an adapter of larger ranks read all of them.
            skip_damaged (`bool`): Whether damaged adapters are left out, with a warning, instead of an error.
            check_base (`str`, *optional*): As in `LoTRAConfig`.
            names (`list[str]`, *optional*): The adapters to read; of the others nothing is read, or downloaded.
            revision (`str`, *optional*): The revision of the repository.

        Raises:
            ValueError: There is no bank in the folder, or no adapter of a name; it is damaged (the message has the
                names), or of another base.
        """
        store, names, record = read_bank(os.fspath(folder), mapped, skip_damaged, names, revision)
        bank = cls(base, store.packed.dtype if mapped or dtype is None else dtype)
        _, own = match_layers(record, bank.base, check_base)
        layers = {own[name]: form for name, form in store.layers.items()}
        forms = [form._replace(layers={own[name]: it for name, it in form.layers.items()}) for form in store.forms]
        packed = store.packed.to(bank.store.packed.dtype)
        bank.store = store._replace(packed=packed, layers=layers, forms=forms)
        bank._rows = {name: row for row, name in enumerate(names, 1)}
        return bank

    def push_to_hub(
        self, repo_id: str, *, base_model: str | None = None, base_code: str | None = None, **kwargs: Any
    ) -> CommitInfo:
        """Pushes the bank to the Hugging Face Hub: one file, and a card with a table of the adapters.

        Text that a person wrote in the README.md of the repository is kept.

        Args:
            repo_id (`str`): The repository, "user/name". It is created if it does not exist.
            base_model (`str`, *optional*): The repository of the base.
            base_code (`str`, *optional*): Python code that assigns the base to the variable `base`, for the card.
            kwargs: `private`, `revision`, `token` and `create_pr`, as in `peft_lotra.push_to_hub`.

        Raises:
            ValueError: The bank is empty, or the repository is public despite `private`.
        """
        if not self._rows:
            raise ValueError("The bank is empty: add adapters before it is pushed.")
        with TemporaryDirectory() as folder:
            repo_id = fetch_card(folder, repo_id, kwargs.get("revision"), kwargs.get("token"))
            self.save(folder)
            write_card(folder, repo_id, self.names, self.base, base_model, base_code)
            return upload(folder, repo_id, f"Upload {len(self)} LoTRA adapters", **kwargs)

    def export(self, name: str, folder: str | os.PathLike) -> None:
        """Writes one adapter as a folder that `PeftModel.from_pretrained` loads; its alpha is in the cores."""
        if name not in self._rows:
            raise ValueError(f"The bank has no adapter {name!r} to export.")
        export_adapter(folder, self.store, self._rows[name], self.record, self.base)

    # --- serving ---

    def attach(self, model: nn.Module | None = None, needs_adapters: bool = False) -> BankModel:
        """Puts the bank into a model, by default its base, until `detach`.

        The KAN layers of the model get another module around them. A PeftModel goes on as before in calls of its own;
        its adapters take no part in those of the model that is returned. In passes with adapters, parameters of KAN
        layers get no gradients.

        Args:
            model (`nn.Module`, *optional*): A model with the layers of the base.
            needs_adapters (`bool`): Whether a call without adapters is an error; otherwise it is the base's.

        Returns:
            `BankModel`: It takes the arguments of the model, and `adapter_names=`, a name for each row, or `ids=`.

        Raises:
            ValueError: The bank is attached, the model has merged adapters, or it is another base.
        """
        network = unwrap(self.base if model is None else model)
        if self._before:
            raise ValueError("The bank is attached to a model: call `detach()` first.")
        check_unmerged(network)
        targets, names = match_layers(self.record, network, "error")
        if any(isinstance(module, BankLayer) for module in network.modules()):
            raise ValueError("The model has another bank: call its `detach()` first.")
        self._before = [(module, "training", module.training) for module in network.modules()]
        layers: dict[Any, BankLayer] = {}
        for own, there in names.items():
            layer, target = network.get_submodule(there), targets[there]
            cls = SlimBankLayer if isinstance(target.layer, (SlimKANLinear, SlimLayer)) else BankLayer
            if isinstance(layer, LoTRALayer):  # which stays where it is, for PEFT
                self._before.append((layer, "__class__", type(layer)))
                layer.__class__ = cls
            else:
                layers[layer] = cls(*target, own)
                layers[layer].training = layer.training
            vars(layers.get(layer, layer)).update(lotra_bank=self, lotra_bank_name=own)
        for parent, name, child in places(network):
            if child in layers:
                self._before.append((parent, name, child))
                parent._modules[name] = layers[child]
        return BankModel(network, self, needs_adapters)

    def detach(self) -> None:
        """Takes the bank out of the model that it is attached to, which is as before, also in its modes."""
        for module, name, value in self._before:
            setattr(module, name, value)
        self._before = []

    @contextmanager
    def rows(self, rows: Sequence[str] | Sequence[int] | Tensor | None) -> Iterator[None]:
        """A context in which the rows that adapted layers get have these adapters, names or numbers; None for none.

        For models that change the order of rows on their way, and for calls of a part of a model.

        Raises:
            ValueError: A name is unknown, or a number belongs to no adapter.
        """
        with ROWS.set(self._rows_of(rows)):
            yield

    def _rows_of(self, rows: Sequence[str] | Sequence[int] | Tensor | None) -> Rows:
        """The adapters of rows; of None, those that are set, else none."""
        is_training = self._trained is not None and torch.is_grad_enabled()
        found = ROWS.get()
        if rows is None and found is not None and found.bank is self:
            return found
        if rows is None and not is_training:
            return Rows(self, self.store)
        index = self._index(["__base__"] if rows is None else rows)
        store = self.store  # read last: what is added meanwhile is in it
        distinct, groups = group_rows(index.to(store.packed.device))
        if is_training:
            self.check_trained(distinct - 1)
            store = store._replace(packed=embedding(distinct, store.packed, sparse=True))
        elif groups.size > 1 or store.added is not None:
            store = store._replace(packed=store.rows(distinct))
        else:
            groups = RowGroups(index)
        return Rows(self, store, groups, set())
