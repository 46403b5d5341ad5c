# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Processes that are forked while another thread is in the middle of something."""

from __future__ import annotations

import copy
import multiprocessing
import os
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from forking import SECONDS, Gate, describe, in_child, stopped_within
from helpers import adapt, base, components, inputs, lotra_layers
from stand_ins import FAMILIES
from torch import nn
from torch.utils.data import DataLoader, Dataset

from peft_lotra import LoTRAConfig, LoTRALayer, preprocess_lotra, slim
from peft_lotra.kan import KAN, SlimKAN
from peft_lotra.tuner import guards


pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork"),
    pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork"),  # Python 3.12 and later
]


def foreign_slim(name: str = "efficient-kan") -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return slim(base(name, in_features=4, out_features=4), ranks=(2, 2, 2))


MODELS: dict[str, Callable[[], nn.Module]] = {
    **{name: lambda name=name: adapt(base(name)) for name in FAMILIES},
    "slim": lambda: adapt(SlimKAN([3, 8, 4], ranks=(2, 2, 2)), r=2),
    "foreign slim": lambda: foreign_slim().eval(),
    "adapted foreign slim": lambda: adapt(foreign_slim(), r=2),
}


def width(model: nn.Module) -> int:
    return next(m.in_features for m in model.modules() if isinstance(getattr(m, "in_features", None), int))


def first_output(y: object) -> torch.Tensor:
    return y[0] if isinstance(y, tuple) else y


@pytest.mark.parametrize("name", MODELS)
def test_a_child_of_a_process_that_is_in_forward(name: str) -> None:
    model = MODELS[name]()
    x = inputs(in_features=width(model))
    layer = next(iter(lotra_layers(model).values()), None)
    inside = model.get_submodule("kan").layer if layer is None else layer.base_layer
    gate = Gate()
    inside.register_forward_pre_hook(gate.pass_through)
    gate.reached.set()  # closed below
    expected, before = first_output(model(x)).detach(), describe(model)
    gate.reached.clear()

    def check() -> None:
        assert describe(model) == before
        assert torch.equal(first_output(model(x)), expected)
        for parameter in model.parameters():
            parameter.requires_grad_(True)
        first_output(model(x)).sum().backward()
        assert torch.equal(first_output(copy.deepcopy(model)(x)), expected)

    with stopped_within(lambda: model(x), gate):
        in_child(check)
        in_child(check)
    assert torch.equal(first_output(model(x)), expected) and describe(model) == before


@pytest.mark.parametrize("name", ["dense", "efficient-kan", "slim", "adapted foreign slim"])
@pytest.mark.parametrize("names", [None, ["second", "default", "__base__"] * 2])
def test_children_of_a_process_that_runs_forward_again_and_again(name: str, names: list[str] | None) -> None:
    model = adapt(KAN([3, 8, 8, 2])) if name == "dense" else MODELS[name]()
    model.add_adapter("second", LoTRAConfig(r=2, init_weights=False))
    x = inputs(in_features=width(model))
    kwargs = {} if names is None else {"adapter_names": names}
    with torch.no_grad():
        expected, before = model(x, **kwargs), describe(model)
    plain = model(x).detach()
    over = threading.Event()

    def run() -> None:
        with torch.no_grad():
            while not over.is_set():
                model(x, **kwargs)

    def check() -> None:
        assert describe(model) == before
        assert torch.equal(model(x), plain)
        assert torch.equal(model(x, **kwargs), expected)

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(5):
            in_child(check)
    finally:
        over.set()
        for thread in threads:
            thread.join()


def test_a_child_of_the_thread_that_is_in_forward_goes_on() -> None:
    """What the forking thread holds stays exchanged, and locked, until its call ends in the child as well."""
    model, x = adapt(base("efficient-kan")), inputs()
    layer = next(iter(lotra_layers(model).values()))
    in_force: list[bool] = []

    def look(module: nn.Module, args: tuple) -> None:
        def check() -> None:
            assert not isinstance(module.spline_weight, nn.Parameter)
            assert layer.lotra_lock.held._is_owned()
            with layer.lotra_lock:
                pass

        in_child(check)
        in_force.append(not isinstance(module.spline_weight, nn.Parameter))

    layer.base_layer.register_forward_pre_hook(look)
    model(x)
    assert in_force == [True]


