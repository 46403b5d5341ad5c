# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Which modules are adapted: those that are meant, under exact names, and none inside of another one."""

import copy
from operator import attrgetter

import pytest
import torch
from helpers import (
    X,
    adapt,
    add_adapter,
    assert_equal,
    assert_near,
    config_of,
    lotra_layers,
    nested,
    net,
    refused,
    relative,
)
from peft import (
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from stand_ins import LAYER_KINDS, FastKANLayer
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.testing import assert_close

from peft_lotra import LoTRAConfig, hotswap_adapter
from peft_lotra.kan import KAN, KANLinear, SlimKAN


ALL = ["body.0", "body.1", "tail.layers.0", "tail.layers.1"]


def names_of(model):
    return [name.removeprefix("base_model.model.") for name in lotra_layers(model)]


@pytest.mark.parametrize(
    "config, expected",
    [
        ({"target_modules": "all-kan"}, ALL),
        ({"target_modules": None}, ALL),
        ({"target_modules": ["0"]}, ["body.0", "tail.layers.0"]),
        ({"target_modules": ["layers.1"]}, ["tail.layers.1"]),
        ({"target_modules": r"tail\..*\.\d"}, ["tail.layers.0", "tail.layers.1"]),
        ({"exclude_modules": ["body.1"]}, ["body.0", "tail.layers.0", "tail.layers.1"]),
        ({"exclude_modules": r".*\.1"}, ["body.0", "tail.layers.0"]),
        ({"target_modules": ["0", "1"], "exclude_modules": ["layers.0"]}, ["body.0", "body.1", "tail.layers.1"]),
        ({"target_modules": r".*\.1", "exclude_modules": ["body.1"]}, ["tail.layers.1"]),
        ({"modules_to_save": ["head"]}, ALL),
    ],
)
@pytest.mark.parametrize("again", [False, True])
def test_the_named_layers_are_adapted(config, expected, again):
    model = nested()
    before = model(X)
    if again:
        model = adapt(model, r=1)
        model.add_adapter("other", LoTRAConfig(**config))
        model.set_adapter("other")
    else:
        model = get_peft_model(model, LoTRAConfig(**config), adapter_name="other")
    adapted = lotra_layers(model.base_model.model)

    assert [name for name, layer in adapted.items() if "other" in layer.lotra_r] == expected
    assert torch.allclose(model.eval()(X), before)

    components = [layer.get_components("other") for layer in adapted.values() if "other" in layer.lotra_r]
    trained = sum(p.requires_grad for n, p in model.named_parameters() if "lotra_" in n)

    assert trained == sum(len(tensor._asdict()) for tensor in components)


REFUSED = {
    "no KAN layer": (lambda: nn.Sequential(nn.Linear(3, 4), nn.ReLU()), {}, "No KAN layer was found"),
    "no KAN layer, named": (nested, {"target_modules": ["body.0", "head"]}, "`head` is a Linear, which is not a KAN"),
    "a container": (nested, {"target_modules": ["tail"]}, "`tail` is a KAN,"),
    "nothing of the name": (nested, {"target_modules": ["nowhere"]}, "'nowhere'} not found in the base model"),
    "a typo in a regex": (nested, {"target_modules": r".*\.layrs"}, "layrs not found in the base model"),
    "all-linear": (nested, {"target_modules": "all-linear"}, "is a Linear, which is not a KAN"),
    "everything excluded": (nested, {"exclude_modules": ".*"}, "xclude"),
    "nothing to save": (nested, {"modules_to_save": ["haed", "head"]}, "`modules_to_save` has 'haed'"),
    "a bare layer": (lambda: LAYER_KINDS["own"](3, 4), {}, "itself a KAN layer.*Wrap it"),
    "a target in a target": (lambda: nn.Sequential(Outer()), {"target_modules": r"0|.*\.inner"}, "is a part of"),
    "adapted coefficients to save": (
        lambda: nn.Sequential(FastKANLayer(3, 4)),
        {"modules_to_save": ["spline_linear"]},
        "`modules_to_save` has 'spline_linear'",
    ),
}


class Outer(FastKANLayer):
    """A KAN layer with a KAN layer inside."""

    def __init__(self):
        super().__init__(3, 4)
        self.inner = LAYER_KINDS["own"](3, 3)

    def forward(self, x):
        return super().forward(self.inner(x))


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_refused_changes_nothing(kind):
    make, config, words = REFUSED[kind]
    model = make()

    with refused(words, model):
        get_peft_model(model, LoTRAConfig(**config))

    if make is nested and kind != "no KAN layer, named":
        model = adapt(nested(), modules_to_save=["head"])
        y = model(X)
        with refused(words, model):
            model.add_adapter("other", LoTRAConfig(**config))
        assert list(model.peft_config) == ["default"]
        assert_equal(model(X), y)


def test_a_name_that_matches_nothing_is_a_warning_that_lists_the_kan_layers():
    words = r"has \['body.O'\], which match no module. The KAN layers of the model are `body.0`, .* and 1 more"
    with pytest.warns(UserWarning, match=words):
        model = get_peft_model(nested(), LoTRAConfig(target_modules=["body.O", "body.1"]))
    assert names_of(model) == ["body.1"]
    with pytest.warns(UserWarning, match="The KAN layers of the model are none"), pytest.raises(ValueError):
        get_peft_model(nn.Sequential(nn.Linear(3, 4)), LoTRAConfig(target_modules=r".*\.layrs"))


@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
def test_a_pattern_that_matches_no_layer_is_a_warning(field, recwarn):
    """A misspelled name would otherwise leave the layer with the ranks and the scale of all."""
    get_peft_model(nested(), LoTRAConfig(budget=0.5, **{field: {"body.1": 1, r".*layers\.0": 2}}))

    assert not [str(warning.message) for warning in recwarn if "pattern" in str(warning.message)]
    with pytest.warns(UserWarning, match="_pattern` match no adapted layer: 'bodi.1'"):
        get_peft_model(nested(), LoTRAConfig(**{field: {"bodi.1": 1, "body.0": 2}}))


def test_a_target_around_an_adapted_layer_is_refused():
    model = adapt(nn.Sequential(Outer()), target_modules=r".*\.inner")
    with refused("is a part of", model):
        model.add_adapter("other", LoTRAConfig(target_modules=["0"]))


def test_of_a_layer_in_a_layer_the_outer_one_is_adapted():
    assert names_of(adapt(nn.Sequential(Outer(), LAYER_KINDS["own"](4, 2)))) == ["0", "1"]


NAMES = [(name, "") for name in ("", "__base__", "keys", "training", "with.dot", 3)]
# PEFT would save it into a folder in a folder, or outside of the folder
NAMES += [(name, "without dots and slashes") for name in ("in/folders", "/absolute", r"in\folders")]
# PEFT would write `head.head.weight` as `weight`
NAMES += [(name, f"cannot be called '{name}'") for name in ("head", "weight", "model")]


@pytest.mark.parametrize(("name", "words"), NAMES)
def test_a_name_that_no_adapter_can_have_is_refused(name, words):
    config = LoTRAConfig(r=1, modules_to_save=["head"])
    for model, attach in (
        (net(), lambda model: get_peft_model(model, config, adapter_name=name)),
        (adapt(modules_to_save=["head"]), lambda model: model.add_adapter(name, config)),
    ):
        with refused(words, model, error=(ValueError, KeyError, TypeError)):
            attach(model)


CHANGES = {
    "weight norm": parametrizations.weight_norm,
    "pruned": lambda layer, name: prune.l1_unstructured(layer, name, amount=0.3),
    "integers": lambda layer, name: assign(layer, name, (getattr(layer, name) * 100).to(torch.int8)),
    "another shape": lambda layer, name: assign(layer, name, getattr(layer, name).detach().flatten(1)),
}


def assign(layer, name, value):
    setattr(layer, name, nn.Parameter(value, requires_grad=False))


@pytest.mark.parametrize("change", CHANGES)
def test_parameters_that_cannot_be_adapted_are_refused(change):
    model = nested()
    CHANGES[change](model["tail"].layers[1], "spline_weight")

    with refused("spline_weight", model):
        get_peft_model(model, LoTRAConfig())


class Shared(nn.Module):
    """A KAN layer, and another module that `share` may give one of its parameters."""

    def __init__(self, share, kan=None, other=None):
        super().__init__()
        self.kan = kan or KANLinear(3, 3)
        self.other = other or nn.Linear(3, 3)
        share(self)

    def forward(self, x):
        return self.other(self.kan(x))


def tie(path, other_path):
    """A function that gives the module at the second path the parameter or module at the first one."""

    def share(model):
        owner, _, leaf = other_path.rpartition(".")
        setattr(model.get_submodule(owner), leaf, attrgetter(path)(model))

    return share


SHARED = {
    "linear": lambda: Shared(tie("kan.base_weight", "other.weight")),
    "parent": lambda: Shared(tie("kan.base_weight", "weight")),
    "module": lambda: Shared(tie("kan.spline_linear", "part"), FastKANLayer(3, 3)),
    "KAN layer": lambda: Shared(tie("kan.base_weight", "other.base_weight"), other=KANLinear(3, 3)),
}


@pytest.mark.parametrize("place", SHARED)
def test_a_parameter_shared_with_another_module_is_refused(place):
    """An adapter would change one of the modules, and a merge both."""
    model = SHARED[place]()

    with refused("`kan` and `.*` share the parameter .* would change both", model):
        get_peft_model(model, LoTRAConfig(target_modules=["kan"]))


@pytest.mark.parametrize("share", [tie("kan.spline_linear.weight", "kan.alias"), tie("kan", "again")])
def test_a_parameter_under_two_names_of_a_layer_is_adapted(share):
    model = adapt(Shared(share, FastKANLayer(3, 3)))
    y = model(X)

    assert_near(model.merge_and_unload()(X), y)


class Network(nn.Module):
    """A KAN layer `fc1` beside a linear layer `block.fc1`, whose name ends alike."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.fc1 = LAYER_KINDS["own"](3, 4)
        self.block = nn.ModuleDict({"fc1": nn.Linear(4, 4), "fc2": LAYER_KINDS["own"](4, 2)})

    def forward(self, x):
        return self.block["fc2"](self.block["fc1"](self.fc1(x)))


def test_names_that_end_alike_are_told_apart(tmp_path):
    model = adapt(Network())

    assert names_of(model) == ["fc1", "block.fc2"]

    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(Network(), tmp_path)

    assert_equal(loaded(X), model(X))

    loaded.save_pretrained(tmp_path / "again")
    add_adapter(model, "second")  # now the names of the base layers end alike too

    assert all(set(layer.lotra_r) == {"default", "second"} for layer in lotra_layers(model).values())
    with refused(r"`block\.fc1` is a Linear"):
        adapt(Network(), target_modules=["fc1"])


def test_a_file_of_many_layers_keeps_their_names(tmp_path):
    """`layers.10` comes before `layers.2`; of 20 names and more PEFT keeps endings, which may be elsewhere too."""
    network, x = KAN([2] * 26), torch.rand(5, 2)
    model = adapt(copy.deepcopy(network), r=1)
    model.save_pretrained(tmp_path)
    targets = config_of(tmp_path)["target_modules"]

    assert sorted(targets) == sorted(f"layers.{index}" for index in range(25))

    loaded = PeftModel.from_pretrained(copy.deepcopy(network), tmp_path)

    assert_equal(loaded(x), model(x))

    other = adapt(network, r=1)
    hotswap_adapter(other, tmp_path)

    assert_equal(other(x), model(x))


class Tied(nn.Module):
    """A layer under two names, and in two places, as in KA-GNN."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = LAYER_KINDS["own"](3, 3)
        self.block = nn.ModuleDict({"kan": self.first, "bn": nn.BatchNorm1d(3)})
        self.head = self.alias = nn.Linear(3, 2)

    def forward(self, x):
        return self.alias(self.block["bn"](self.block["kan"](self.first(x))))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("config", [{}, {"target_modules": ["first"]}])
def test_a_layer_under_two_names_has_one_adapter(config, tmp_path):
    model = adapt(Tied(), **config)
    y = model(X)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(Tied(), tmp_path)
    assert_equal(loaded(X), y)
    loaded.load_adapter(tmp_path, "second")
    loaded.set_adapter("second")
    assert_equal(loaded(X), y)
    set_peft_model_state_dict(loaded, get_peft_model_state_dict(model), "second")
    assert_equal(loaded(X), y)
    merged = model.merge_and_unload()

    assert merged.first is merged.block["kan"]
    assert merged.state_dict().keys() == Tied().state_dict().keys()
    assert_close(merged(X), y)


def test_an_adapter_is_injected_without_a_peft_model():
    base = net()
    model = inject_adapter_in_model(LoTRAConfig(r=2, init_weights=False, target_modules=["layers.1"]), base)

    assert model is base
    assert list(lotra_layers(model)) == ["kan.layers.1"]
    assert relative(model(X), net()(X)) > 1e-3

    tensors = get_peft_model_state_dict(model)

    assert len(tensors) == 4

    copied = inject_adapter_in_model(LoTRAConfig(r=2), net(), state_dict=tensors)
    set_peft_model_state_dict(copied, tensors)

    assert list(lotra_layers(copied)) == ["kan.layers.1"]
    assert_equal(model(X), copied(X))


@pytest.mark.filterwarnings("ignore:Ranks are larger")
@pytest.mark.parametrize("ranks", [2, "full", [(2, 2, 2), None]])
def test_a_slim_kan_is_made_dense_first(ranks):
    slim = SlimKAN([3, 4, 2], ranks)
    x = torch.rand(6, 3)

    with refused("`layers.0` is a Slim layer: call `to_dense"):
        adapt(slim)

    assert_close(adapt(slim.to_dense(), random=False)(x), slim(x))
