# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""An adapter takes the place of another one, while the model serves."""

import copy

import pytest
import torch
from helpers import X, adapt, add_adapter, assert_equal, assert_near, load, lotra_layers, net, refused, state
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.testing import assert_close

from peft_lotra import LoTRAConfig, hotswap_adapter
from peft_lotra.kan import KAN


@pytest.fixture
def save(tmp_path):
    """Saves an adapter, and returns its folder and its outputs."""

    def save(model=None, **config):
        model = adapt(**config) if model is None else model
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        model.save_pretrained(folder)
        return folder, model(X).detach()

    return save


@pytest.mark.parametrize("in_place", [False, True])
def test_a_compiled_model_is_not_compiled_again(save, in_place):
    base = KAN([3, 5, 2])
    first, second, third = (save(base=copy.deepcopy(base), alpha=alpha) for alpha in (1.0, 1.0, 0.5))
    model, graphs = load(first[0], base), []
    torch._dynamo.reset()

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    if in_place:
        model.compile(backend=backend, fullgraph=True)
        compiled = model
    else:
        compiled = torch.compile(model, backend=backend, fullgraph=True)
    with torch.inference_mode():
        assert_close(compiled(X), first[1])
        for folder, expected in (second, third, first):
            hotswap_adapter(compiled, folder)
            assert_close(compiled(X), expected)
    assert len(graphs) == 1


def test_an_adapter_of_a_compiled_base_is_swapped(save):
    folder, y = save(base=torch.compile(net(), backend="eager"))
    model = adapt(torch.compile(net(), backend="eager"))
    hotswap_adapter(model, folder)

    assert_equal(model(X), y)


def test_lower_ranks_are_filled_up_and_saved(save):
    model, (folder, expected) = adapt(r=2), save(r=(3, 2, 1))
    hotswap_adapter(model, folder, target_rank=4)

    assert_near(model(X), expected)
    assert next(iter(lotra_layers(model).values())).lotra_r["default"] == (4, 3, 4)
    assert_equal(load(save(model)[0])(X), model(X))


def test_the_alpha_of_the_file_counts(save):
    first, second = save(alpha=2.0), save(alpha=0.5, alpha_pattern={"layers.1": 3.0})
    model = load(first[0])
    add_adapter(model, "other", r=(2, 3, 4), alpha=0.7)
    hotswap_adapter(model, second[0], "other")

    assert_equal(model(X), first[1])  # the other adapters stay

    hotswap_adapter(model, second[0])
    for name in ("default", "other"):
        model.set_adapter(name)
        assert_close(model(X), second[1])
    model.set_adapter("default")

    assert_close(load(save(model)[0])(X), second[1])

    again = load(second[0])
    for swapped in (model, again):
        for layer in lotra_layers(swapped).values():
            layer.set_scale("default", 0.3)

    assert_close(model(X), again(X))


def test_files_and_models_may_be_in_half_precision(save):
    folder, expected = save(alpha=1.1)
    half = load(folder)
    for name, parameter in half.named_parameters():
        if "lotra_" in name:
            parameter.data = parameter.data.bfloat16()
    half_folder, _ = save(half)
    model = load(save(alpha=0.7)[0])
    hotswap_adapter(model, half_folder)  # the alpha is made up for in the precision of the adapter here

    assert_close(model(X), load(half_folder)(X))

    model = get_peft_model(net().bfloat16(), LoTRAConfig(r=(2, 3, 4)), autocast_adapter_dtype=False).eval()
    hotswap_adapter(model, folder)

    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert_close(model(X.bfloat16()).float(), expected, rtol=0.05, atol=0.1)


@pytest.mark.parametrize("wrap", [lambda head: head, nn.Sequential])
def test_saved_modules_are_replaced_too(save, wrap):
    base = net()
    base.head = wrap(base.head)
    config = {"target_modules": ["layers.0"], "modules_to_save": ["head"]}
    model, source = (adapt(copy.deepcopy(base), **config) for _ in range(2))
    for parameter in source.base_model.model.head.modules_to_save["default"].parameters():
        nn.init.ones_(parameter)
    hotswap_adapter(model, save(source)[0])

    assert_equal(state(model), state(source))


def test_a_file_fits_layers_that_were_renamed(tmp_path):
    """A file fits the model that it was loaded into under other names, in whatever order."""
    adapt(r=2, modules_to_save=["head", "norm"], base=headed("kan")).save_pretrained(tmp_path)

    with pytest.warns(UserWarning, match="other names"):
        model = PeftModel.from_pretrained(headed("backbone"), tmp_path)

    model.peft_config["default"].modules_to_save = ["norm", "head"]
    before = state(model)

    with pytest.warns(UserWarning, match="other names"):
        hotswap_adapter(model, tmp_path)
    assert_equal(state(model), before)


def headed(name):
    model = torch.nn.Module()
    model.add_module(name, KAN([3, 4]))
    model.head, model.norm = torch.nn.Linear(4, 2), torch.nn.BatchNorm1d(2)
    return model


OTHERS = [{"target_modules": ["layers.1"]}, {"adapt_residual": False}, {"base": net(hidden=5)}]
REFUSED = [*[(other, "layers.0") for other in OTHERS], ({"modules_to_save": ["head"]}, "head")]
REFUSED += [({"r": 2}, "layers.0.*target_rank"), *[({}, word) for word in ("nobody", "merged", "must be an integer")]]


@pytest.mark.parametrize(("config", "word"), REFUSED)
def test_an_adapter_that_does_not_fit_is_refused(save, config, word):
    (folder, _), model = save(**config), adapt()
    if word == "merged":
        model.merge_adapter()

    for target_rank in (0, "4", (4, 4, 4)) if word == "must be an integer" else (None,):
        with refused(word, model):
            hotswap_adapter(model, folder, "nobody" if word == "nobody" else "default", target_rank=target_rank)


def test_another_grid_is_refused_and_another_base_is_a_warning(save):
    base = net()
    base.kan.layers[0].grid_bounds.mul_(1.5)
    (folder, _), model = save(base=base), adapt()

    with refused("grid", model):
        hotswap_adapter(model, folder)

    hotswap_adapter(model, folder, check_base="ignore")
    changed = net()
    changed.kan.layers[0].spline_weight.data.add_(1)

    with pytest.warns(UserWarning, match="parameters"):
        hotswap_adapter(model, save(base=changed)[0])


def test_only_lotra_adapters_are_swapped(save, tmp_path):
    (folder, _), model = save(), adapt()
    lora = get_peft_model(nn.Sequential(nn.Linear(3, 2)), LoraConfig(target_modules=["0"]))
    lora.save_pretrained(tmp_path / "lora")

    for other, words in ((tmp_path, "Can't find 'adapter_config.json'"), (tmp_path / "lora", "LORA")):
        with refused(words, model):
            hotswap_adapter(model, other)
    for other in (lora, net()):
        with refused("must be a PeftModel with a LoTRA adapter", other):
            hotswap_adapter(other, folder)
