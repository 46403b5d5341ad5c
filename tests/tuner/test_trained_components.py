# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""`train` says which components of an adapter are trained; `init_weights="hosvd"` starts at the base's HOSVD."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from conv_stand_ins import ConvNet, images
from helpers import COMPONENTS, adapt, base, components, inputs, lotra_layers, relative
from peft import PeftMixedModel, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from stand_ins import FAMILIES
from torch import nn

from peft_lotra import (
    LoTRAConfig,
    create_lotra_optimizer,
    enable_mixed,
    hotswap_adapter,
    lotra_lr_multipliers,
    model_summary,
    preprocess_lotra,
    save_adapter,
    write_model_card,
)
from peft_lotra.kan import KAN, SlimKAN, jet
from peft_lotra.optim import LevenbergMarquardt


HOSVD = {"init_weights": "hosvd", "r": (3, 2, 4)}
CORE = {**HOSVD, "train": ["core"]}


def trained(model: nn.Module) -> set[str]:
    """The components that require a gradient."""
    return {name.split("lotra_")[1].split(".")[0] for name, part in components(model) if part.requires_grad}


def train(model: nn.Module, x: torch.Tensor, steps: int = 3) -> None:
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        (model(x) - 1).square().mean().backward()
        optimizer.step()


def parts(model: nn.Module, adapter: str = "default") -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in components(model) if n.endswith(f".{adapter}")}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_factors_are_those_of_the_base(family, dtype):
    model = base(family, dtype)
    x, adapted = inputs(dtype=dtype), adapt(copy.deepcopy(model), random=False, **CORE)
    if dtype == torch.float64:
        assert relative(adapted(x), model(x)) < 1e-12
    (layer,) = lotra_layers(adapted).values()
    core, *factors = layer.get_components("default")
    assert not core.any() and trained(adapted) == {"core"}
    coefficients = layer.get_base_weight().double()
    energies = []
    for mode, factor in enumerate(factors):
        unfolded = coefficients.movedim(mode, 0).flatten(1)
        basis = torch.linalg.qr(factor.double()).Q
        best = torch.linalg.svdvals(unfolded)[: factor.shape[1]].square().sum()
        energies.append(((basis.T @ unfolded).square().sum() / best).item())
    assert energies == pytest.approx([1.0] * 3, rel=1e-9 if dtype == torch.float64 else 1e-2)


@pytest.mark.parametrize("init_weights", [True, "hosvd"])
@pytest.mark.parametrize(
    "names", ["core", ("factor_in",), ["factor_basis", "factor_out"], ["core", "factor_in"], None]
)
def test_the_update_starts_at_zero_and_the_trained_components_alone_move(names, init_weights):
    model = KAN([3, 4, 2], dtype=torch.float64)
    x = inputs(20, torch.float64)
    reference = copy.deepcopy(model)
    adapted = get_peft_model(model, LoTRAConfig(r=2, train=names, init_weights=init_weights))
    assert torch.equal(adapted(x), reference(x))
    start = parts(adapted)
    train(adapted, x)
    moved = {
        name.split("lotra_")[1].split(".")[0] for name, part in parts(adapted).items() if (part != start[name]).any()
    }
    named = {names} if isinstance(names, str) else set(names or [name[6:] for name in COMPONENTS])
    assert moved == named == trained(adapted)


def test_the_gradient_start_with_fixed_factors():
    torch.manual_seed(0)
    model, x = KAN([3, 5, 2]), inputs(50)
    config = LoTRAConfig(r=2, init_weights="gradient", train=["core"])
    preprocess_lotra(model, config, lambda: (model(x) - 1).square().mean().backward())
    before = model(x).detach()
    adapted = get_peft_model(model, config)
    assert torch.equal(adapted(x), before) and trained(adapted) == {"core"}
    gradient_factors = parts(adapted)
    assert all(part.any() for name, part in gradient_factors.items() if "core" not in name)
    train(adapted, x)
    assert (adapted(x) - 1).square().mean() < (before - 1).square().mean()


