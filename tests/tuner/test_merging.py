# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Numbers: merging and training leave the base as it was, bit for bit."""

from __future__ import annotations

import contextlib
import threading
import weakref

import pytest
import torch
from helpers import adapt, base, components, inputs, lotra_layers, nested
from stand_ins import FAMILIES
from torch import nn

from peft_lotra import LoTRAConfig
from peft_lotra.families.registry import get_kan_spec
from peft_lotra.kan import KAN
from peft_lotra.tucker import Tucker, Update
from peft_lotra.tuner.merging import add_updates, all_or_nothing, are_stored


every_family = pytest.mark.parametrize("family", FAMILIES)
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def base_state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items() if "lotra_" not in name}


def assert_base(model, state):
    for name, tensor in state.items():
        assert torch.equal(model.state_dict()[name], tensor), name


################
# For one call #
################


def layer_and_updates(family, residual=True):
    torch.manual_seed(0)
    layer = FAMILIES[family](3, 4)
    tensor = get_kan_spec(layer).locate(layer)
    size = tensor.shape[2] + (residual and tensor.has_residual)
    make = lambda: Tucker(torch.randn(2, 2, 2), torch.randn(4, 2), torch.randn(3, 2), torch.randn(size, 2))  # noqa: E731
    return layer, tensor, [Update(0.5, make()), Update(-2.0, make())]


@every_family
def test_updates_are_added_to_the_parameters(family):
    layer, tensor, updates = layer_and_updates(family)
    before = tensor.read(layer).detach().clone()
    parameters = add_updates(tensor, layer, updates)
    expected = before + sum(update.dense() for update in updates)
    torch.testing.assert_close(tensor.join([parameters[name] for name in tensor.parameters]), expected)
    assert torch.equal(tensor.read(layer), before)  # the layer is left as it was


@pytest.mark.parametrize("family", ["own", "pykan", "fast-kan"])
def test_parameters_that_no_update_reaches_are_left_out(family):
    layer, tensor, updates = layer_and_updates(family, residual=False)
    assert list(add_updates(tensor, layer, updates)) == [tensor.name]
    assert add_updates(tensor, layer, []) == {}


def test_an_update_keeps_its_digits_under_autocast():
    layer, tensor, updates = layer_and_updates("own")
    expected = add_updates(tensor, layer, updates)
    with torch.autocast("cpu", torch.bfloat16):
        parameters = add_updates(tensor, layer, updates)
    assert all(torch.equal(parameters[name], value) for name, value in expected.items())


def test_a_parametrized_base_layer_is_refused():
    layer, tensor, updates = layer_and_updates("own")
    assert are_stored(layer, tensor.parameters)
    nn.utils.parametrize.register_parametrization(layer, "spline_weight", nn.Identity())
    assert not are_stored(layer, tensor.parameters) and are_stored(layer, ["base_weight"])
    with pytest.raises(RuntimeError, match="`spline_weight` of the base layer is sharded or parametrized"):
        add_updates(tensor, layer, updates)


##################
# All or nothing #
##################


def test_what_is_finished_within_what_is_not_is_undone_with_it():
    undone = []
    with contextlib.suppress(KeyboardInterrupt), all_or_nothing() as outer:
        outer.append(lambda: undone.append("outer"))
        with all_or_nothing() as inner:
            inner.append(lambda: undone.append("inner"))
        assert undone == []
        raise KeyboardInterrupt
    assert undone == ["inner", "outer"]
    with all_or_nothing() as steps:  # by itself again
        steps.append(lambda: undone.append("finished"))
    assert len(undone) == 2


def test_threads_undo_their_own_merges():
    models = [adapt(KAN([3, 4, 2])) for _ in range(2)]
    states = [base_state(model) for model in models]
    with contextlib.suppress(KeyboardInterrupt), all_or_nothing():
        models[0].merge_adapter()
        thread = threading.Thread(target=models[1].merge_adapter)
        thread.start()
        thread.join()
        raise KeyboardInterrupt
    assert [layer.merged for model in models for layer in lotra_layers(model).values()] == [False] * 2 + [True] * 2
    assert_base(models[0], states[0])
    models[1].unmerge_adapter()
    assert_base(models[1], states[1])


