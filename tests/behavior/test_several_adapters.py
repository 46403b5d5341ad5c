# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Several adapters of one model, and sums of them (`add_weighted_adapter`)."""

import copy

import pytest
from helpers import (
    KINDS,
    X,
    adapt,
    add_adapter,
    assert_equal,
    assert_near,
    layer_of,
    lotra_layers,
    nested,
    net,
    refused,
    relative,
)
from peft import PeftModel, get_layer_status, get_peft_model

from peft_lotra import LoTRAConfig
from peft_lotra.kan import KAN


@pytest.fixture(params=[(2, 3, 4), ("full", "full", 1)])
def model(request):
    model = adapt(r=request.param, alpha=2.0)
    add_adapter(model, "other")
    return model


def output(model, name):
    model.set_adapter(name)
    return model(X).detach()


def test_the_active_adapter_alone_counts_and_is_trained(model):
    base, first, second = net()(X), output(model, "default"), output(model, "other")
    with model.disable_adapter():
        assert_near(model(X), base)

    assert min(relative(first, base), relative(second, base), relative(first, second)) > 1e-3
    assert {name.split(".")[-1] for name, p in model.named_parameters() if p.requires_grad} == {"other"}
    assert all(layer.available_adapters == ["default", "other"] for layer in get_layer_status(model))
    with refused("nobody"):
        model.set_adapter("nobody")
    assert_equal(model(X), second)
    assert_equal(output(model, "default"), first)

    model.add_adapter("new", LoTRAConfig(r=3))

    assert_near(output(model, "new"), base)
    with refused("other"):
        model.add_adapter("other", LoTRAConfig())


@pytest.mark.parametrize("active", ["default", "other"])
def test_a_deleted_adapter_leaves_the_others(model, active):
    first = output(model, "default")
    model.set_adapter(active)
    model.delete_adapter("other")

    assert list(model.peft_config) == ["default"]
    assert not any("other" in name for name in model.state_dict())
    assert model.active_adapters == ["default"]
    assert_equal(model(X), first)
    with refused("other"):
        model.set_adapter("other")


def two_adapters(kind, first=(2, 3, 4), second=(3, 1, 2), **config):
    model = adapt(KINDS[kind](), r=first, alpha=0.5)
    add_adapter(model, "second", r=second, alpha=2.0, **config)
    layer = layer_of(model)
    return model, layer


def test_cat_adds_ranks_up_to_the_sizes(tmp_path):
    model, layer = two_adapters("own")
    bare = copy.deepcopy(model).unload()
    errors = model.add_weighted_adapter(["default", "second"], [0.7, -1.5], "sum", combination_type="cat")

    assert errors["kan"] < 1e-5
    assert layer.lotra_r["sum"][:2] == (4, 3)  # ranks add, and are brought down to the sizes

    # it was added, no more
    components = layer.get_components("sum")._asdict().values()

    assert model.active_adapters == ["default"]
    assert not any(component.requires_grad for component in components)

    model.set_adapter("sum")
    model.save_pretrained(tmp_path, selected_adapters=["sum"])

    assert_equal(PeftModel.from_pretrained(bare, tmp_path / "sum")(X), model(X))


def test_the_scale_of_the_moment_counts():
    model, layer = two_adapters("own")
    layer.set_scale("default", 3.0)
    model.add_weighted_adapter(["default"], [2.0], "more")

    assert_near(layer.get_delta_weight("more"), 2 * layer.get_delta_weight("default"))
    assert layer.lotra_alpha["more"] == 1.0


def test_a_sum_is_trained_and_loaded_as_its_first_adapter():
    settings = {"revision": "v2", "storage": "float16"}
    model, _ = two_adapters("own", **settings)
    model.add_weighted_adapter(["second", "default"], [1.0, 1.0], "sum", "svd", ranks=2)
    config = model.peft_config["sum"]

    assert {name: getattr(config, name) for name in settings} == settings


def test_adapters_of_different_layers_are_summed():
    model = adapt(nested(), r=2, target_modules=["body.0", "layers.0"])
    add_adapter(model, "second", r=3, target_modules=["layers.0", "body.1"])
    errors = model.add_weighted_adapter(["default", "second"], [1.0, 0.5], "sum")
    adapted = lotra_layers(model.base_model.model)

    assert set(errors) == set(adapted) == {"body.0", "body.1", "tail.layers.0"}

    for layer in adapted.values():
        weights = [(name, weight) for name, weight in (("default", 1.0), ("second", 0.5)) if name in layer.lotra_core]
        expected = sum(weight * layer.get_delta_weight(name) for name, weight in weights)
        assert_near(layer.get_delta_weight("sum"), expected)


def test_svd_truncates_and_reports_the_error():
    model, layer = two_adapters("own")
    errors = model.add_weighted_adapter(["default", "second"], [1.0, 1.0], "small", "svd", ranks=(1, 2, 2))
    expected = layer.get_delta_weight("default") + layer.get_delta_weight("second")

    assert layer.lotra_r["small"] == (1, 2, 2)

    error = ((layer.get_delta_weight("small") - expected).norm() / expected.norm()).item()

    assert 0.01 < error < 1
    assert errors["kan"] == pytest.approx(error, abs=1e-5)

    # by default the larger ranks of the two, and ranks that suffice lose nothing
    model.add_weighted_adapter(["default", "second"], [1.0, 1.0], "larger", "svd")

    assert layer.lotra_r["larger"] == (3, 3, 4)
    assert model.add_weighted_adapter(["default", "second"], [1.0, 1.0], "all", "svd", ranks=9)["kan"] < 1e-5


@pytest.mark.parametrize("kind", ["cat", "svd"])
def test_a_sum_may_be_zero(kind):
    model, _ = two_adapters("own")
    assert model.add_weighted_adapter(["default", "default"], [1.0, -1.0], kind, kind)["kan"] < 1e-5


@pytest.mark.parametrize(
    "args, message",
    [
        ((["default", "third"], [1, 1], "sum"), r"\['third'\] not found"),
        (([], [], "sum"), "one or more adapters"),
        ((["default", "second"], [1], "sum"), "finite number for each"),
        ((["default"], [float("nan")], "sum"), "finite number for each"),
        ((["default"], [1], "second"), "'second'.*choose another name"),
        ((["default"], [1], "a.b"), "a.b"),
        ((["default"], [1], "__base__"), "__base__"),
        ((["default"], [1], "sum", "ties"), "one of .*'cat', 'svd'"),
        ((["default"], [1], "sum", "cat", 3), "with `ranks` 'svd'"),
        ((["default"], [1], "sum", "svd", 0), "positive integer"),
        ((["whole"], [1], "sum"), "modules_to_save"),
    ],
)
def test_a_refused_sum_changes_nothing(args, message):
    model, _ = two_adapters("own")
    model.peft_config["whole"] = LoTRAConfig(modules_to_save=["head"])
    configs = dict(model.peft_config)

    with refused(message, model, error=(ValueError, KeyError)):
        model.add_weighted_adapter(*args)
    assert model.peft_config == configs


def test_a_sum_without_the_trained_factors_trains_all_components():
    """Since ranks that add up to the size of a mode leave it full."""
    model = get_peft_model(KAN([3, 6, 5]), LoTRAConfig(r=3, train=["factor_out"], init_weights=False))
    model.add_adapter("second", LoTRAConfig(r=3, train=["factor_out"], init_weights=False))

    errors = model.add_weighted_adapter(["default", "second"], [1.0, 1.0], "both")

    assert max(errors.values()) < 1e-6
    assert model.peft_config["both"].train is None
