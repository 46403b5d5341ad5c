# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""What a user in a hurry does: numbers out of range, odd names, calls in another order, two things at once."""

from __future__ import annotations

import threading
from functools import partial

import pytest
import torch
from hostile import Net, X, adapted, assert_load_refused, assert_refused, edit_config, save
from peft import PeftModel, get_peft_model
from stand_ins import FAMILIES
from torch import nn
from torch.nn.utils import prune

from peft_lotra import LoTRAConfig, enable_mixed, gradient_spectrum, hotswap_adapter, preprocess_lotra


####################################
# Scales beyond the dtype          #
####################################


@pytest.mark.parametrize(("alpha", "dtype"), [(1e308, torch.float32), (-1e39, torch.float32), (1e5, torch.float16)])
@pytest.mark.parametrize("field", ["alpha", "alpha_pattern"])
def test_an_alpha_that_the_layer_cannot_hold(alpha, dtype, field):
    base = Net().to(dtype)
    config = {field: alpha if field == "alpha" else {"layers.1": alpha}}
    assert_refused(lambda: adapted(base, **config), base, error=ValueError, match="holds finite numbers up to")


def test_an_alpha_above_64_bits():
    base = Net()  # torch multiplies by no int of this size
    assert torch.isfinite(adapted(base, alpha=10**30, init_weights=True)(X)).all()


def test_an_alpha_of_a_file_that_the_layer_cannot_hold(tmp_path):
    edit_config(save(tmp_path / "a", modules_to_save=["head"]), alpha=1e300)
    assert_load_refused(tmp_path / "a", match="holds finite numbers up to")


@pytest.mark.parametrize("scale", [1e39, float("inf"), float("nan")])
def test_a_scale_that_the_layer_cannot_hold(scale):
    model = adapted()
    layer = model.base_model.model.kan.layers[0]
    for call in (
        lambda: layer.set_scale("default", scale),
        lambda: layer.scale_layer(scale),
        lambda: layer.unscale_layer(1e-300 * scale),
    ):
        if scale == 1e39 or call.__code__.co_names[0] != "unscale_layer":
            assert_refused(call, model, error=ValueError, match="would be scaled by")


@pytest.mark.parametrize("weight", [1e39, 1e308])
@pytest.mark.parametrize("kind", ["cat", "linear", "svd"])
def test_weights_whose_sum_the_layer_cannot_hold(kind, weight):
    """The adapter was made, and its outputs were NaN."""
    model = adapted()
    model.add_adapter("other", LoTRAConfig(r=2, init_weights=False))
    call = partial(model.base_model.add_weighted_adapter, ["default", "other"], [weight, weight], "sum", kind)
    assert_refused(call, model, error=ValueError, match="is beyond torch.float32")


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_gradients_are_gathered_in_any_mode(mode):
    model, config = Net(), LoTRAConfig(r=2, init_weights="gradient")
    with mode():
        preprocess_lotra(model, config, lambda: model(X).square().sum().backward())
        spectrum = gradient_spectrum(model, None, lambda: model(X).square().sum().backward())
    assert len(spectrum.layers) == 2
    get_peft_model(model, config)(X).sum().backward()


####################################
# Names                            #
####################################


@pytest.mark.parametrize("name", ["", "__base__", "keys", "training", "/absolute", "\0"])
def test_names_that_no_adapter_can_have(name):
    base, model = Net(), adapted()
    with pytest.warns(UserWarning) if not name else warning_free():
        assert_refused(lambda: adapted(base, name), base, error=ValueError, match=f"cannot be called {name!r}")
        assert_refused(lambda: model.add_adapter(name, LoTRAConfig(r=1)), model, error=ValueError, match="be called")
    enable_mixed()
    mixed = get_peft_model(Net(), LoTRAConfig(r=1), mixed=True)
    assert_refused(lambda: mixed.add_adapter(name, LoTRAConfig(r=1)), mixed, error=ValueError, match="be called")


class warning_free:  # in lower case, as pytest.warns
    __enter__ = __exit__ = lambda *args: None


# PEFT takes the names of adapters out of the names of tensors
@pytest.mark.parametrize("name", ["0", "layers", "kan", "head", "weight", "bias", "lotra_core", "base_layer", "model"])
def test_names_of_modules_and_of_tensors(name):
    base, model = Net(), adapted(modules_to_save=["head"])
    new = partial(adapted, base, name, modules_to_save=["head"])
    assert_refused(new, base, error=ValueError, match="has a module or a parameter of this")
    assert_refused(lambda: model.add_adapter(name, LoTRAConfig(r=1)), model, error=ValueError, match="of this name")


@pytest.mark.parametrize("name", ["0", "layers", "kan", "head"])
def test_names_of_modules_where_none_is_saved_whole(tmp_path, name):
    model = adapted(adapter_name=name)
    model.save_pretrained(tmp_path)
    for again in (name, "default"):
        assert torch.equal(PeftModel.from_pretrained(Net(), tmp_path / name, adapter_name=again)(X), model(X))


