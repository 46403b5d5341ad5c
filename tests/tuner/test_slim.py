# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import copy

import pytest
import torch
from helpers import relative
from peft import PeftModel, get_peft_model
from stand_ins import FAMILIES, as_model

from peft_lotra import LoTRAConfig, create_lotra_optimizer, lotra_lr_multipliers, preprocess_lotra, slim
from peft_lotra.kan import KAN, SlimKAN, SlimKANLinear
from peft_lotra.tuner.gradients import gather_gradients
from peft_lotra.tuner.slim import SlimLoTRALayer
from peft_lotra.tuner.targets import locate_target


RANKS = (5, 6, 3)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(params=["own", "efficient-kan", "pykan", "cheby-kan"])
def small(request):
    return slim(as_model(FAMILIES[request.param](12, 10)).eval(), RANKS)


def points():
    return torch.rand(6, 12) * 1.8 - 0.9


def adapted(model, **config):
    return get_peft_model(copy.deepcopy(model), LoTRAConfig(r=(3, 3, 2), init_weights=False, **config)).eval()


def tensor_of(model):
    layer, _, tensor = locate_target("kan", model.kan)
    return tensor.read(layer)


@pytest.mark.parametrize("adapt_residual", [True, False])
def test_the_equivalent_tensor_is_adapted(small, adapt_residual, tmp_path):
    x = points()
    model = adapted(small, adapt_residual=adapt_residual)
    layer = model.base_model.model.kan
    assert isinstance(layer, SlimLoTRALayer)
    y = model(x)
    dense = model.merge_and_unload()
    expected = tensor_of(small)
    delta = layer.get_delta_weight("default")
    expected[..., : delta.shape[-1]] += delta
    torch.testing.assert_close(tensor_of(dense), expected)
    assert relative(dense(x), y) < 1e-5


def test_starts_as_the_base_trains_and_is_saved(small, tmp_path):
    x = points()
    model = get_peft_model(copy.deepcopy(small), LoTRAConfig(r=2))
    assert relative(model(x), small(x)) < 1e-6
    optimizer = create_lotra_optimizer(model, torch.optim.Adam, lr=1e-2)
    before = {n: p.clone() for n, p in model.named_parameters() if "lotra_" not in n}
    for _ in range(3):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters() if n in before)
    assert relative(model(x), small(x)) > 1e-3
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(small), tmp_path)
    assert torch.equal(loaded(x), model.eval()(x))
    with model.disable_adapter():
        assert torch.equal(model(x), small(x))


@pytest.mark.parametrize("way", ["densify", "truncate"])
def test_merging_and_back(small, way):
    x, model = points(), adapted(small)
    model.add_adapter("other", LoTRAConfig(r=2, init_weights=False))
    y = model(x)
    layer = model.base_model.model.kan
    model.merge_adapter(slim=way)
    if way == "densify":
        assert relative(model(x), y) < 1e-5 and layer.merge_error is None
    else:
        assert relative(model(x), y) > 1e-3 and 0 < layer.merge_error < 1
    model.unmerge_adapter()
    assert torch.equal(model(x), y)
    model.merge_adapter(["default", "other"], slim=way)
    model.unmerge_adapter()
    assert torch.equal(model(x), y)
    with pytest.warns(UserWarning, match="Already unmerged"):
        layer.unmerge()


def test_densify_gives_the_original_class(small):
    x, model = points(), adapted(small)
    y = model(x)
    merged = model.merge_and_unload()
    assert type(merged.kan) is type(small.to_dense().kan) and not hasattr(merged, "merge_errors")
    assert relative(merged(x), y) < 1e-5


def test_truncate_keeps_the_ranks_and_reports_the_error(small):
    model = adapted(small)
    exact = tensor_of(copy.deepcopy(model).merge_and_unload())
    merged = model.merge_and_unload(slim="truncate")
    assert merged.kan.ranks == RANKS
    error = ((tensor_of(merged) - exact).norm() / exact.norm()).item()
    assert merged.merge_errors == {"kan": pytest.approx(error, rel=1e-4)}
    assert sum(p.numel() for p in merged.parameters()) == sum(p.numel() for p in small.parameters())
    assert all(p.requires_grad for p in merged.kan.components)


def test_refuses_an_unknown_way_and_broken_adapters(small):
    model = adapted(small)
    with pytest.raises(ValueError, match="`slim` is 'round', but must be one of"):
        model.merge_and_unload(slim="round")
    layer = model.base_model.model.kan
    with torch.no_grad():
        layer.lotra_core["default"].fill_(torch.nan)
    with pytest.raises(ValueError, match="NaNs detected"):
        model.merge_and_unload(safe_merge=True)


def test_dropout_and_base_weight(small):
    x = points()
    model = adapted(small, rank_dropout=0.5, module_dropout=0.5).train()
    outputs = torch.stack([model(x) for _ in range(8)])
    assert outputs.std(0).max() > 0
    layer = model.base_model.model.kan
    layer.set_base_weight(2 * layer.get_base_weight())
    torch.testing.assert_close(layer.get_base_weight(), 2 * tensor_of(small), rtol=1e-3, atol=1e-4)


def test_gradient_of_the_equivalent_tensor(small):
    x, gradients = points(), []
    for model in (small, small.to_dense()):
        layer, _, tensor = locate_target("kan", model.kan)
        gathered = gather_gradients({"kan": (layer, tensor)}, model, lambda m=model: m(x).square().sum().backward())
        gradients.append(gathered[layer])
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)
    assert "forward" not in small.kan.__dict__
    config = LoTRAConfig(r=(3, 3, 2), init_weights="gradient")
    preprocess_lotra(small, config, lambda: small(x).square().sum().backward())
    y = small(x)
    assert relative(get_peft_model(small, config)(x), y) < 1e-6


def test_learning_rates_of_slim_layers():
    net = SlimKAN([64, 32, 10], (8, 8, 3), norm="batch")
    table = lotra_lr_multipliers(net)
    assert len(table) == 8
    by_name = {(line.module, line.component): line.multiplier for line in table}
    assert by_name["layers.0", "factor_in"] == 0.5 and by_name["layers.0", "core"] == 1
    optimizer = create_lotra_optimizer(net, torch.optim.Adam, lr=1e-2)
    groups = {group["name"]: group for group in optimizer.param_groups}
    assert set(groups) == {
        *("core", "factor_basis", "factor_out/32", "factor_in/64", "factor_out/10", "factor_in/32", "other")
    }
    assert groups["factor_in/64"]["lr"] == 5e-3
    assert sum(len(group["params"]) for group in groups.values()) == len(list(net.parameters()))
    # under an adapter the Slim components are frozen, and none of the table
    model = get_peft_model(SlimKAN([64, 32, 10], (8, 8, 3)), LoTRAConfig(r=2))
    assert {line.adapter for line in lotra_lr_multipliers(model)} == {"default"}
    with pytest.raises(ValueError, match="no LoTRA layer, and no Slim one"):
        create_lotra_optimizer(KAN([3, 2]), torch.optim.Adam, lr=1e-2)


def test_one_layer_of_a_slim_kan():
    net = SlimKAN([12, 10, 3], (3, 3, 3))
    model = get_peft_model(net, LoTRAConfig(target_modules=["layers.0"], r=2, init_weights=False))
    merged = model.merge_and_unload()
    assert type(merged) is SlimKAN
    assert [isinstance(layer, SlimKANLinear) for layer in merged.layers] == [False, True]
