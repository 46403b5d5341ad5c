# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import copy
import json
import pickle
import warnings
from contextlib import suppress

import pytest
import torch
from hostile import interrupted, some_of
from normed import X, adapt, make
from peft import (
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file, save_file
from stand_ins import FastKANLayer
from torch import nn

from peft_lotra import LoTRAConfig, enable_mixed, extract_lotra, hotswap_adapter
from peft_lotra.tuner.norm_stats import norm_layers, stats_in_place


def train(model, steps=3, x=X):
    model.train()
    for _ in range(steps):
        model(x)
    return model.eval()


def stats(model):
    return {name: value.clone() for name, value in stats_in_place(model).items()}


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


BASE = stats(make())
WEIGHTS = "adapter_model.safetensors"


def test_the_names_are_those_of_the_bare_model():
    model = adapt(modules_to_save=["2.bn"])
    assert [name for name, _ in norm_layers(model.base_model.model)] == ["0.bn", "1", "2.bn"]
    assert stats(model.base_model.model).keys() == BASE.keys()


def test_the_loaded_model_is_the_trained_one(tmp_path):
    model = train(adapt())
    y = model(X)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make(), tmp_path)
    assert torch.equal(loaded(X), y)
    tensors = load_file(tmp_path / WEIGHTS)
    assert tensors["base_model.model.0.bn.lotra_running_mean"].any()
    # the same by state dicts, and saved again
    other = adapt()
    set_peft_model_state_dict(other, get_peft_model_state_dict(model))
    assert torch.equal(other.eval()(X), y)
    loaded.save_pretrained(tmp_path / "again")
    again = load_file(tmp_path / "again" / WEIGHTS)
    assert again.keys() == tensors.keys() and all(torch.equal(again[name], tensors[name]) for name in again)


def test_the_base_has_its_own():
    model = adapt()
    model.eval()
    with model.disable_adapter():
        y = model(X)
    train(model)
    with model.disable_adapter():
        assert same(stats(model), {f"base_model.model.{name}": value for name, value in BASE.items()})
        assert torch.equal(model(X), y)
    assert not same(stats(model.base_model.model), BASE)
    assert same(stats(model.unload()), BASE)


def test_each_adapter_has_its_own():
    model = train(adapt())
    first = stats(model.base_model.model)
    model.add_adapter("second", LoTRAConfig(r=1))
    assert same(stats(model.base_model.model), first)
    model.set_adapter("second")
    assert same(stats(model.base_model.model), BASE)
    train(model, x=-X)
    second = stats(model.base_model.model)
    for name, expected in (("default", first), ("second", second), ("default", first)):
        model.set_adapter(name)
        assert same(stats(model.base_model.model), expected)
    model.base_model.set_adapter(["second", "default"])  # of several, those of the first
    assert same(stats(model.base_model.model), second)
    model.base_model.set_adapter("second")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.delete_adapter("second")
    assert same(stats(model.base_model.model), first) and "second" not in model.base_model._norm_stats
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.delete_adapter("default")
    assert same(stats(model.base_model.model), BASE)


@pytest.mark.parametrize("names", [None, ["second"]])
def test_a_merged_model_keeps_those_of_the_adapter(names):
    model = train(adapt())
    model.add_adapter("second", LoTRAConfig(r=1, init_weights=False))
    model.set_adapter("second")
    train(model, x=-X)
    model.set_adapter("default")
    if names:
        model.set_adapter("second")
    y, expected = model(X), stats(model.base_model.model)
    model.set_adapter("default")
    merged = model.merge_and_unload(adapter_names=names)
    assert same(stats(merged), expected) and merged.state_dict().keys() == make().state_dict().keys()
    torch.testing.assert_close(merged(X), y)


def test_a_merge_and_its_undoing_leave_them():
    model = train(adapt())
    expected, y = stats(model.base_model.model), model(X)
    model.merge_adapter()
    assert same(stats(model.base_model.model), expected)
    model.unmerge_adapter()
    assert torch.equal(model(X), y) and same(stats(model.base_model.model), expected)


def test_statistics_that_did_not_move_are_not_saved(tmp_path):
    adapt().save_pretrained(tmp_path)
    assert not [name for name in load_file(tmp_path / WEIGHTS) if "running" in name or "batches" in name]
    assert "save_norm_stats" not in json.loads((tmp_path / "adapter_config.json").read_text())
    model = adapt()
    model.train()
    model.base_model.model[1](torch.rand(5, 4))
    model.save_pretrained(tmp_path)
    moved = {name.rpartition(".lotra_")[0] for name in load_file(tmp_path / WEIGHTS) if ".lotra_running" in name}
    assert moved == {"base_model.model.1"}