@pytest.mark.parametrize("name", ["2", "default ", "é", "a/b", "🦎", "lotra"])
def test_odd_names(tmp_path, name):
    model = adapted(adapter_name=name, modules_to_save=["head"])
    model.add_adapter("other", LoTRAConfig(r=1, init_weights=False))
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(Net(), tmp_path / name, adapter_name=name)
    assert torch.equal(again(X), model(X))
    for folder, adapter in ((name, name), ("other", "other")):
        again.load_adapter(tmp_path / folder, "second")
        again.set_adapter("second")
        model.set_adapter(adapter)
        assert torch.equal(again(X), model(X))
        again.delete_adapter("second")


####################################
# Computed tensors, the last one   #
####################################


@pytest.mark.parametrize("kind", ["pruned", "pruned inside", "weight_norm"])
@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_modules_to_save_that_cannot_be_copied(kind):
    base = Net()
    if kind == "pruned inside":
        base.head = nn.Sequential(base.head)
        prune.l1_unstructured(base.head[0], "weight", 0.5)
    elif kind == "pruned":
        prune.l1_unstructured(base.head, "weight", 0.5)
    else:
        torch.nn.utils.weight_norm(base.head)
    assert_refused(lambda: adapted(base, modules_to_save=["head"]), base, error=ValueError, match="cannot be copied")
    if kind == "pruned":
        prune.remove(base.head, "weight")
        y = base(X)
        model = get_peft_model(base, LoTRAConfig(r=1, modules_to_save=["head"]))
        assert torch.equal(model(X), y)


def test_the_last_adapter_is_deleted():
    model = adapted()
    with pytest.warns(UserWarning, match="'default' was the last adapter"):
        model.delete_adapter("default")
    model.add_adapter("new", LoTRAConfig(r=1))
    model.set_adapter("new")
    assert torch.equal(model(X), Net()(X))
    with pytest.warns(UserWarning, match="'new' was the last adapter"):
        model.delete_adapter("new")
    assert torch.equal(model.unload()(X), Net()(X))


# a file in another dtype than the base
@pytest.mark.parametrize("low", [False, True])
@pytest.mark.parametrize("cast", [False, True])
def test_an_adapter_that_is_loaded_beside_another_is_not_trained(tmp_path, low, cast):
    save(tmp_path / "a")
    model = adapted(Net().to(torch.bfloat16))
    model.load_adapter(tmp_path / "a", "second", low_cpu_mem_usage=low, autocast_adapter_dtype=cast)
    trainable = {name.rpartition(".")[2] for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == {"default"}


####################################
# Merging beside a forward pass    #
####################################


@pytest.mark.parametrize("what", ["attach", "add", "load", "load beside", "load over", "hotswap"])
@pytest.mark.parametrize("low", [False, True])
def test_adapters_made_in_inference_mode_are_trained(tmp_path, what, low):
    """PEFT's LoRA raises "Inference tensors cannot be saved for backward"."""
    folder = save(tmp_path, modules_to_save=["head"])
    base, config = Net(), LoTRAConfig(r=2, modules_to_save=["head"])
    model = None if what in ("attach", "load") else adapted(base, modules_to_save=["head"])
    options = {"is_trainable": True, "low_cpu_mem_usage": low}
    with torch.inference_mode():
        if what == "attach":
            model = get_peft_model(base, config)
        elif what == "add":
            model.add_adapter("other", config)
        elif what == "load":
            model = PeftModel.from_pretrained(base, folder, **options)
        elif what == "load beside":
            model.load_adapter(folder, "other", **options)
        elif what == "load over":
            model.load_adapter(folder, "default", **options)
        else:
            hotswap_adapter(model, folder)
        if "other" in model.peft_config:
            model.set_adapter("other")
        model(X)
    optimizer = torch.optim.Adam([parameter for parameter in model.parameters() if parameter.requires_grad])
    model.train()(X).square().sum().backward()
    optimizer.step()


@pytest.mark.parametrize("family", ["own", "efficient-kan"])
def test_merging_beside_a_forward_pass(family):
    layers = (FAMILIES[family](3, 8), FAMILIES[family](8, 8), FAMILIES[family](8, 2))
    model = adapted(nn.Sequential(*layers), alpha=3.0)
    with torch.no_grad():
        expected = model(X)
    wrong, done, rounds = [], threading.Event(), []

    def forward():
        with torch.no_grad():
            while not done.is_set():
                rounds.append(1)
                wrong.extend([y] if not torch.allclose(y := model(X), expected, atol=1e-3) else ())

    threads = [threading.Thread(target=forward) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(20):
            model.merge_adapter()
            model.unmerge_adapter()
    finally:
        done.set()
        for thread in threads:
            thread.join()
    assert rounds and not wrong, f"{len(wrong)} of {len(rounds)} outputs are wrong"
