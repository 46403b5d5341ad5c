# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""The base is frozen, and so are the running statistics of its norms, unless they are in `modules_to_save`; modes."""

import copy

import pytest
import torch
from helpers import X, adapt, assert_equal, train
from peft import PeftModel, get_peft_model, inject_adapter_in_model
from stand_ins import OldEfficientKANLayer
from torch import nn
from torch.testing import assert_close

from peft_lotra import LoTRAConfig
from peft_lotra.kan import KANLinear


class NormedLayer(OldEfficientKANLayer):
    """A copy of efficient-kan's layer that normalizes its inputs."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.norm = nn.BatchNorm1d(self.in_features)

    def forward(self, x):
        return super().forward(self.norm(x))


def network():
    torch.manual_seed(0)
    return nn.Sequential(KANLinear(3, 4), nn.BatchNorm1d(4), NormedLayer(4, 4), nn.InstanceNorm1d(4), nn.Dropout(0.1))


def statistics(model):
    return {name: value.clone() for name, value in model.named_buffers() if "running" in name or "num_batches" in name}


@pytest.mark.parametrize("attach", [get_peft_model, lambda base, config: inject_adapter_in_model(config, base)])
def test_running_statistics_of_the_base_do_not_move(attach):
    model = attach(network(), LoTRAConfig(r=2))
    before = statistics(model)
    train(model, X * 3)  # without a call of `train()`
    if isinstance(model, PeftModel):
        model.eval()
        train(model.train(), X * 3)
        assert [module.training for module in model.modules() if isinstance(module, nn.Dropout)] == [True]
    after = statistics(model)

    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_running_statistics_of_saved_modules_move(tmp_path):
    base = network()
    fresh = copy.deepcopy(base)  # `network()` again may be rounded otherwise (lstsq)
    model = get_peft_model(base, LoTRAConfig(r=2, modules_to_save=["1", "norm"])).train()
    train(model, X * 3).eval()
    moved = [name for name, value in statistics(model).items() if name.endswith("running_mean") and value.any()]

    assert len([name for name in moved if "modules_to_save" in name]) == 2
    assert len(moved) == 2

    y = model(X)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(fresh, tmp_path).eval()

    assert_equal(loaded(X), y)

    merged = loaded.merge_and_unload()

    assert_close(merged(X), y)
    assert isinstance(merged[2].norm, nn.BatchNorm1d)


def test_a_norm_without_statistics_is_left_alone():
    norm = nn.BatchNorm1d(3, track_running_stats=False)
    model = adapt(nn.Sequential(norm, KANLinear(3, 2))).train()

    assert norm.training

    model(X)


class Loop(nn.Sequential):
    """Its `train` is a training loop, as pykan's was in 2024."""

    def train(self, data, steps=3):
        raise AssertionError("nobody asked for it")


class Frozen(nn.Sequential):
    """Stays in evaluation mode, but for its last module."""

    def train(self, mode=True):
        super().train(False)
        self[-1].train(mode)
        return self


@pytest.mark.parametrize("mode", [True, False])
def test_a_train_that_is_a_loop_is_not_called_and_one_that_decides_itself_is(mode):
    for part, expected in (
        (Loop(nn.Dropout(), Loop(nn.Dropout())), [mode, mode]),
        (Frozen(nn.Dropout(), nn.Dropout()), [False, mode]),
    ):
        model = adapt(nn.Sequential(KANLinear(3, 4), part)).train(mode)
        assert [module.training for module in model.modules() if isinstance(module, nn.Dropout)] == expected


@pytest.mark.parametrize("mode", [True, False])
@pytest.mark.parametrize("unload", ["unload", "merge_and_unload"])
def test_an_unloaded_base_has_the_mode_of_the_model(unload, mode):
    model = adapt(network().eval()).train().train(mode)
    base = getattr(model, unload)()

    assert {module.training for module in base.modules()} == {mode}
