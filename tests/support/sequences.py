# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Random sequences of operations on adapters, beside a dense model in plain float64 tensors (`dense.py`).

The tests run a hundred sequences. More of them, with a table and a report:

    PYTHONPATH=. python tests/support/sequences.py --count 2000 --output examples/studies/results/fuzz_sequences.json
"""

from __future__ import annotations

import argparse
import copy
import io
import itertools
import json
import pickle
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hypothesis
import torch
from dense import READERS, SLIM, DenseLayer, dense, read_layer
from hostile import interrupted, summary
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from peft import PeftModel, get_peft_model
from stand_ins import FAMILIES
from torch import Tensor, nn

from peft_lotra import LoTRAConfig, hotswap_adapter, refit_adapters, save_adapter, slim


LAYERS, HEAD = ("0", "1"), "2"
COMPONENTS = ("core", "factor_out", "factor_in", "factor_basis")
NAMES = ("a", "b", "c", "d", "lora")  # few, so that names are used again after they were deleted
ROWS = 6
BF16 = torch.bfloat16
# largest difference from the reference, relative to the largest output; bfloat16 has three digits
TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-4, BF16: 0.1}
KINDS = (*READERS, *(f"slim {family}" for family in SLIM))
operations: Counter[str] = Counter()  # of all sequences of this process


@dataclass
class Adapter:
    """One adapter in the dense model."""

    parts: dict[str, tuple[Tensor, ...]]  # the four components by layer
    alpha: dict[str, float]
    head: tuple[Tensor, Tensor] | None
    scale: float = 1.0
    grids: int = 0  # how often the grids had moved when the adapter was made

    def update(self, layer: str, basis: int) -> Tensor:
        delta = self.scale * self.alpha[layer] * dense(self.parts[layer])
        return nn.functional.pad(delta, (0, basis - delta.shape[-1]))  # a residual branch that is not adapted

    def shapes(self) -> Any:
        return {name: [p.shape for p in parts] for name, parts in self.parts.items()}, self.head is None

    def copied(self) -> Adapter:
        return copy.deepcopy(self)


@dataclass
class DenseModel:
    """Two dense layers and a head, with the updates in force."""

    layers: dict[str, DenseLayer]
    head: tuple[Tensor, Tensor]
    adapters: dict[str, Adapter] = field(default_factory=dict)
    active: list[str] = field(default_factory=list)
    disabled: bool = False
    # by layer the updates as they were merged; a layer that has none of the merged adapters goes on with the active
    # ones, as with PEFT's other methods
    merged: dict[str, dict[str, Tensor]] = field(default_factory=lambda: {name: {} for name in LAYERS})

    def update(self, layer: str, name: str) -> Tensor:
        return self.adapters[name].update(layer, self.layers[layer].tensor.shape[-1])

    def having(self, layer: str, names: list[str]) -> list[str]:
        return [name for name in names if name in self.adapters and layer in self.adapters[name].parts]

    def merge(self, names: list[str]) -> None:
        for layer, merged in self.merged.items():
            for name in self.having(layer, names):
                merged.setdefault(name, self.update(layer, name))

    def unmerge(self) -> None:
        self.merged = {name: {} for name in LAYERS}

    def is_merged(self, name: str | None = None) -> bool:
        return any(merged and (name is None or name in merged) for merged in self.merged.values())

    def __call__(self, x: Tensor, names: list[str] | None = None, merged: bool = True) -> Tensor:
        """The output with these adapters, by default with those in force."""
        in_force = ([] if self.disabled else self.active) if names is None else names
        x = x.double()
        for name, layer in self.layers.items():
            updates = list(self.merged[name].values()) if merged and names is None and not self.disabled else []
            updates = updates or [self.update(name, adapter) for adapter in self.having(name, in_force)]
            x = layer(x, sum(updates, torch.zeros(())))
        heads = [self.adapters[name].head for name in in_force if self.adapters[name].head is not None]
        weight, bias = heads[0] if heads else self.head
        return x @ weight.T + bias


@dataclass
class Saved:
    path: Path
    adapter: Adapter


configs = st.builds(
    lambda **values: {key: value for key, value in values.items() if value is not None},
    r=st.sampled_from([1, 2, 5, (1, 2, 3), (3, 1, 2)]),
    alpha=st.sampled_from([0.1, 0.3, -0.2]),
    rank_pattern=st.sampled_from([None, {"0": 1}, {"1": (2, 1, 1)}]),
    alpha_pattern=st.sampled_from([None, {"1": 0.2}]),
    target_modules=st.sampled_from([None, None, None, ["0"], ["1"], r"[01]"]),
    adapt_residual=st.sampled_from([None, None, False]),
    modules_to_save=st.sampled_from([None, None, [HEAD]]),
)
seeds = st.integers(0, 2**20)


def _free(self: Sequences) -> bool:
    return not self.dense.is_merged() and not self.dense.disabled


def _precise(self: Sequences) -> bool:
    return self.dtype != BF16


class Sequences(RuleBasedStateMachine):
    """The model of the package, `model`, and what it must equal, `dense`; compared after each operation."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.saved: list[Saved] = []
        self.counter = itertools.count()
        self.grids = 0
        self.is_exact = True  # whether the base is restored bit for bit
        warnings.simplefilter("ignore")

    def teardown(self) -> None:
        self.folder.cleanup()

    # -- the two models ------------------------------------------------------------------------------------------

    @initialize(
        kinds=st.tuples(st.sampled_from(KINDS), st.sampled_from(KINDS)),
        widths=st.tuples(*[st.integers(1, 5)] * 3),
        dtype=st.sampled_from([torch.float64, torch.float32, torch.float32]),
        config=configs,
        seed=seeds,
    )
    def start(self, kinds, widths, dtype, config, seed) -> None:
        torch.manual_seed(seed)
        self.kinds, self.families = kinds, [kind.removeprefix("slim ") for kind in kinds]
        layers = []
        for kind, family, i, o in zip(kinds, self.families, widths, widths[1:], strict=False):
            layer = nn.Sequential(FAMILIES[family](i, o))
            layers.append((slim(layer, (2, 2, 3)) if kind != family else layer)[0])
        self.pristine = nn.Sequential(*layers, nn.Linear(widths[2], 2)).to(dtype).requires_grad_(False)
        self.dtype, self.tolerance = dtype, TOLERANCE[dtype]
        if "inkan" in kinds:  # its splines are off by the float32 of their grid
            self.tolerance = max(self.tolerance, 1e-6)
        self.x = (torch.rand(ROWS, widths[0]) * 1.2 - 0.6).to(dtype)
        self.dense = DenseModel({}, (torch.empty(0), torch.empty(0)))
        self.model = get_peft_model(
            copy.deepcopy(self.pristine), LoTRAConfig(**config, init_weights=False), "a"
        ).eval()
        self.read_base()
        self.learn("a", config)
        self.dense.active = ["a"]

    def read_base(self) -> None:
        for name, family in zip(LAYERS, self.families, strict=True):
            self.dense.layers[name] = read_layer(family, self.pristine[int(name)])
        self.dense.head = tuple(p.detach().double() for p in self.pristine[2].parameters())

    def read(self, name: str, alpha: dict[str, float] | None = None) -> Adapter:
        """An adapter out of the state dict of the model."""
        state = {key.removeprefix("base_model.model."): value for key, value in self.model.state_dict().items()}
        parts = {
            layer: tuple(state[f"{layer}.lotra_{part}.{name}"].detach().double().clone() for part in COMPONENTS)
            for layer in LAYERS
            if f"{layer}.lotra_core.{name}" in state
        }
        head = None
        if f"{HEAD}.modules_to_save.{name}.weight" in state:
            head = tuple(
                state[f"{HEAD}.modules_to_save.{name}.{part}"].double().clone() for part in ("weight", "bias")
            )
        return Adapter(parts, dict.fromkeys(LAYERS, 1.0) if alpha is None else alpha, head, grids=self.grids)

    def learn(self, name: str, config: dict[str, Any]) -> None:
        alphas = {layer: config.get("alpha_pattern", {}).get(layer, config["alpha"]) for layer in LAYERS}
        self.dense.adapters[name] = adapter = self.read(name, alphas)
        targets = config.get("target_modules", "[01]")
        assert sorted(adapter.parts) == ([*LAYERS] if targets == "[01]" else targets)
        assert (adapter.head is not None) == ("modules_to_save" in config)
        for layer, parts in adapter.parts.items():
            shape = self.dense.layers[layer].tensor.shape
            left_out = self.dense.layers[layer].has_residual and "adapt_residual" in config
            assert dense(parts).shape == (*shape[:2], shape[2] - left_out)

    def adopt(self, name: str) -> None:
        """Takes the components over as they are stored, so that rounding errors do not add up."""
        adapter = self.dense.adapters[name]
        stored = self.read(name)
        adapter.parts, adapter.head = stored.parts, stored.head

    def unused(self) -> str | None:
        return next((name for name in NAMES if name not in self.dense.adapters), None)

    def pick(self, data, label: str = "adapter") -> str:
        return data.draw(st.sampled_from(sorted(self.dense.adapters)), label=label)

    # -- what holds after each operation -------------------------------------------------------------------------

    def check(self, actual: Tensor, expected: Tensor) -> None:
        assert actual.shape == expected.shape and torch.isfinite(actual).all()
        size = expected.abs().max().clamp(min=0.1)
        worst = ((actual.double() - expected).abs().max() / size).item()
        tolerance = 1.0 if self.dtype == BF16 and {"fast-kan"} & {*self.families} else self.tolerance
        assert worst <= tolerance, f"{self.dtype}, {self.kinds}: differs by {worst:.1e}"

    @invariant()
    def equal_outputs(self) -> None:
        with torch.no_grad():
            self.check(self.model(self.x), self.dense(self.x))
        if self.dense.disabled:
            self.dense.unmerge()  # a forward pass that is disabled unmerges

    @invariant()
    def base_is_frozen(self) -> None:
        trainable = {name for name, parameter in self.model.named_parameters() if parameter.requires_grad}
        wrong = {name for name in trainable if ".lotra_" not in name and ".modules_to_save." not in name}
        assert not wrong, f"trainable: {wrong}"
        names = {name.partition(".lotra_")[2].rpartition(".")[2] for name in trainable if ".lotra_" in name}
        assert names <= {*self.dense.active}, f"trainable: {names}, active: {self.dense.active}"

    @invariant()
    def base_is_unchanged(self) -> None:
        if self.dense.is_merged():
            return
        for name in (*LAYERS, HEAD):
            module = self.model.base_model.model[int(name)]
            module = getattr(module, "original_module", getattr(module, "base_layer", module))
            expected = self.pristine[int(name)]
            assert type(module) is type(expected)
            state = module.state_dict()
            for key, value in expected.state_dict().items():
                if self.is_exact:
                    assert torch.equal(state[key], value), f"{name}.{key} of the base was changed"
                else:
                    torch.testing.assert_close(state[key], value, atol=self.tolerance, rtol=self.tolerance)

    def refused(self, call: Callable[[], Any], errors: type[Exception] = ValueError) -> None:
        before = summary(self.model)
        try:
            call()
        except errors:
            assert summary(self.model) == before, "a refused call changed the model"
        else:
            raise AssertionError("not refused")

    def counted(self, name: str) -> None:
        operations[name] += 1

    # -- operations ----------------------------------------------------------------------------------------------

    def _add(self, name: str, config: dict[str, Any], seed: int, model: PeftModel) -> None:
        torch.manual_seed(seed)
        model.add_adapter(name, LoTRAConfig(**config, init_weights=False))

    @precondition(lambda self: self.unused())
    @rule(config=configs, seed=seeds)
    def add(self, config, seed) -> None:
        self.counted("add")
        name = self.unused()
        self._add(name, config, seed, self.model)
        self.dense.unmerge()  # as with PEFT's other methods
        self.learn(name, config)

    @precondition(lambda self: not self.dense.disabled)
    @rule(data=st.data())
    def set(self, data) -> None:
        self.counted("set")
        name = self.pick(data)
        self.model.set_adapter(name)
        self.dense.active = [name]
        self.dense.unmerge()

    @precondition(lambda self: not self.dense.disabled)
    @rule(data=st.data())
    def set_several(self, data) -> None:
        self.counted("set several")
        names = data.draw(st.lists(st.sampled_from(sorted(self.dense.adapters)), min_size=1, max_size=3, unique=True))
        if sum(self.dense.adapters[name].head is not None for name in names) > 1:
            return  # PEFT refuses it
        self.model.base_model.set_adapter(names)
        self.dense.active = names
        self.dense.unmerge()

    @rule(disabled=st.booleans())
    def disable(self, disabled) -> None:
        self.counted("disable")
        tuner = self.model.base_model
        (tuner.disable_adapter_layers if disabled else tuner.enable_adapter_layers)()
        self.dense.disabled = disabled

    @precondition(lambda self: not self.dense.disabled)
    @rule()
    def disable_for_a_while(self) -> None:
        self.counted("disable for a while")
        with self.model.disable_adapter(), torch.no_grad():
            self.check(self.model(self.x), self.dense(self.x, []))
        self.dense.unmerge()

    @precondition(lambda self: not self.dense.disabled)
    @rule(data=st.data(), safe=st.booleans(), keep=st.sampled_from([True, True, True, False]))
    def merge(self, data, safe, keep) -> None:
        self.counted("second merge" if self.dense.is_merged() else "merge")
        names = data.draw(st.lists(st.sampled_from(sorted(self.dense.adapters)), unique=True, max_size=3))
        self.model.merge_adapter(names or None, safe_merge=safe, keep_base=keep)
        self.dense.merge(names or self.dense.active)
        self.is_exact &= keep

    @rule()
    def unmerge(self) -> None:
        self.counted("unmerge")
        self.model.unmerge_adapter()
        self.dense.unmerge()

    @precondition(lambda self: _free(self) and _precise(self) and any(kind not in FAMILIES for kind in self.kinds))
    @rule(data=st.data())
    def truncating_merge(self, data) -> None:
        self.counted("truncating merge")
        self.model.merge_adapter([self.pick(data)], slim="truncate")
        with torch.no_grad():
            assert torch.isfinite(self.model(self.x)).all()
        self.model.unmerge_adapter()

    @rule(data=st.data(), scale=st.sampled_from([0.0, 0.5, 2.0, -1.0]))
    def set_scale(self, data, scale) -> None:
        self.counted("set_scale")
        name = self.pick(data)
        for layer in LAYERS:
            module = self.model.base_model.model[int(layer)]
            if hasattr(module, "set_scale"):
                module.set_scale(name, scale)
        self.dense.adapters[name].scale = scale

    @precondition(lambda self: len(self.dense.adapters) > 1)
    @rule(data=st.data())
    def delete(self, data) -> None:
        name = self.pick(data)
        if self.dense.is_merged(name):
            self.counted("delete while merged")
            self.refused(lambda: self.model.delete_adapter(name))
        elif name not in self.dense.active:
            self.counted("delete")
            self.model.delete_adapter(name)
            del self.dense.adapters[name]
        elif _free(self):
            self.counted("delete the active one")
            self.model.delete_adapter(name)
            del self.dense.adapters[name]
            self.dense.active = [self.pick(data, "set after deleting")]
            self.model.set_adapter(self.dense.active[0])

    @rule(data=st.data(), atomic=st.booleans(), again=st.booleans())
    def save(self, data, atomic, again) -> None:
        self.counted("save while merged" if self.dense.is_merged() else "save")
        name = self.pick(data)
        folder = Path(self.folder.name) / ("x" if again else str(next(self.counter)))
        (save_adapter if atomic else PeftModel.save_pretrained)(self.model, str(folder), selected_adapters=[name])
        path = folder / name
        self.saved = [saved for saved in self.saved if saved.path != path]
        adapter = self.dense.adapters[name].copied()
        adapter.scale = 1.0
        self.saved.append(Saved(path, adapter))

    def is_of_the_base(self, saved: Saved) -> bool:
        moved = self.kinds.index("own") if "own" in self.kinds else None  # see `refit`
        return saved.adapter.grids == self.grids or str(moved) not in saved.adapter.parts

    @precondition(lambda self: self.saved and self.unused())
    @rule(data=st.data(), low=st.booleans())
    def load(self, data, low) -> None:
        saved, name = data.draw(st.sampled_from(self.saved)), self.unused()
        call = lambda: self.model.load_adapter(str(saved.path), name, low_cpu_mem_usage=low)  # noqa: E731
        if not self.is_of_the_base(saved):
            self.counted("load of another grid")
            return self.refused(call)
        self.counted("load")
        call()
        self.loaded(name, saved)

    def loaded(self, name: str, saved: Saved) -> None:
        self.dense.unmerge()
        self.dense.adapters[name] = saved.adapter.copied()
        self.adopt(name)
        self.same_adapter(saved.adapter, self.dense.adapters[name])

    def same_adapter(self, old: Adapter, new: Adapter) -> None:
        assert old.shapes() == new.shapes()
        for layer, parts in old.parts.items():
            for one, other in zip(parts, new.parts[layer], strict=True):
                torch.testing.assert_close(one, other, atol=self.tolerance, rtol=self.tolerance)

    @precondition(lambda self: self.saved)
    @rule(data=st.data())
    def load_into_a_new_model(self, data) -> None:
        self.counted("load into a new model")
        saved = data.draw(st.sampled_from(self.saved))
        if not self.is_of_the_base(saved):
            return
        model = PeftModel.from_pretrained(copy.deepcopy(self.pristine), str(saved.path))
        alone = DenseModel(self.dense.layers, self.dense.head, {"z": saved.adapter}, ["z"])
        with torch.no_grad():
            self.check(model(self.x), alone(self.x))

    @precondition(lambda self: self.saved)
    @rule(data=st.data())
    def hotswap(self, data) -> None:
        saved, name = data.draw(st.sampled_from(self.saved)), self.pick(data)
        call = lambda: hotswap_adapter(self.model, saved.path, name)  # noqa: E731
        mine = self.dense.adapters[name]
        fits = self.is_of_the_base(saved) and saved.adapter.shapes() == mine.shapes()
        if not fits or self.dense.is_merged(name):
            self.counted("hotswap refused")
            return self.refused(call)
        self.counted("hotswap")
        call()
        self.swapped(name, saved)

    def swapped(self, name: str, saved: Saved) -> None:
        self.adopt(name)
        mine = self.dense.adapters[name]
        for layer, parts in saved.adapter.parts.items():
            new, old = mine.alpha[layer] * dense(mine.parts[layer]), saved.adapter.alpha[layer] * dense(parts)
            torch.testing.assert_close(new, old, atol=self.tolerance, rtol=self.tolerance)

    @precondition(lambda self: self.unused() and _precise(self))
    @rule(data=st.data(), kind=st.sampled_from(["cat", "cat", "svd", "linear"]))
    def weighted(self, data, kind) -> None:
        sources = [n for n, adapter in sorted(self.dense.adapters.items()) if adapter.head is None]
        names = data.draw(st.lists(st.sampled_from(sources), min_size=1, max_size=3)) if sources else []
        if not names:
            return
        weights, name = [0.7, -0.4, 1.1][: len(names)], self.unused()
        ranks = [
            [p[0].shape for p in (self.dense.adapters[n].parts.get(layer) for n in names) if p] for layer in LAYERS
        ]
        call = lambda: self.model.add_weighted_adapter(names, weights, name, kind)  # noqa: E731
        if kind == "linear" and any(len({*shapes}) > 1 for shapes in ranks):
            self.counted("weighted refused")
            return self.refused(call)
        self.counted("weighted")
        errors = call()
        self.dense.unmerge()
        self.dense.adapters[name] = new = self.read(name)
        for layer in new.parts:
            total = sum(
                (
                    w * self.dense.update(layer, n)
                    for n, w in zip(names, weights, strict=True)
                    if self.dense.having(layer, [n])
                ),
                torch.zeros(()),
            )
            error = ((self.dense.update(layer, name) - total).norm() / total.norm().clamp(min=1e-12)).item()
            if total.norm() > 1e-6:
                assert abs(error - errors[layer]) < 1e-4
                assert kind != "cat" or error < max(1e-5, self.tolerance)

    @precondition(_free)
    @rule(data=st.data())
    def mixed(self, data) -> None:
        self.counted("mixed batch")
        names = st.sampled_from([*sorted(self.dense.adapters), "__base__"])
        batch = data.draw(st.lists(names, min_size=ROWS, max_size=ROWS))
        rows = [self.dense(self.x, [] if name == "__base__" else [name])[i] for i, name in enumerate(batch)]
        with torch.no_grad():
            self.check(self.model(self.x, adapter_names=batch), torch.stack(rows))

    @precondition(lambda self: self.dense.is_merged() and not self.dense.disabled)
    @rule()
    def mixed_while_merged(self) -> None:
        self.counted("mixed batch while merged")
        if all(self.dense.merged.values()):
            self.refused(lambda: self.model(self.x, adapter_names=[*self.dense.adapters] * ROWS), ValueError)

    @rule()
    def infer(self) -> None:
        self.counted("inference mode")
        with torch.inference_mode():
            self.check(self.model(self.x).clone(), self.dense(self.x))
        if self.dense.disabled:
            self.dense.unmerge()

    @precondition(lambda self: _free(self) and _precise(self))
    @rule()
    def train(self) -> None:
        """One step of clipped gradient descent, beside one on the components of the dense model."""
        self.counted("train")
        (name,) = self.dense.active[:1]
        self.model.set_adapter(name)
        self.dense.active = [name]
        self.model.train()
        mine = self.dense.adapters[name]
        leaves = [p.requires_grad_() for parts in mine.parts.values() for p in parts] + [
            p.requires_grad_() for p in mine.head or ()
        ]
        _descend(leaves, self.dense(self.x))
        trainable = [p for p in self.model.parameters() if p.requires_grad]
        assert sum(p.numel() for p in trainable) == sum(p.numel() for p in leaves)
        _descend(trainable, self.model(self.x))
        self.model.eval()
        expected = mine.copied()
        self.adopt(name)
        for layer, parts in expected.parts.items():
            for one, other in zip(parts, mine.parts[layer], strict=True):
                torch.testing.assert_close(one.detach(), other, atol=max(1e-6, self.tolerance), rtol=1e-3)

    @rule(how=st.sampled_from(["deepcopy", "pickle", "torch.save"]))
    def copied(self, how) -> None:
        self.counted(how)
        old, before = self.model, summary(self.model)
        if how == "deepcopy":
            self.model = copy.deepcopy(old)
        elif how == "pickle":
            self.model = pickle.loads(pickle.dumps(old))
        else:
            torch.save(old, file := io.BytesIO())
            file.seek(0)
            self.model = torch.load(file, weights_only=False)
        assert summary(self.model) == before
        shared = {p.data_ptr() for p in old.parameters()} & {p.data_ptr() for p in self.model.parameters()}
        assert not shared - {0}

    @rule(dtype=st.sampled_from([torch.float64, torch.float32, BF16]))
    def move(self, dtype) -> None:
        self.counted("dtype")
        self.model.to(dtype)
        self.pristine.to(dtype)
        self.x = self.x.to(dtype)
        self.dtype, self.tolerance = dtype, max(self.tolerance, TOLERANCE[dtype])
        self.read_base()
        for name in self.dense.adapters:
            self.adopt(name)
        rounded = {
            layer: {n: u.to(dtype).double() for n, u in merged.items()} for layer, merged in self.dense.merged.items()
        }
        self.dense.merged = rounded

    @precondition(lambda self: _free(self) and _precise(self) and "own" in self.kinds)
    @rule(spread=st.sampled_from([0.8, 1.3]))
    def refit(self, spread) -> None:
        self.counted("refit")
        index = self.kinds.index("own")
        x = (torch.rand(40, self.x.shape[1]) * 2 - 1).to(self.x) * spread

        def move(base: nn.Module) -> None:
            base[index].update_grid(base[:index](x))

        old = copy.deepcopy(self.dense)
        report = refit_adapters(self.model, x, move=move)
        layer = self.model.base_model.model[index]
        self.pristine[index].load_state_dict(getattr(layer, "base_layer", layer).state_dict())
        self.read_base()
        self.grids += 1
        inner = x.double() if index == 0 else old.layers["0"](x.double())
        for name in self.dense.adapters:
            self.adopt(name)
            self.dense.adapters[name].grids = self.grids
            key = str(index)
            if old.having(key, [name]) and old.adapters[name].scale:
                before, after = (
                    m.layers[key](inner, m.update(key, name)) - m.layers[key](inner) for m in (old, self.dense)
                )
                if index == 0 and before.norm() > 1e-3:
                    error = ((after - before).norm() / before.norm()).item()
                    assert abs(error - report.errors[key, name]) < 0.01, (error, report.errors)

    @precondition(lambda self: _free(self) and "own" in self.kinds)
    @rule()
    def move_a_grid(self) -> None:
        index = self.kinds.index("own")
        module = self.model.base_model.model[index]
        if self.dense.having(str(index), self.dense.active):
            self.counted("grid method refused")
            self.refused(lambda: module.update_grid(torch.rand(20, module.in_features).to(self.x)), RuntimeError)

    # -- interruption --------------------------------------------------------------------------------------------

    @rule(data=st.data(), at=st.floats(0, 1), config=configs, seed=seeds)
    def interrupt(self, data, at, config, seed) -> None:
        """Ctrl-C at some line of an operation: the model is as before, or as after it."""
        name, new = self.pick(data), self.unused()
        choices: dict[str, tuple[Callable[[PeftModel], Any], Callable[[], Any]]] = {
            "unmerge": (lambda m: m.unmerge_adapter(), self.dense.unmerge)
        }
        if not self.dense.disabled:
            choices["merge"] = (lambda m: m.merge_adapter([name]), lambda: self.dense.merge([name]))
        if new:
            choices["add"] = (
                lambda m: self._add(new, config, seed, m),
                lambda: (self.dense.unmerge(), self.learn(new, config)),
            )
        if name not in self.dense.active and not self.dense.is_merged(name):
            choices["delete"] = (lambda m: m.delete_adapter(name), lambda: self.dense.adapters.pop(name))
        saved = self.saved[-1] if self.saved else None
        if saved:
            if self.is_of_the_base(saved) and new:
                choices["load"] = (lambda m: m.load_adapter(str(saved.path), new), lambda: self.loaded(new, saved))
            if self.is_of_the_base(saved) and saved.adapter.shapes() == self.dense.adapters[name].shapes():
                if not self.dense.is_merged(name):
                    choices["hotswap"] = (
                        lambda m: hotswap_adapter(m, saved.path, name),
                        lambda: self.swapped(name, saved),
                    )
        kind = data.draw(st.sampled_from(sorted(choices)), label="interrupted")
        call, follow = choices[kind]
        self.counted(f"interrupted {kind}")
        call(copy.deepcopy(self.model))  # fills caches
        twin = copy.deepcopy(self.model)
        lines = interrupted(lambda: call(twin), 0)
        before, after = summary(self.model), summary(twin)
        with suppress(KeyboardInterrupt):
            interrupted(lambda: call(self.model), 1 + int(at * (lines - 1)))
        found = summary(self.model)
        if found == after:
            follow()
        else:
            differing = [key for key in before if found[key] != before[key]]
            assert not differing, f"interrupted {kind} at line {1 + int(at * (lines - 1))} of {lines}: {differing}"

    # -- the end -------------------------------------------------------------------------------------------------

    @rule(merge=st.booleans())
    def unload_a_copy(self, merge) -> None:
        self.counted("merge_and_unload" if merge else "unload")
        model, end = copy.deepcopy(self.model), copy.deepcopy(self.dense)
        if merge and self.dense.disabled:
            return
        with torch.no_grad():
            if merge:
                bare = model.merge_and_unload()
                end.merge(end.active)
                self.check(bare(self.x), end(self.x))
                types = [
                    self.kind_of(module, merged)
                    for module, merged in zip(self.pristine, self._adapted(end), strict=True)
                ]
                assert [type(module) for module in bare] == types
                return
            bare = model.unload()
            end.unmerge()
            heads = [end.adapters[n].head for n in end.active if end.adapters[n].head is not None]
            end.head = heads[0] if heads else end.head  # also while disabled, as with PEFT's other methods
            self.check(bare(self.x), end(self.x, []))
            assert [type(module) for module in bare] == [type(module) for module in self.pristine]
            assert {*bare.state_dict()} == {*self.pristine.state_dict()}

    def _adapted(self, end: DenseModel) -> list[bool]:
        return [bool(merged) for merged in end.merged.values()] + [False]

    def kind_of(self, module: nn.Module, merged: bool) -> type[nn.Module]:
        return type(module.to_dense()) if merged and hasattr(module, "to_dense") else type(module)