def test_without_the_option_they_are_the_base_s(tmp_path):
    model = train(adapt(save_norm_stats=False))
    moved = stats(model.base_model.model)
    with model.disable_adapter():
        assert same(stats(model.base_model.model), moved)
    model.save_pretrained(tmp_path)
    assert not [name for name in load_file(tmp_path / WEIGHTS) if ".lotra_running" in name]
    loaded = PeftModel.from_pretrained(make(), tmp_path)
    assert loaded.peft_config["default"].save_norm_stats is False
    assert same(stats(model.unload()), moved)


@pytest.mark.parametrize(
    "norm",
    [
        lambda n: nn.BatchNorm1d(n, momentum=None),
        nn.SyncBatchNorm,
        lambda n: nn.BatchNorm1d(n, affine=False),
        lambda n: nn.BatchNorm1d(n).requires_grad_(False),
    ],
)
def test_kinds_of_normalizations(norm, tmp_path):
    if norm is nn.SyncBatchNorm:
        pytest.importorskip("torch.cuda")  # runs on accelerators only: in evaluation mode elsewhere
    model = adapt(make(norm))
    if norm is nn.SyncBatchNorm:
        model.base_model.model[1].eval().running_mean += 1
        model.eval()
    else:
        train(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make(norm), tmp_path, is_trainable=True)
    assert torch.equal(loaded.eval()(X), model(X))
    if norm is not nn.SyncBatchNorm:
        assert same(stats(train(loaded, x=X + 1).base_model.model), stats(train(model, x=X + 1).base_model.model))


def test_instance_norms(tmp_path):
    class Images(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.kan, self.norm = FastKANLayer(3, 4), nn.InstanceNorm1d(4, track_running_stats=True)
            self.plain = nn.InstanceNorm1d(4)  # without statistics

        def forward(self, x):
            return self.plain(self.norm(self.kan(x).unflatten(0, (-1, 10)).mT))

    model = train(adapt(Images()))
    model.save_pretrained(tmp_path)
    assert torch.equal(PeftModel.from_pretrained(Images(), tmp_path)(X), model(X))
    assert [name for name, _ in norm_layers(model.base_model.model)] == ["norm"]


def test_copies_and_casts():
    model = train(adapt())
    model.add_adapter("second", LoTRAConfig(r=1))
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(copied(X), model(X))
        train(copied, x=-X)
        copied.set_adapter("second")
        assert same(stats(copied.base_model.model), BASE)
    y = model(X)
    model.double()
    model.set_adapter("second")
    assert all(value.dtype == torch.float64 for name, value in stats(model).items() if "running" in name)
    model.set_adapter("default")
    torch.testing.assert_close(model(X.double()).float(), y)
    model.half().float()
    assert "base_model.model.1.lotra_running_mean" in get_peft_model_state_dict(model)


def test_under_inference_mode():
    model = train(adapt())
    model.add_adapter("second", LoTRAConfig(r=1))
    with torch.inference_mode():
        with model.disable_adapter():
            model(X)
        model.set_adapter("second")
        model(X)
    train(model)


def test_a_whole_state_dict():
    model = train(adapt())
    other = adapt()
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.eval()(X), model(X))
    with other.disable_adapter():
        assert same(stats(other.base_model.model), BASE)


def test_loading_over_an_adapter(tmp_path):
    model = train(adapt())
    model.save_pretrained(tmp_path / "moved")
    adapt().save_pretrained(tmp_path / "still")
    expected = stats(model.base_model.model)
    model.load_adapter(tmp_path / "still", "default")
    assert same(stats(model.base_model.model), BASE)
    model.load_adapter(tmp_path / "moved", "default")
    assert same(stats(model.base_model.model), expected)
    hotswap_adapter(model, tmp_path / "still")
    assert same(stats(model.base_model.model), BASE)


def test_exchanging_one_of_several_adapters(tmp_path):
    model = train(adapt())
    model.save_pretrained(tmp_path / "moved")
    expected, model = stats(model.base_model.model), adapt()
    model.add_adapter("second", LoTRAConfig(r=2))
    hotswap_adapter(model, tmp_path / "moved", "second")
    assert same(stats(model.base_model.model), BASE)
    model.set_adapter("second")
    assert same(stats(model.base_model.model), expected)


DAMAGES = {
    "shape": ("running_mean", lambda value: torch.zeros(7), r"\(7,\) in the checkpoint"),
    "kind": ("running_var", lambda value: value.long(), "is of type I64|int64 in the checkpoint"),
    "NaN": ("running_mean", lambda value: value * float("nan"), "not finite"),
    "negative": ("running_var", lambda value: -1 - value, "variance below zero"),
    "missing": ("running_var", lambda value: None, "lotra_running_var is missing"),
    "count": ("num_batches_tracked", lambda value: value.float(), "float32 in the checkpoint"),
    "bool": ("num_batches_tracked", lambda value: value > 0, "bool in the checkpoint"),
    "unknown": ("running_std", lambda value: torch.zeros(4), "nothing that this adapter has"),
}


