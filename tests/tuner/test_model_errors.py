# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Bad input: a clear error, and nothing changed."""

from __future__ import annotations

import copy
import json

import pytest
import safetensors.torch
import torch
from helpers import adapt, assert_same, base, components, inputs, lotra_layers, nested, snapshot
from peft import PeftModel, get_peft_model
from stand_ins import FAMILIES, as_model
from torch import nn

from peft_lotra import LoTRAConfig, register_kan_layer
from peft_lotra.families.registry import known_families
from peft_lotra.kan import KAN


def refused(model, config, error=ValueError, adapter_name="default"):
    """The message with which an adapter is refused; a fresh model, or one more adapter of a `PeftModel`."""
    before = snapshot(model)
    configs = dict(getattr(model, "peft_config", {}))
    with pytest.raises(error) as caught:
        if isinstance(model, PeftModel):
            model.add_adapter(adapter_name, config)
        else:
            get_peft_model(model, config, adapter_name=adapter_name)
    assert_same(model, before)
    assert dict(getattr(model, "peft_config", {})) == configs
    return str(caught.value)


@pytest.fixture(params=["fresh", "adapted"])
def model(request):
    """A model, and the same with an adapter that a failed second one must leave as it is."""
    if request.param == "fresh":
        yield nested()
        return
    adapted = adapt(nested(), adapter_name="existing", modules_to_save=["head"])
    x = inputs()
    y = adapted(x)
    yield adapted
    assert torch.equal(adapted(x), y) and adapted.active_adapters == ["existing"]
    assert list(adapted.peft_config) == ["existing"]


###########
# Targets #
###########


@pytest.mark.parametrize("config", [{}, {"target_modules": "all-kan"}])
def test_no_kan_layer(config):
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 4))
    message = refused(model, LoTRAConfig(**config))
    assert "No KAN layer was found" in message and "Linear (2)" in message and "ReLU (1)" in message
    assert "register_kan_layer" in message and all(family in message for family in known_families())


@pytest.mark.parametrize("targets", [["head"], ["body.0", "tail.layers.1", "head"], r"body.*0|head"])
def test_a_target_that_is_no_kan_layer(model, targets):
    message = refused(model, LoTRAConfig(target_modules=targets), adapter_name="other")
    kind = "ModulesToSaveWrapper" if isinstance(model, PeftModel) else "Linear"
    assert f"`head` is a {kind}," in message and "register_kan_layer" in message
    assert all(family in message for family in known_families())


def test_a_container_is_no_kan_layer(model):
    assert "`tail` is a KAN," in refused(model, LoTRAConfig(target_modules=["tail"]), adapter_name="other")


@pytest.mark.parametrize("targets", [["nowhere"], "nowhere.*"])
def test_a_target_that_is_not_there(model, targets):
    message = refused(model, LoTRAConfig(target_modules=targets), adapter_name="other")
    assert "nowhere" in message and "not found" in message


def test_all_linear(model):
    assert "all-kan" in refused(model, LoTRAConfig(target_modules="all-linear"), adapter_name="other")


@pytest.mark.parametrize("config", [{"layers_to_transform": [7]}, {"layers_to_transform": 0, "layers_pattern": "no"}])
def test_layer_indices_that_are_not_there(model, config):
    message = refused(model, LoTRAConfig(**config), adapter_name="other")
    assert "`layers_to_transform`" in message and "body.0" in message


def test_everything_excluded(model):
    refused(model, LoTRAConfig(exclude_modules=r".*"), adapter_name="other")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_that_is_itself_a_kan_layer(family):
    layer = FAMILIES[family](3, 4)
    message = refused(layer, LoTRAConfig())
    assert "itself a KAN layer" in message and type(layer).__name__ in message and "Wrap it" in message
    adapt(nn.Sequential(layer))


def test_a_pattern_that_does_not_fit_on_a_later_layer():
    model = nested()
    layer = model["tail"].layers[1]
    layer.spline_weight = nn.Parameter(layer.spline_weight.flatten(1).clone())
    message = refused(model, LoTRAConfig())
    assert "`spline_weight`" in message and "'o i k'" in message and "(5, 48)" in message
    refused(model, LoTRAConfig(target_modules=["body.0", "tail.layers.1"]))


def test_a_registered_pattern_that_does_not_fit():
    class Mine(nn.Module):
        def __init__(self):
            super().__init__()
            self.c = nn.Parameter(torch.randn(2, 3, 4))

    from peft_lotra.families import registry

    register_kan_layer("mine", matches=Mine, coefficients=("c", "o (i k)"))
    try:
        message = refused(as_model(Mine()), LoTRAConfig())
    finally:
        del registry._SPECS["mine"]
    assert "'o (i k)'" in message and "(2, 3, 4)" in message


def test_a_name_that_torch_refuses(model):
    refused(model, LoTRAConfig(), error=KeyError, adapter_name="with.dot")


###########
# Loading #
###########


