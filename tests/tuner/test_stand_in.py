# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""An adapted layer answers for its base layer: attributes, methods, grids, copies."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from helpers import adapt, base, components, inputs, lotra_layers, relative
from stand_ins import FAMILIES
from torch import nn

from peft_lotra import LoTRAConfig
from peft_lotra.families.registry import get_kan_spec
from peft_lotra.kan import KAN


every_family = pytest.mark.parametrize("family", FAMILIES)


def layer_of(model):
    (layer,) = lotra_layers(model).values()
    return layer


def attribute(layer, name):
    for part in name.split("."):
        layer = getattr(layer, part)
    return layer


###########
# Reading #
###########


@every_family
def test_the_adapted_parameters_are_those_in_force(family):
    model = base(family, torch.float64)
    spec = get_kan_spec(model.kan)
    stored = {name: attribute(model.kan, name).clone() for name in spec.locate(model.kan).parameters}
    adapted = adapt(model)
    layer = layer_of(adapted)
    parts = layer.lotra_tensor.split(layer.get_delta_weight("default"))
    in_force = layer.parameters_in_force()
    assert set(in_force) == set(stored)
    for name, value in stored.items():
        torch.testing.assert_close(in_force[name], value + parts[name])
        if "." not in name:
            assert torch.equal(getattr(layer, name), in_force[name])
    with adapted.disable_adapter():
        assert layer.parameters_in_force() == {}
        assert all(torch.equal(attribute(layer, name), value) for name, value in stored.items())
    adapted.merge_adapter()
    for name in stored:
        torch.testing.assert_close(attribute(layer, name), in_force[name])


@pytest.mark.parametrize("family", ["own", "efficient-kan", "pykan", "flashkan", "kanx", "cheby-kan"])
def test_gradients_reach_the_adapter_through_the_parameter(family):
    adapted = adapt(base(family))
    layer = layer_of(adapted)
    name, _ = layer.lotra_spec.coefficients
    getattr(layer, name).square().sum().backward()
    assert all(parameter.grad.any() for _, parameter in components(adapted))


@pytest.mark.parametrize("family", ["efficient-kan", "efficient-kan-no-scaler", "efficient-kan-old"])
def test_the_regularization_of_efficient_kan_sees_the_update(family):
    adapted = adapt(base(family, torch.float64))
    layer = layer_of(adapted)
    with adapted.disable_adapter():
        before = layer.regularization_loss()
    loss = layer.regularization_loss(1.0, regularize_entropy=0.5)
    loss.backward()
    assert all(parameter.grad.any() for name, parameter in components(adapted))
    merged = adapted.merge_and_unload().kan
    torch.testing.assert_close(loss, merged.regularization_loss(1.0, regularize_entropy=0.5))
    assert not torch.isclose(loss, before)


def test_properties_see_the_update():
    adapted = adapt(base("inkan", torch.float64))
    layer = layer_of(adapted)
    spline, residual = layer.spline_weight, layer.base_weight
    spline.sum().backward()
    assert layer.lotra_core["default"].grad.any()
    merged = adapted.merge_and_unload().kan
    torch.testing.assert_close(spline, merged.spline_weight)
    torch.testing.assert_close(residual, merged.base_weight)

    adapted = adapt(base("efficient-kan", torch.float64))
    scaled = layer_of(adapted).scaled_spline_weight
    torch.testing.assert_close(scaled, adapted.merge_and_unload().kan.scaled_spline_weight)


def test_methods_see_the_update():
    adapted = adapt(base("fast-kan", torch.float64))
    layer = layer_of(adapted)
    with adapted.disable_adapter():
        _, before = layer.plot_curve(1, 2, num_pts=50)
    x, curve = layer.plot_curve(1, 2, num_pts=50)
    merged_x, merged = adapted.merge_and_unload().kan.plot_curve(1, 2, num_pts=50)
    torch.testing.assert_close(curve, merged)
    assert torch.equal(x, merged_x) and relative(curve, before) > 0.1


@every_family
def test_everything_else_is_the_base_layers(family):
    model = base(family)
    kan = model.kan
    plain = [name for name in vars(kan) if not name.startswith("_") and name != "training"]
    layer = layer_of(adapt(model))
    for name in plain:
        assert getattr(layer, name) is getattr(kan, name) or getattr(layer, name) == getattr(kan, name), name
    adapted = {name.partition(".")[0] for name in layer.lotra_tensor.parameters}
    for name in {*kan._buffers, *kan._modules, *kan._parameters} - adapted:
        assert getattr(layer, name) is getattr(kan, name), name


def test_what_neither_has_is_an_attribute_error():
    layer = layer_of(adapt(base("own")))
    with pytest.raises(AttributeError, match="no_such_thing"):
        layer.no_such_thing  # noqa: B018
    assert not hasattr(layer, "weight") and not hasattr(layer, "update_grid_from_samples")
    assert not hasattr(layer_of(adapt(base("cheby-kan"))), "update_grid")


###########
# Setting #
###########


def test_what_is_set_reaches_the_base_layer():
    adapted = adapt(base("pykan"))
    layer = layer_of(adapted)
    layer.out_dim = 17
    layer.mask.data[:] = 0.5
    assert layer.base_layer.out_dim == 17 and "out_dim" not in vars(layer)
    assert (layer.base_layer.mask == 0.5).all()
    layer.mask = nn.Parameter(torch.zeros_like(layer.mask), requires_grad=False)
    assert not layer.base_layer.mask.any()
    # with all edges off, a forward pass gives zero
    assert not adapted(inputs()).any()