def test_no_copy_outlives_a_merge():
    """What undoes a merge refers to the copy that the layer keeps, and is forgotten with the merge."""
    model = adapt(KAN([3, 4, 2]))
    layer = next(iter(lotra_layers(model).values()))
    model.merge_adapter()
    copies = [weakref.ref(value) for value in layer.parameters_before_merge.values()]
    model.unmerge_adapter()
    assert copies and not any(reference() is not None for reference in copies)


###############
# And unmerge #
###############


@every_family
@pytest.mark.parametrize("dtype", DTYPES)
def test_unmerging_restores_the_base_bit_for_bit(family, dtype):
    model = adapt(base(family, dtype))
    model.add_adapter("second", LoTRAConfig(r=2, init_weights=False))
    state = base_state(model)
    for names in (["default"], ["default", "second"], None):
        model.merge_adapter(names)
        assert any(not torch.equal(model.state_dict()[name], tensor) for name, tensor in state.items())
        model.unmerge_adapter()
        assert_base(model, state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_thousand_cycles(dtype):
    model = adapt(KAN([3, 4, 2]).to(dtype))
    state, x = base_state(model), inputs(dtype=dtype)
    y = model(x)
    for _ in range(1000):
        model.merge_adapter()
        model.unmerge_adapter()
    assert_base(model, state)
    assert torch.equal(model(x), y)


def drift(dtype, cycles=1000):
    """The largest change of a coefficient by cycles that do not keep the base, as a share of the largest one."""
    model = adapt(KAN([3, 4, 2]).to(dtype))
    state = base_state(model)
    for _ in range(cycles):
        model.merge_adapter(keep_base=False)
        model.unmerge_adapter()
    change = max((model.state_dict()[name] - tensor).abs().max().item() for name, tensor in state.items())
    return change / max(tensor.abs().max().item() for tensor in state.values())


def test_what_it_costs_not_to_keep_the_base():
    """The figures that SECURITY.md states."""
    assert 0 < drift(torch.float32) < 2e-6
    assert 0 < drift(torch.bfloat16) < 0.1


def test_what_is_kept_and_for_how_long():
    model = adapt(KAN([3, 4, 2]))
    layer = next(iter(lotra_layers(model).values()))
    assert layer.parameters_before_merge == {}
    model.merge_adapter()
    kept = layer.parameters_before_merge
    assert {name: tensor.shape for name, tensor in kept.items()} == {"spline_weight": (4, 3, 8), "base_weight": (4, 3)}
    assert not any("before_merge" in name for name in model.state_dict())
    model.unmerge_adapter()
    assert layer.parameters_before_merge == {}
    model.merge_adapter(keep_base=False)
    assert layer.parameters_before_merge == {}
    model.unmerge_adapter()
    model.merge_adapter()  # the next one keeps again
    assert layer.parameters_before_merge
    merged = model.merge_and_unload()
    assert not any(hasattr(module, "parameters_before_merge") for module in merged.modules())


def test_merging_to_unload_keeps_nothing(monkeypatch):
    kept = []
    model = adapt(nested())
    layers = list(lotra_layers(model).values())
    model.merge_and_unload()
    kept = [layer.parameters_before_merge for layer in layers]
    assert kept == [{}] * 4


@pytest.mark.parametrize("keep_base", [True, False])
def test_the_scale_is_changed_while_merged(keep_base):
    """What was merged is unmerged, not what the adapter would be now."""
    model = adapt(base("own", torch.float64))
    state = base_state(model)
    (layer,) = lotra_layers(model).values()
    model.merge_adapter(keep_base=keep_base)
    layer.set_scale("default", 7.0)
    with torch.no_grad():
        layer.lotra_core["default"].mul_(3)
    model.unmerge_adapter()
    for name, tensor in state.items():
        torch.testing.assert_close(model.state_dict()[name], tensor, rtol=0, atol=0 if keep_base else 1e-12)


def test_coefficients_that_are_changed_while_merged_keep_the_change():
    model = adapt(base("own", torch.float64))
    state = base_state(model)
    (layer,) = lotra_layers(model).values()
    model.merge_adapter()
    with torch.no_grad():
        layer.base_layer.spline_weight += 1
    with pytest.warns(UserWarning, match="changed after"):
        model.unmerge_adapter()
    (name,) = (name for name in state if name.endswith("spline_weight"))
    torch.testing.assert_close(model.state_dict()[name], state[name] + 1)


def test_disabling_while_merged():
    model = adapt(KAN([3, 4, 2]))
    state, x = base_state(model), inputs()
    model.merge_adapter()
    with model.disable_adapter():
        model(x)
    assert_base(model, state)


############
# Training #
############


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_training_under_autocast(dtype):
    model = adapt(KAN([3, 16, 2]), random=False).train()
    state = base_state(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    x, y = inputs(32), torch.randn(32, 2)
    losses = []
    for _ in range(40):
        with torch.autocast("cpu", dtype):
            loss = (model(x).float() - y).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] and all(parameter.dtype == torch.float32 for _, parameter in components(model))
    assert_base(model, state)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("family", ["own", "efficient-kan", "pykan", "inkan"])
def test_gradients_that_are_not_finite_reach_the_adapter_alone(family, value):
    model = adapt(base(family), random=False)
    state, x = base_state(model), inputs()
    with model.disable_adapter():
        y = model(x)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    (model.train()(x) * value).sum().backward()
    optimizer.step()
    assert not all(parameter.isfinite().all() for _, parameter in components(model))
    assert_base(model, state)
    with model.eval().disable_adapter():
        assert torch.equal(model(x), y)
    with pytest.raises(ValueError, match="NaNs detected"):
        model.merge_adapter(safe_merge=True)
    model.merge_adapter()
    model.unmerge_adapter()
    assert_base(model, state)
    model.delete_adapter("default")
    model.add_adapter("default", LoTRAConfig())
    model.set_adapter("default")
    torch.testing.assert_close(model(x), y)


def test_a_scaler_skips_such_a_step():
    model = adapt(KAN([3, 4, 2]), random=False).train()
    started = {name: parameter.clone() for name, parameter in components(model)}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**60)
    scaler.scale((model(inputs()) * 1e38).sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert all(torch.equal(parameter, started[name]) for name, parameter in components(model))


@every_family
def test_a_batch_of_no_rows(family):
    bare = base(family)
    try:
        bare(torch.empty(0, 3))
        works = True
    except RuntimeError:  # as some libraries' own layers do
        works = False
    model = adapt(bare).train()
    state = base_state(model)
    if works or all(
        layer.lotra_formula for layer in lotra_layers(model).values()
    ):  # the fast path needs no layer that works
        y = model(torch.empty(0, 3))
        assert y.shape == (0, 4)
        y.sum().backward()
        assert all(not parameter.grad.any() for _, parameter in components(model) if parameter.grad is not None)
    else:
        with pytest.raises(RuntimeError):
            model(torch.empty(0, 3))
    assert_base(model, state)
    assert model.eval()(inputs()).isfinite().all()


@pytest.mark.parametrize("lr", [1e10, 1e30])
def test_extreme_learning_rates(lr, tmp_path):
    model = adapt(KAN([3, 4, 2]), random=False).train()
    state = base_state(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr)
    for _ in range(5):
        optimizer.zero_grad()
        model(inputs()).square().mean().backward()
        optimizer.step()
    assert_base(model, state)
    assert not model(inputs()).isfinite().all()
    with pytest.raises(ValueError, match="not finite"):  # such an adapter is not saved for others to find out
        model.save_pretrained(tmp_path)
    assert isinstance(model.unload(), nn.Module)
    assert_base(model.get_base_model(), {})
