# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""LoTRA on Slim layers, whose coefficients are Tucker tensors already."""

import copy

import pytest
import torch
from helpers import adapt, add_adapter, assert_equal, assert_near, refused, relative
from peft import get_peft_model
from stand_ins import LAYER_KINDS, as_model
from torch.testing import assert_close

from peft_lotra import LoTRAConfig, slim, start_from_gradient
from peft_lotra.kan import SlimKAN


X = torch.linspace(-0.9, 0.9, 72).view(12, 6).T.contiguous()


@pytest.fixture(params=["own", "efficient-kan", "pykan", "cheby-kan"])
def small(request):
    return slim(as_model(LAYER_KINDS[request.param](12, 10)).eval(), (5, 6, 3))


def tuned(base, **config):
    return adapt(copy.deepcopy(base), r=(3, 3, 2), **config)


def test_merges_end_at_the_sizes(small):
    """Ranks of merged adapters add up, to the sizes of the modes at most."""
    merged, x = copy.deepcopy(small), X
    for _ in range(4):
        model = tuned(merged)
        y, merged = model(x), model.merge_and_unload()
        assert_near(merged(x), y)
    sizes = merged.kan.components.shape

    assert type(merged.kan) is type(small.kan)
    assert merged.kan.ranks == tuple(map(min, (5 + 4 * 3, 6 + 4 * 3, 3 + 4 * 2), sizes))
    assert merged.kan.ranks[0] == sizes[0]


@pytest.mark.parametrize("mode", [torch.inference_mode(), torch.autocast("cpu", torch.bfloat16)])
def test_a_merge_in_a_mode_is_exact_and_can_be_trained(mode):
    model = adapt(SlimKAN([12, 10], ranks=(5, 6, 3)), r=10)  # together more than the sizes
    y = model(X)
    with mode:
        merged = model.merge_and_unload()
    merged.requires_grad_()(X).sum().backward()

    assert_near(merged(X), y)
    assert all(part.grad is not None for part in merged.parameters())


def test_vmap_runs_over_the_cores_of_adapters(small):
    model = tuned(small)
    cores = {name: part.detach() for name, part in model.named_parameters() if ".lotra_core." in name}
    several = {name: torch.stack([core, 2 * core]) for name, core in cores.items()}
    y = torch.func.vmap(lambda cores: torch.func.functional_call(model, cores, (X,)))(several)

    assert relative(y[0], model(X)) < 1e-5 < relative(y[1], y[0])


def test_a_merge_is_undone_exactly(small):
    model = tuned(small)
    add_adapter(model, "other", adapt_residual=False)
    y = model(X)
    model.merge_adapter()

    assert_near(model(X), y)

    with model.disable_adapter():
        assert_equal(model(X), small(X))

    assert_equal(model(X), y)

    model.merge_adapter(["default", "other"])
    both = model(X)
    model.unmerge_adapter()
    for name in ("default", "other"):  # one after the other
        model.merge_adapter([name])

    assert_near(model(X), both)

    model.unmerge_adapter()

    assert_equal(model(X), y)


def test_a_merged_model_is_copied_and_cast(small):
    model = tuned(small).double()
    y = model(X.double())
    model.merge_adapter()
    model = copy.deepcopy(model).float().double()
    model.unmerge_adapter()

    assert_near(model(X.double()), y)
    assert {p.dtype for p in model.parameters()} == {torch.float64}


def test_a_safe_merge_refuses_nan(small):
    model = tuned(small)
    layer = model.base_model.model.kan
    for value in (torch.nan, 1e30):  # finite components, whose product overflows
        with torch.no_grad():
            layer.lotra_core["default"].fill_(value)
            layer.lotra_factor_out["default"].fill_(1e30)

        with refused("NaNs detected"):
            model.merge_and_unload(safe_merge=True)


@pytest.mark.parametrize("start", ["gradient", "hosvd"])
def test_starts_are_those_of_the_dense_layer(small, start):
    """They are those of the dense layer of the same coefficients."""
    spans = []
    for model in (small, small.to_dense()):
        config = LoTRAConfig(r=(10, 3, 99), init_weights=True if start == "gradient" else start)
        y = model(X)
        adapted = get_peft_model(model, config)
        if start == "gradient":
            start_from_gradient(adapted, lambda adapted=adapted: adapted(X).square().sum())
        assert_near(adapted(X), y)
        factor = adapted.base_model.model.kan.lotra_factor_in["default"].detach()
        spans.append(factor @ torch.linalg.pinv(factor))

    assert_close(*spans, rtol=0, atol=1e-3)


def test_unloading_leaves_each_flag(small):
    for name, parameter in small.named_parameters():
        parameter.requires_grad_("core" in name)
    flags = {name: parameter.requires_grad for name, parameter in small.named_parameters()}
    model = tuned(small)
    model.merge_adapter()

    assert not any(p.requires_grad for n, p in model.named_parameters() if "lotra_" not in n)

    merged = copy.deepcopy(model).merge_and_unload()

    for unloaded in (merged, model.unload()):
        kept = {name: parameter.requires_grad for name, parameter in unloaded.named_parameters()}
        assert kept.items() <= flags.items()  # a merge may make a mode full