def interrupted(kind: str, model: nn.Module, gate: Gate, monkeypatch: pytest.MonkeyPatch) -> Callable[[], object]:
    """Something that takes long, which stops at the gate with its work half done."""
    layers = list(lotra_layers(model).values())

    def gated(method: Callable) -> Callable:
        def run(self, *args: object, **kwargs: object) -> object:
            if self is layers[-1] or self not in layers:
                gate.pass_through()
            return method(self, *args, **kwargs)

        return run

    if kind == "merge":
        monkeypatch.setattr(LoTRALayer, "_merge", gated(LoTRALayer._merge))
        return model.merge_adapter
    if kind == "unmerge":
        model.merge_adapter()
        monkeypatch.setattr(LoTRALayer, "_unmerge", gated(LoTRALayer._unmerge))
        return model.unmerge_adapter
    if kind == "add":
        monkeypatch.setattr(LoTRALayer, "update_layer", gated(LoTRALayer.update_layer))
        return lambda: model.add_adapter("b", LoTRAConfig(r=2))
    if kind == "delete":
        model.add_adapter("b", LoTRAConfig(r=2))
        monkeypatch.setattr(LoTRALayer, "delete_adapter", gated(LoTRALayer.delete_adapter))
        return lambda: model.delete_adapter("b")

    def in_place() -> None:
        with guards.bare_base(model):
            gate.pass_through()

    return in_place


@pytest.mark.parametrize("kind", ["merge", "unmerge", "add", "delete", "base layers in place"])
def test_a_child_has_nothing_half_done(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, gate = adapt(KAN([3, 8, 8, 2])), inputs(), Gate()
    function = interrupted(kind, model, gate, monkeypatch)
    expected, before = model(x).detach(), describe(model)
    names = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def check() -> None:
        assert describe(model) == before
        state = model.state_dict()
        assert state.keys() == names.keys()
        assert all(torch.equal(state[name], tensor) for name, tensor in names.items())
        assert torch.equal(model(x), expected)

    with stopped_within(function, gate):
        in_child(check)


def test_a_child_of_a_process_that_gathers_gradients() -> None:
    model, x, gate = KAN([3, 8, 2]), inputs(), Gate()
    before = describe(model)

    def train_step() -> None:
        model(x).square().sum().backward()
        gate.pass_through()

    def check() -> None:
        assert describe(model) == before
        assert all(parameter.grad is None for parameter in model.parameters())

    config = LoTRAConfig(r=2, init_weights="gradient")
    with stopped_within(lambda: preprocess_lotra(model, config, train_step), gate):
        in_child(check)


class Teacher(Dataset):
    """Rows with what a model says of them."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.x = model, inputs(12)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.no_grad():
            return self.x[index], self.model(self.x[index : index + 1])[0]


@contextmanager
def in_forward(model: nn.Module) -> Iterator[None]:
    gate = Gate()
    handle = next(iter(lotra_layers(model).values())).base_layer.register_forward_pre_hook(gate.pass_through)
    with stopped_within(lambda: model(inputs()), gate):
        yield
    handle.remove()


def test_workers_of_a_data_loader() -> None:
    model = adapt(base("efficient-kan"))
    data = Teacher(model)
    expected = model(data.x).detach()
    loader = DataLoader(data, batch_size=4, num_workers=2, multiprocessing_context="fork", timeout=SECONDS)
    with in_forward(model):
        batches = list(loader)
    torch.testing.assert_close(torch.cat([x for x, _ in batches]), data.x)
    torch.testing.assert_close(torch.cat([y for _, y in batches]), expected)


def test_processes_that_train() -> None:
    model, x = adapt(KAN([3, 8, 2])).train(), inputs()
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()

    def train() -> None:
        torch.set_num_threads(1)
        optimizer = torch.optim.SGD([parameter for _, parameter in components(model)], lr=0.01)
        losses = []
        for _ in range(5):
            optimizer.zero_grad()
            loss = model(x).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        queue.put(losses)

    with in_forward(model):
        process = context.Process(target=train)
        process.start()
        process.join(SECONDS)
        if process.is_alive():
            process.kill()
            process.join()
            pytest.fail("the child hangs")
    losses = queue.get()
    assert losses[-1] < losses[0]