def saved(folder, model, **config):
    adapt(model, **config).save_pretrained(folder)
    return folder


def edit_config(folder, **changes):
    changes = {"integrity": None, **changes}
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def load_refused(model, folder, error=ValueError, **kwargs):
    before = snapshot(model)
    with pytest.raises(error) as caught:
        if isinstance(model, PeftModel):
            model.load_adapter(folder, "other", **kwargs)
        else:
            PeftModel.from_pretrained(model, folder, **kwargs)
    assert_same(model, before)
    return str(caught.value)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("adapted", [False, True])
def test_an_adapter_of_another_shape(tmp_path, adapted, low_cpu_mem_usage):
    saved(tmp_path, KAN([3, 6, 6, 2]), modules_to_save=None)
    model = KAN([3, 6, 7, 2])
    x = inputs()
    if adapted:
        model = adapt(model, adapter_name="existing")
    y = model(x)
    message = load_refused(model, tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert "layers.1.lotra_factor_out" in message and "(6, 2)" in message and "(7, 2)" in message
    assert "layers.2.lotra_factor_in" in message and "layers.0" not in message
    assert torch.equal(model(x), y)
    if adapted:
        assert list(model.peft_config) == ["existing"]
        model.load_adapter(saved(tmp_path / "good", KAN([3, 6, 7, 2])), "other")
    else:
        assert not hasattr(model, "peft_config")
        assert lotra_layers(adapt(model))


def test_an_adapter_of_another_shape_with_modules_to_save(tmp_path):
    saved(tmp_path, nested(), modules_to_save=["head"])
    model = nested()
    model["body"][0] = FAMILIES["own"](4, 5)
    assert "body.0.lotra_factor_in" in load_refused(model, tmp_path)


def test_mismatched_sizes_can_be_ignored(tmp_path):
    saved(tmp_path, KAN([3, 6, 6, 2]))
    tensors = safetensors.torch.load_file(tmp_path / "adapter_model.safetensors")
    with pytest.warns(UserWarning, match="layers.1.lotra_factor_out"):
        model = PeftModel.from_pretrained(KAN([3, 6, 7, 2]), tmp_path, ignore_mismatched_sizes=True)
    layers = lotra_layers(model.base_model.model)
    assert layers["layers.1"].lotra_factor_out["default"].shape == (7, 2)
    for name in ("lotra_core", "lotra_factor_in", "lotra_factor_basis"):
        loaded = getattr(layers["layers.1"], name)["default"]
        assert torch.equal(loaded, tensors[f"base_model.model.layers.1.{name}"])
    assert model(inputs()).isfinite().all()


def test_another_family(tmp_path):
    saved(tmp_path, base("own"))
    message = load_refused(base("efficient-kan"), tmp_path)
    assert "made for another model" in message
    assert "kan: a peft-lotra layer, the model has a efficient-kan layer" in message.replace("an eff", "a eff")


def test_a_model_that_has_an_adapter_already(tmp_path):
    saved(tmp_path, KAN([3, 4, 2]))
    model = adapt(KAN([3, 4, 2]))
    with pytest.raises(ValueError, match=r"a PeftModel, which has adapters already: `model.unload\(\)`"):
        PeftModel.from_pretrained(model, tmp_path)


@pytest.mark.parametrize("adapted", [False, True])
def test_a_layer_that_the_model_does_not_have(tmp_path, adapted):
    saved(tmp_path, KAN([3, 4, 4, 2]), r=1)
    model = KAN([3, 4, 4])
    if adapted:
        model = adapt(model, adapter_name="existing")
    message = load_refused(model, tmp_path)
    assert "layers.2: a peft-lotra layer, the model has no such layer" in message and "layers.1" not in message


def test_a_file_without_the_record_of_its_layers_loads_and_is_checked(tmp_path):
    model = KAN([3, 6, 2])
    fresh = copy.deepcopy(model)
    adapted = adapt(model)
    adapted.save_pretrained(tmp_path)
    edit_config(tmp_path, base_layers=None)
    x = inputs()
    assert torch.equal(PeftModel.from_pretrained(fresh, tmp_path)(x), adapted(x))
    with pytest.raises(ValueError, match=r"layers.0.lotra_factor_out: \(6, 2\) in the checkpoint, \(7, 2\)"):
        PeftModel.from_pretrained(KAN([3, 7, 2]), tmp_path)


def test_bad_ranks_in_a_file(tmp_path):
    saved(tmp_path, KAN([3, 4, 2]))
    edit_config(tmp_path, r=[2, 2])
    assert "`r` should be a positive integer" in load_refused(KAN([3, 4, 2]), tmp_path)


def test_other_ranks_in_the_config_than_in_the_tensors(tmp_path):
    saved(tmp_path, KAN([3, 4, 2]), r=2)
    edit_config(tmp_path, r=3)
    message = load_refused(KAN([3, 4, 2]), tmp_path)
    assert "layers.0.lotra_core: (2, 2, 2) in the checkpoint, (3, 3, 3) by its config" in message
    edit_config(tmp_path, r=3, base_layers=None)
    message = load_refused(KAN([3, 4, 2]), tmp_path)
    assert "layers.0.lotra_core: (2, 2, 2) in the checkpoint, (3, 3, 3) in the model" in message


###########
# Merging #
###########


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize(
    "merge", [lambda m: m.merge_adapter(safe_merge=True), lambda m: m.merge_and_unload(safe_merge=True)]
)
def test_a_safe_merge_of_what_is_not_finite(value, merge):
    model = adapt(nested())
    with torch.no_grad():
        model.base_model.model["body"][1].lotra_core["default"][0, 0, 0] = value
        model.base_model.model["body"][1].lotra_factor_out["default"][0, 0] = 1.0
    state = {name: tensor.clone() for name, tensor in model.state_dict().items() if "lotra_" not in name}
    types = [type(module) for module in model.modules()]
    message = "NaNs detected in the merged weights. The adapter default seems to be broken"
    with pytest.raises(ValueError, match=message):
        merge(model)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in state.items())
    assert [type(module) for module in model.modules()] == types
    assert not any(layer.merged for layer in lotra_layers(model).values())