def test_frozen_components_stay_frozen_through_the_life_of_an_adapter(tmp_path):
    model = KAN([3, 4, 2])
    x = inputs(20)
    reference = copy.deepcopy(model)
    adapted = get_peft_model(model, LoTRAConfig(**CORE))
    adapted.add_adapter("other", LoTRAConfig(r=2))
    assert trained(adapted) == {"core"}
    adapted.set_adapter("other")
    assert trained(adapted) == {name.removeprefix("lotra_") for name in COMPONENTS}
    adapted.set_adapter("default")
    assert trained(adapted) == {"core"}
    with adapted.disable_adapter():
        assert trained(adapted) == set()
    assert trained(adapted) == {"core"}
    adapted.base_model.set_requires_grad("default", False)
    assert trained(adapted) == set()
    adapted.base_model.set_requires_grad("default", True)
    assert trained(adapted) == {"core"}
    adapted.merge_adapter()
    adapted.unmerge_adapter()
    assert trained(adapted) == {"core"}
    adapted.delete_adapter("other")
    train(adapted, x)
    expected = adapted(x)
    adapted.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["train"] == ["core"]
    loaded = PeftModel.from_pretrained(copy.deepcopy(reference), tmp_path, is_trainable=True)
    assert torch.equal(loaded(x), expected) and trained(loaded) == {"core"}
    assert not trained(PeftModel.from_pretrained(copy.deepcopy(reference), tmp_path))
    low = PeftModel.from_pretrained(copy.deepcopy(reference), tmp_path, is_trainable=True, low_cpu_mem_usage=True)
    torch.testing.assert_close(low(x), expected)  # the alignment of mapped tensors decides over the last digit
    assert all(torch.equal(parts(adapted)[name], part) for name, part in parts(low).items()) and trained(low) == {
        "core"
    }
    loaded.load_adapter(tmp_path, adapter_name="again", is_trainable=True)
    loaded.set_adapter("again")
    assert torch.equal(loaded(x), expected) and trained(loaded) == {"core"}
    assert torch.equal(loaded.unload()(x), reference(x))
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(merged(x), expected)


def test_copies_and_hotswaps(tmp_path):
    first, second = (get_peft_model(KAN([3, 4]), LoTRAConfig(**CORE)) for _ in range(2))
    second.base_model.model.load_state_dict(first.base_model.model.state_dict())
    train(second, inputs(20))
    second.save_pretrained(tmp_path)
    hotswap_adapter(first, str(tmp_path))
    x = inputs()
    assert relative(first(x), second(x)) < 1e-6 and trained(first) == {"core"}
    assert all(torch.equal(parts(first)[name], part) for name, part in parts(second).items())
    assert trained(copy.deepcopy(second)) == {"core"}


@pytest.mark.parametrize("combination", ["cat", "linear", "svd"])
def test_weighted_sums(combination):
    adapted = get_peft_model(KAN([3, 6, 5]), LoTRAConfig(**CORE))
    adapted.add_adapter("other", LoTRAConfig(**CORE))
    for name in ("default", "other"):
        adapted.set_adapter(name)
        train(adapted, inputs(20))
    errors = adapted.add_weighted_adapter(["default", "other"], [0.25, 0.5], "sum", combination_type=combination)
    assert max(errors.values()) < 1e-5  # exact with equal factors, which need no more ranks
    adapted.set_adapter("sum")
    assert trained(adapted) == {"core"}
    adapted.add_adapter("free", LoTRAConfig(r=(3, 2, 4)))
    adapted.add_weighted_adapter(["default", "free"], [1.0, 1.0], "both")
    adapted.set_adapter("both")
    assert len(trained(adapted)) == 4


def test_a_mixed_model():
    enable_mixed()
    model = get_peft_model(KAN([3, 4, 2]), LoTRAConfig(**CORE), mixed=True)
    assert isinstance(model, PeftMixedModel) and trained(model) == {"core"}
    model.set_adapter("default")
    assert trained(model) == {"core"}