def _descend(parameters: list[Tensor], output: Tensor, rate: float = 0.1) -> None:
    loss = output.square().mean()
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    norm = torch.stack([g.norm() for g in gradients if g is not None]).norm().clamp(min=1.0)
    with torch.no_grad():
        for parameter, gradient in zip(parameters, gradients, strict=True):
            if gradient is not None:
                parameter -= rate / norm * gradient


def run(count: int, seed: int | None = None, steps: int = 14, shrink: bool = False) -> None:
    """Runs `count` sequences; raises the error of the first that fails, with its operations in the notes."""
    machine = type("Sequences", (Sequences,), {})
    if seed is not None:
        machine = hypothesis.seed(seed)(machine)
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=count,
            stateful_step_count=steps,
            derandomize=seed is None,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
            phases=[Phase.generate, Phase.shrink] if shrink else [Phase.generate],
            report_multiple_bugs=False,
        ),
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--chunk", type=int, default=50, help="sequences of one seed; a chunk ends where one fails")
    parser.add_argument("--shrink", action="store_true", help="look for the shortest sequence that fails (minutes)")
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    wrong, started = [], time.time()
    for seed in range(arguments.seed, arguments.seed + -(-arguments.count // arguments.chunk)):
        try:
            run(arguments.chunk, seed, shrink=arguments.shrink)
        except Exception as error:
            notes = getattr(error, "__notes__", [])
            lines = traceback.format_exception(error)
            wrong.append({"seed": seed, "error": repr(error)[:300], "operations": notes, "traceback": lines[-8:]})
            print(f"seed {seed}: {error!r:.300}", *notes, sep="\n    ", flush=True)
    report = {
        "sequences": arguments.count,
        "first seed": arguments.seed,
        "wrong": wrong,
        "seconds": round(time.time() - started),
        "operations": dict(operations.most_common()),
    }
    arguments.output.write_text(json.dumps(report, indent=2) + "\n")
    for name, number in operations.most_common():
        print(f"{number:9,}  {name}")
    print(f"{arguments.count:9,}  sequences, {len(wrong)} chunks of {arguments.chunk} with one that is wrong")
