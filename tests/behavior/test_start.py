# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""How an adapter starts (`init_weights`), and which of its components are trained (`train`)."""

import copy

import pytest
import torch
from helpers import (
    X,
    adapt,
    assert_equal,
    assert_near,
    base,
    components,
    images,
    inputs,
    layer_of,
    lotra_layers,
    refused,
    train,
)
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from stand_ins import LAYER_KINDS, ConvNet
from torch.testing import assert_close

from peft_lotra import (
    LoTRAConfig,
    create_lotra_optimizer,
    hotswap_adapter,
    start_from_gradient,
)
from peft_lotra.kan import KAN


COMPONENTS = {"core", "factor_out", "factor_in", "factor_basis"}
HOSVD = {"init_weights": "hosvd", "r": (3, 2, 4)}
CORE = {**HOSVD, "train": ["core"]}


def trained(model):
    """The components that require a gradient."""
    return {name.split("lotra_")[1].split(".")[0] for name, part in components(model) if part.requires_grad}


def parts(model, adapter="default"):
    return {n: p.detach().clone() for n, p in components(model) if n.endswith(f".{adapter}")}


@pytest.mark.parametrize("kind", LAYER_KINDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_factors_are_those_of_the_base(kind, dtype):
    model = base(kind, dtype)
    x, adapted = inputs(dtype=dtype), adapt(copy.deepcopy(model), random=False, **CORE)
    if dtype == torch.float64:
        assert_near(adapted(x), model(x), 1e-12)
    layer = layer_of(adapted)
    core, *factors = layer.get_components("default")

    assert not core.any()
    assert trained(adapted) == {"core"}

    coefficients = layer.get_base_weight().double()
    energies = []
    for mode, factor in enumerate(factors):
        unfolded = coefficients.movedim(mode, 0).flatten(1)
        basis = torch.linalg.qr(factor.double()).Q
        best = torch.linalg.svdvals(unfolded)[: factor.shape[1]].square().sum()
        energies.append(((basis.T @ unfolded).square().sum() / best).item())

    assert energies == pytest.approx([1.0] * 3, rel=1e-9 if dtype == torch.float64 else 1e-2)


FORMS = [("full", "full", 1), "full", ("full", 2, 2), (2, "full", "full"), (2, 2, "full")]
TRAINED = ["core", ("factor_in",), ["factor_basis", "factor_out"], None]


@pytest.mark.filterwarnings("ignore:Adapters have more parameters")
@pytest.mark.parametrize("start", [True, "hosvd", "gradient"])
@pytest.mark.parametrize(("r", "names"), [*[(2, names) for names in TRAINED], *[(r, None) for r in FORMS]])
def test_the_update_starts_at_zero_and_the_trained_components_alone_move(r, names, start):
    base_model, x, starts = KAN([3, 4, 2], dtype=torch.float64), inputs(20, torch.float64), []
    for _ in range(2):
        config = LoTRAConfig(r=r, train=names, init_weights=True if start == "gradient" else start)
        adapted = get_peft_model(copy.deepcopy(base_model), config)
        if start == "gradient":
            start_from_gradient(adapted, lambda m=adapted: (m(x) - 1).square().mean())
        assert_equal(adapted(x), base_model(x))
        starts.append(parts(adapted))

    is_random = start is True and r != "full"
    assert all(torch.equal(*pair) for pair in zip(*(s.values() for s in starts), strict=True)) != is_random

    train(adapted, x)
    moved = {n for n, p in parts(adapted).items() if (p != starts[1][n]).any()}
    named = {names} if isinstance(names, str) else set(names or COMPONENTS)

    assert moved == {n for n in starts[1] if n.split("lotra_")[1].split(".")[0] in named}


def test_frozen_components_stay_frozen_through_the_life_of_an_adapter(tmp_path):
    model, x = KAN([3, 4, 2]), inputs(20)
    reference = copy.deepcopy(model)
    adapted = get_peft_model(model, LoTRAConfig(**CORE))
    adapted.add_adapter("other", LoTRAConfig(r=2))

    for name, names in (("default", {"core"}), ("other", COMPONENTS), ("default", {"core"})):
        adapted.set_adapter(name)
        assert trained(adapted) == names
    with adapted.disable_adapter():
        assert trained(adapted) == set()
    for names in (set(), {"core"}):
        adapted.base_model.set_requires_grad("default", bool(names))
        assert trained(adapted) == names
    adapted.merge_adapter()
    adapted.unmerge_adapter()
    adapted.delete_adapter("other")

    assert trained(adapted) == trained(copy.deepcopy(adapted)) == {"core"}

    train(adapted, x)
    expected = adapted(x)
    adapted.save_pretrained(tmp_path)

    assert not trained(PeftModel.from_pretrained(copy.deepcopy(reference), tmp_path))

    for low in (False, True):
        base_model = copy.deepcopy(reference)
        loaded = PeftModel.from_pretrained(base_model, tmp_path, is_trainable=True, low_cpu_mem_usage=low)
        assert_close(loaded(x), expected)
        assert all(torch.equal(parts(adapted)[name], part) for name, part in parts(loaded).items())
        assert trained(loaded) == {"core"}
    loaded.load_adapter(tmp_path, adapter_name="again", is_trainable=True)
    loaded.set_adapter("again")

    assert_close(loaded(x), expected)
    assert trained(loaded) == {"core"}


def test_frozen_components_are_swapped_and_set(tmp_path):
    first, second = (get_peft_model(KAN([3, 4]), LoTRAConfig(**CORE)) for _ in range(2))
    train(second, inputs(20))
    second.save_pretrained(tmp_path)
    for replace in (
        lambda: hotswap_adapter(first, str(tmp_path), check_base="ignore"),
        lambda: set_peft_model_state_dict(first, get_peft_model_state_dict(second)),
    ):
        replace()
        assert trained(first) == {"core"}
        assert all(torch.equal(parts(first)[name], part) for name, part in parts(second).items())
        train(second, inputs(20))


def test_a_start_from_the_coefficients_is_refused_while_another_adapter_is_merged():
    """They are those of the base and of the adapter together."""
    adapted = get_peft_model(KAN([6, 5, 4]), LoTRAConfig(r=3))
    adapted.merge_adapter()

    with refused("call `unmerge_adapter` first"):
        adapted.add_adapter("other", LoTRAConfig(**HOSVD))

    adapted.unmerge_adapter()
    adapted.add_adapter("other", LoTRAConfig(**HOSVD))


@pytest.mark.parametrize("state", ["not finite", "meta device"])
def test_coefficients_that_cannot_be_decomposed_are_refused(state):
    model = KAN([3, 4, 2])
    if state == "not finite":
        model.layers[1].spline_weight.data[0, 0] = torch.nan
    else:
        model.layers[1].to("meta")

    with refused(f'`init_weights="hosvd"`.*{state}'):
        get_peft_model(model, LoTRAConfig(**CORE))
    assert not lotra_layers(model)


def test_a_component_that_only_convolutions_have_is_trained_there():
    model = ConvNet("fastkanconv").eval()
    model.head = KAN([96, 3])
    adapted = get_peft_model(model, LoTRAConfig(r=2, train=["factor_kernel"]))
    names = [name for name, parameter in adapted.named_parameters() if parameter.requires_grad]

    assert names
    assert all("head" not in name and "factor_kernel" in name for name in names)

    x = images()
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.normal_()
        head, features = adapted.base_model.model.head, model.second(model.first(x)).flatten(1)
        changed = head(features)
        with adapted.disable_adapter():
            assert_equal(head(features), changed)
            assert not torch.allclose(model.second(model.first(x)).flatten(1), features)


WARNING = r"optimizer was created before this start.*`create_lotra_optimizer` again, after"


def test_a_start_after_the_optimizer_warns():
    model = get_peft_model(KAN([3, 4]), LoTRAConfig(r=2))
    optimizer = create_lotra_optimizer(model, torch.optim.Adam, lr=1e-2)

    with pytest.warns(UserWarning, match=WARNING):
        start_from_gradient(model, lambda: model(X).square().mean())

    assert optimizer.param_groups[0]["name"] == "core"  # it is alive


@pytest.mark.parametrize("is_loaded", [False, True])
def test_a_start_that_overwrites_a_trained_adapter_warns(is_loaded, tmp_path):
    model = train(get_peft_model(KAN([3, 4]), LoTRAConfig(r=2)), X)
    if is_loaded:
        model.save_pretrained(tmp_path)
        base_model = copy.deepcopy(model).unload()
        model = PeftModel.from_pretrained(base_model, tmp_path, is_trainable=True)

    with pytest.warns(UserWarning, match="overwrites 'default', which was trained"):
        start_from_gradient(model, lambda: model(X).square().mean())


@pytest.mark.filterwarnings("error")
def test_a_start_of_an_adapter_without_an_update_does_not_warn(tmp_path):
    model = get_peft_model(KAN([3, 4]), LoTRAConfig(r=2))

    for _ in range(2):
        start_from_gradient(model, lambda: model(X).square().mean())


def plain(model):
    return torch.optim.Adam([p for p in model.parameters() if p.requires_grad])


def uniform(model):
    return create_lotra_optimizer(model, torch.optim.Adam, lr=1e-2, policy="uniform")


def deleted(model):
    optimizer = create_lotra_optimizer(model, torch.optim.Adam, lr=1e-2)
    torch.optim.lr_scheduler.StepLR(optimizer, 1)


def of_another_model(model):
    return create_lotra_optimizer(get_peft_model(KAN([3, 4]), LoTRAConfig(r=2)), torch.optim.Adam, lr=1e-2)


@pytest.mark.parametrize("create", [plain, uniform, deleted, of_another_model])
@pytest.mark.filterwarnings("error")
def test_a_start_does_not_warn_of_optimizers_whose_rates_stay_right(create):
    model = get_peft_model(KAN([3, 4]), LoTRAConfig(r=2))
    optimizer = create(model)

    start_from_gradient(model, lambda: model(X).square().mean())

    assert optimizer is None or optimizer.param_groups