def test_what_the_base_layer_does_not_have_stays_with_the_adapted_layer():
    layer = layer_of(adapt(base("own")))
    layer.note = "mine"
    layer._hf_hook = "a framework's"
    assert vars(layer)["note"] == "mine" and not hasattr(layer.base_layer, "note")
    assert not hasattr(layer.base_layer, "_hf_hook")


@pytest.mark.parametrize("training", [True, False])
def test_the_training_mode_reaches_the_base_layer(training):
    adapted = adapt(base("fast-kan")).train(training)
    assert layer_of(adapted).training is layer_of(adapted).base_layer.training is training


#########
# Grids #
#########


GRID_CALLS = {
    "own": ("update_grid", lambda layer, x: layer.update_grid(x)),
    "efficient-kan": ("update_grid", lambda layer, x: layer.update_grid(x)),
    "efficient-kan-no-scaler": ("update_grid", lambda layer, x: layer.update_grid(x)),
    "efficient-kan-old": ("update_grid", lambda layer, x: layer.update_grid(x, margin=0.02)),
    "pykan": ("update_grid_from_samples", lambda layer, x: layer.update_grid_from_samples(x)),
    "kanx": ("update_grid_from_samples", lambda layer, x: layer.update_grid_from_samples(x)),
}


@pytest.mark.parametrize("family", GRID_CALLS)
@pytest.mark.parametrize("state", ["active", "disabled", "another one active"])
def test_a_grid_does_not_move_under_an_adapter(family, state):
    adapted = adapt(base(family))
    layer = layer_of(adapted)
    name, call = GRID_CALLS[family]
    before = {key: tensor.clone() for key, tensor in adapted.state_dict().items()}
    if state == "disabled":
        adapted.base_model.disable_adapter_layers()
    elif state == "another one active":
        adapted.add_adapter("other", LoTRAConfig())
        adapted.set_adapter("other")
    with pytest.raises(RuntimeError, match=f"`{name}`.*'default'.*Merge them first"):
        call(layer, inputs(40))
    assert all(torch.equal(adapted.state_dict()[key], tensor) for key, tensor in before.items())


@pytest.mark.parametrize("family", GRID_CALLS)
def test_a_grid_moves_after_a_merge_and_the_merge_is_final_then(family):
    torch.manual_seed(2)
    adapted = adapt(base(family))
    layer = layer_of(adapted)
    grid = layer.lotra_spec.grid[0]
    adapted.merge_adapter()
    before = getattr(layer, grid).clone()
    GRID_CALLS[family][1](layer, 0.5 * inputs(40))
    assert not torch.equal(getattr(layer, grid), before)
    after = {key: tensor.clone() for key, tensor in layer.base_layer.state_dict().items()}
    with pytest.raises(RuntimeError, match="grid of this .* layer was moved after"):
        adapted.unmerge_adapter()
    assert layer.merged
    assert all(torch.equal(layer.base_layer.state_dict()[key], tensor) for key, tensor in after.items())
    x = inputs()
    y = adapted(x)
    assert torch.equal(adapted.merge_and_unload()(x), y)


@pytest.mark.parametrize("family", GRID_CALLS)
def test_a_grid_moves_after_unloading(family):
    model = adapt(base(family)).unload()
    grid = get_kan_spec(model.kan).grid[0]
    before = getattr(model.kan, grid).clone()
    GRID_CALLS[family][1](model.kan, 0.5 * inputs(40))
    assert not torch.equal(getattr(model.kan, grid), before)


def test_a_grid_is_not_set_under_an_adapter():
    adapted = adapt(base("kanx"))
    layer = layer_of(adapted)
    grid = layer.grid.clone()
    with pytest.raises(RuntimeError, match="`grid`.*Merge them first"):
        layer.grid = 2 * grid
    assert torch.equal(layer.grid, grid)
    adapted.merge_adapter()
    layer.grid = 2 * grid
    assert torch.equal(layer.base_layer.grid, 2 * grid)


def test_the_network_around_adapted_layers_does_not_move_their_grids():
    model = KAN([3, 4, 2])
    adapted = adapt(model)
    before = {name: tensor.clone() for name, tensor in adapted.state_dict().items()}
    with pytest.raises(RuntimeError, match="Merge them first"):
        model.update_grid(inputs(50))
    assert all(torch.equal(adapted.state_dict()[name], tensor) for name, tensor in before.items())


##########
# Copies #
##########


@every_family
@pytest.mark.parametrize(
    "copy_of", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"]
)
def test_copies(family, copy_of):
    adapted = adapt(base(family))
    x = inputs()
    y = adapted(x)
    other = copy_of(adapted)
    assert torch.equal(other(x), y)
    with torch.no_grad():
        layer_of(other).lotra_core["default"].mul_(2)
        other.base_model.model.kan.get_base_layer().get_parameter(layer_of(other).lotra_spec.coefficients[0]).mul_(3)
    assert torch.equal(adapted(x), y) and not torch.equal(other(x), y)
    z = other(x)
    assert relative(other.merge_and_unload()(x), z) < 1e-6


def test_a_network_is_copied_with_its_adapters():
    adapted = adapt(KAN([3, 4, 2]))
    adapted.add_adapter("other", LoTRAConfig(init_weights=False))
    other = pickle.loads(pickle.dumps(copy.deepcopy(adapted)))
    x = inputs()
    for name in ("default", "other"):
        adapted.set_adapter(name)
        other.set_adapter(name)
        assert torch.equal(adapted(x), other(x))
    with pytest.raises(RuntimeError, match="Merge them first"):
        other.base_model.model.update_grid(inputs(50))
    other.merge_and_unload().update_grid(inputs(50))