def test_the_optimizer_the_summary_and_the_card_tell_the_truth(tmp_path):
    adapted = get_peft_model(KAN([3, 4, 2]), LoTRAConfig(**CORE))
    assert {line.component for line in lotra_lr_multipliers(adapted)} == {"core"}
    optimizer = create_lotra_optimizer(adapted, torch.optim.SGD, lr=0.1)
    cores = sum(part.numel() for name, part in components(adapted) if "core" in name)
    assert [group["name"] for group in optimizer.param_groups] == ["core"]
    assert adapted.get_nb_trainable_parameters()[0] == cores
    summary = model_summary(adapted)
    assert sum(line.trainable for line in summary) == summary.trainable_parameters == cores
    save_adapter(adapted, tmp_path)
    write_model_card(adapted, tmp_path)
    assert "core is trained" in (tmp_path / "README.md").read_text()


def test_levenberg_marquardt_trains_the_core_by_layers():
    torch.manual_seed(0)
    model = get_peft_model(KAN([1, 5, 1], dtype=torch.float64), LoTRAConfig(**{**CORE, "r": (5, 3, 4)}))
    points = torch.linspace(-1, 1, 80, dtype=torch.float64).unsqueeze(1)

    def equation(network, x):
        return jet(network, x)[2][0] + torch.cos(2 * x)

    optimizer = LevenbergMarquardt(model)
    history = optimizer.fit([(equation, points), (lambda m, x: m(x), points[:1])], 4, progress=False)
    assert history[-1].loss < 0.3 * history[0].loss / (1 - history[0].decrease)
    assert all(plan.bytes_by_layers for plan in optimizer._plans.values())


def test_slim_layers_and_merged_bases():
    for model in (SlimKAN([6, 5, 4], ranks=3, dtype=torch.float64), KAN([6, 5, 4], dtype=torch.float64)):
        adapted = get_peft_model(model, LoTRAConfig(**{**CORE, "r": 3}))
        expected = parts(adapted)
        train(adapted, inputs(20, torch.float64, 6))
        for keywords in ({}, {"slim": "truncate"}):
            adapted.merge_adapter(**keywords)
            adapted.add_adapter("other", LoTRAConfig(**{**CORE, "r": 3}))  # of the base, not of the merged weights
            adapted.unmerge_adapter()
            for name, part in parts(adapted, "other").items():
                like = expected[name.replace("other", "default")]
                torch.testing.assert_close(
                    part @ part.T if part.dim() == 2 else part, like @ like.T if like.dim() == 2 else like
                )
            adapted.delete_adapter("other")


def test_a_merge_without_the_base_is_refused():
    adapted = get_peft_model(KAN([3, 4]), LoTRAConfig(r=2, init_weights=False))
    adapted.merge_adapter(keep_base=False)
    with pytest.raises(ValueError, match="keep_base=False.*unmerge_adapter"):
        adapted.add_adapter("other", LoTRAConfig(**CORE))
    assert list(adapted.peft_config) == ["default"]


def test_coefficients_that_cannot_be_decomposed():
    for model, words in ((KAN([3, 4]), "not finite"), (KAN([3, 4]).to("meta"), "meta device")):
        with torch.no_grad():
            model.layers[0].spline_weight[0, 0] = torch.nan
        with pytest.raises(ValueError, match=f'`init_weights="hosvd"`.*{words}'):
            get_peft_model(model, LoTRAConfig(**CORE))


def test_a_layer_without_the_trained_component_keeps_a_zero_update():
    """Of a convolution and a dense layer, `factor_kernel` is of the convolution alone."""
    model = ConvNet("fastkanconv").eval()
    model.head = KAN([96, 3])
    adapted = get_peft_model(model, LoTRAConfig(r=2, train=["factor_kernel"]))
    names = [name for name, parameter in adapted.named_parameters() if parameter.requires_grad]
    assert names and all("head" not in name and "factor_kernel" in name for name in names)
    x = images()
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.normal_()
        own, features = adapted.base_model.model.head, model.second(model.first(x)).flatten(1)
        changed = own(features)
        with adapted.disable_adapter():
            assert torch.equal(own(features), changed)
            assert not torch.allclose(model.second(model.first(x)).flatten(1), features)


def test_loading_tensors_into_an_adapter_with_fixed_factors():
    first, second = (get_peft_model(KAN([3, 4]), LoTRAConfig(**CORE)) for _ in range(2))
    set_peft_model_state_dict(first, get_peft_model_state_dict(second))
    assert trained(first) == {"core"}
    assert all(torch.equal(parts(first)[name], part) for name, part in parts(second).items())