@pytest.mark.parametrize("kind", DAMAGES)
@pytest.mark.parametrize("into", ["new", "existing"])
def test_damaged_statistics(kind, into, tmp_path):
    key, damage, message = DAMAGES[kind]
    if (kind, into) == ("unknown", "existing"):
        pytest.skip("PEFT passes over tensors of other names, if they come without a config")
    train(adapt()).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    name = f"base_model.model.1.lotra_{key}"
    if (value := damage(tensors.pop(name, None))) is not None:
        tensors[name] = value
    save_file(tensors, tmp_path / WEIGHTS)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    del config["integrity"]
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    base = make()
    if into == "new":
        with pytest.raises(ValueError, match=message):
            PeftModel.from_pretrained(base, tmp_path)
        assert "lotra" not in repr(base)
    else:
        model = train(adapt(base), x=-X)
        before = stats(base)
        with pytest.raises(ValueError, match=message + "|would be written over"):
            set_peft_model_state_dict(model, load_file(tmp_path / WEIGHTS))
        assert same(stats(base), before)


def test_unknown_normalizations(tmp_path):
    train(adapt()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="1.lotra_running_mean is nothing that this adapter has"):
        PeftModel.from_pretrained(make(lambda n: nn.LayerNorm(n)), tmp_path)


def test_an_interrupted_addition():
    """Statistics are exchanged, not written over, so that a transaction puts them back with all else."""
    config = LoTRAConfig(r=1)
    lines = interrupted(lambda: train(adapt()).add_adapter("second", config), 0)
    for line in some_of(lines)[::6]:
        model = train(adapt())
        before, y = stats(model.base_model.model), model(X)
        with suppress(KeyboardInterrupt):
            interrupted(lambda model=model: model.add_adapter("second", config), line)
        assert same(stats(model.base_model.model), before) and torch.equal(model(X), y)
        with model.disable_adapter():
            assert same(stats(model.base_model.model), BASE)


def test_rows_with_adapters_of_their_own():
    model = train(adapt())
    model.add_adapter("second", LoTRAConfig(r=1, init_weights=False))
    model.eval()
    expected = stats(model.base_model.model)
    with torch.no_grad():
        own = model(X)
        assert torch.allclose(model(X, adapter_names=["default"] * len(X)), own, atol=1e-6)
        with model.disable_adapter():
            base = model(X)
        assert torch.allclose(model(X, adapter_names=["__base__"] * len(X)), base, atol=1e-6)
        with pytest.raises(ValueError, match="different running statistics"):
            model(X, adapter_names=["default", "second"] * (len(X) // 2))
        assert torch.equal(model(X), own) and same(stats(model.base_model.model), expected)
        model.delete_adapter("default")
        model(X, adapter_names=["second", "__base__"] * (len(X) // 2))  # none has moved any


def test_mixed_models():
    enable_mixed()
    model = get_peft_model(make(), LoTRAConfig(r=2, init_weights=False), adapter_name="kan", mixed=True)
    train(model)
    expected, y = stats(model.base_model.model), model(X)
    model.add_adapter("other", LoTRAConfig(r=1))
    model.set_adapter("other")
    assert same(stats(model.base_model.model), BASE)
    model.set_adapter("kan")
    assert torch.equal(model(X), y)
    with model.disable_adapter():
        assert same(stats(model.base_model.model), BASE)
    assert same(stats(model.merge_and_unload()), expected)


def test_extraction_takes_those_inside_of_layers_along(tmp_path):
    tuned = make()
    with torch.no_grad():
        tuned[0].spline_linear.weight += 0.1
    train(tuned)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = extract_lotra(make(), tuned, 8)
    assert model.extraction_report.not_saved == []
    torch.testing.assert_close(model.eval()(X), tuned(X), atol=1e-4, rtol=1e-4)
    model.save_pretrained(tmp_path)
    assert torch.equal(PeftModel.from_pretrained(make(), tmp_path)(X), model(X))


def test_a_model_without_a_tuner_refuses_them(tmp_path):
    """What `inject_adapter_in_model` returns has nothing that could keep those of the base."""
    model = inject_adapter_in_model(LoTRAConfig(r=2), make())
    with pytest.raises(ValueError, match="PeftModel.from_pretrained"):
        set_peft_model_state_dict(model, get_peft_model_state_dict(train(adapt())))