def test_a_safe_merge_of_two_adapters_of_which_the_second_is_broken():
    model = adapt(nested(), adapter_name="good")
    model.add_adapter("bad", LoTRAConfig(r=2, init_weights=False))
    with torch.no_grad():
        model.base_model.model["tail"].layers[1].lotra_factor_out["bad"].fill_(torch.nan)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items() if "base_layer" in name}
    with pytest.raises(ValueError, match="The adapter bad seems to be broken"):
        model.merge_adapter(["good", "bad"], safe_merge=True)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in state.items())
    assert not any(layer.merged for layer in lotra_layers(model).values())
    model.merge_adapter(["good"], safe_merge=True)
    assert all(layer.merged_adapters == ["good"] for layer in lotra_layers(model).values())


def test_two_adapters_whose_sum_is_not_finite():
    """Each is finite when added to the base by itself."""
    model = adapt(base("own"), adapter_name="first")
    model.add_adapter("second", LoTRAConfig(init_weights=False))
    (layer,) = lotra_layers(model).values()
    with torch.no_grad():
        for name in ("first", "second"):
            for part in layer.get_components(name):
                part.zero_()
                part.view(-1)[0] = (2.5e38) ** 0.25
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match="NaNs detected"):
        model.merge_adapter(["first", "second"], safe_merge=True)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in state.items())
    assert not layer.merged


##########################
# Names of adapters, etc #
##########################


@pytest.mark.parametrize(
    "call",
    [
        lambda m: m.merge_adapter(["nobody"]),
        lambda m: m.merge_adapter(["default", "nobody"]),
        lambda m: m.merge_and_unload(adapter_names=["nobody"]),
        lambda m: m.set_adapter("nobody"),
        lambda m: m.base_model.set_adapter(["default", "nobody"]),
        lambda m: m.delete_adapter("nobody"),
        lambda m: m(inputs(), adapter_names=["nobody"] * 6),
    ],
    ids=["merge", "merge two", "merge_and_unload", "set", "set two", "delete", "forward"],
)
def test_unknown_adapter_names(call):
    model = adapt(nested(), modules_to_save=["head"])
    before, x = snapshot(model), inputs()
    y = model(x)
    with pytest.raises(ValueError, match="nobody"):
        call(model)
    assert_same(model, before)
    assert torch.equal(model(x), y) and model.active_adapters == ["default"]
    assert not any(layer.merged for layer in lotra_layers(model).values())


def test_a_merged_adapter_is_not_deleted():
    model = adapt(nested())
    model.add_adapter("other", LoTRAConfig(init_weights=False))
    model.merge_adapter()
    before = snapshot(model)
    with pytest.raises(ValueError, match="(?s)default.*merged.*unmerge"):
        model.delete_adapter("default")
    assert_same(model, before)
    assert list(model.peft_config) == ["default", "other"]
    model.delete_adapter("other")
    model.unmerge_adapter()
    assert {name.rpartition(".")[2] for name, _ in components(model)} == {"default"}


@pytest.mark.parametrize("leave", ["unload", "merge_and_unload"])
def test_a_peft_model_inside_of_another_is_left_by_itself(leave):
    network = KAN([3, 4, 2])
    x = torch.rand(5, 3)
    expected = network(x)
    inner = get_peft_model(network, LoTRAConfig(r=2, init_weights=False), adapter_name="inner")
    outer = get_peft_model(inner, LoTRAConfig(r=2), adapter_name="outer")
    before = outer(x)
    with pytest.raises(ValueError, match="itself a PeftModel"):
        getattr(outer, leave)()
    assert torch.equal(outer(x), before)
    assert torch.equal(outer.get_base_model().unload()(x), expected)
