# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""What does nothing, or something wrong, without a word: it is refused, or it is right."""

from __future__ import annotations

import copy
import io
import warnings

import pytest
import torch
from hostile import (
    WEIGHTS,
    Net,
    X,
    adapted,
    assert_load_refused,
    assert_refused,
    differences,
    edit_config,
    edit_tensors,
    outcome,
    save,
    state_of,
)
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from torch.nn.utils import prune

from peft_lotra import (
    LoTRAConfig,
    check_kan_layer,
    find_kan_layers,
    hotswap_adapter,
    model_summary,
    slim,
    update_spectrum,
)
from peft_lotra.kan import KAN


##########################
# Layers                 #
##########################


def pruned(layer):
    prune.l1_unstructured(layer, "spline_weight", amount=0.3)


def old_weight_norm(layer):
    nn.utils.weight_norm(layer, "spline_weight")


def new_weight_norm(layer):
    nn.utils.parametrizations.weight_norm(layer, "spline_weight")


@pytest.mark.parametrize("change", [pruned, old_weight_norm, new_weight_norm])
@pytest.mark.parametrize("residual", [True, False])
def test_computed_parameters_of_the_base(change, residual):
    base = Net()
    change(base.kan.layers[0])
    expected = base(X)
    before = state_of(base)
    try:
        model = adapted(base, target_modules=["kan.layers.0"], adapt_residual=residual)
    except ValueError as error:
        assert "spline_weight" in str(error) and not differences(before, state_of(base))
        return
    y = model(X)
    assert not torch.allclose(y, expected), "the adapter has no effect"
    with model.disable_adapter():
        torch.testing.assert_close(model(X), expected)
    model.merge_adapter()
    torch.testing.assert_close(model(X), y)
    model.unmerge_adapter()
    torch.testing.assert_close(model(X), y)


class Counted(nn.Module):
    """A parametrization that counts how often it was read in training."""

    def __init__(self):
        super().__init__()
        self.register_buffer("reads", torch.zeros(()))

    def forward(self, weight):
        if self.training:
            self.reads += 1
        return weight * 1.5


def spectral_norm(layer, name):
    nn.utils.parametrizations.spectral_norm(layer, name)


def counted(layer, name):
    nn.utils.parametrize.register_parametrization(layer, name, Counted())


LOOKS = {
    "attach": lambda model: get_peft_model(model, LoTRAConfig(r=2)),
    "find": find_kan_layers,
    "candidates": lambda model: find_kan_layers(model, candidates=True),
    "check": lambda model: check_kan_layer(model.kan.layers[0]),
    "spectrum": lambda model: update_spectrum(model, model),
    "slim": lambda model: slim(model, 2),
    "summary": model_summary,
}


@pytest.mark.parametrize("look", LOOKS)
@pytest.mark.parametrize("change", [spectral_norm, counted])
@pytest.mark.parametrize("where", ["kan.layers.0.spline_weight", "kan.layers.1.base_weight", "head.weight"])
def test_looking_at_a_model_moves_no_buffers(where, change, look):
    """In training, each read of a parameter with spectral_norm is a step of its power iteration."""
    base = Net().train()
    path, _, name = where.rpartition(".")
    change(base.get_submodule(path), name)
    before = state_of(base)
    error, wrong = outcome(lambda: LOOKS[look](base), base)
    if error is None and look == "attach":
        after = {name: value for name, value in state_of(base)["tensors"].items() if "parametrizations" in name}
        assert after and after == {name: before["tensors"][name] for name in after}
        return
    assert isinstance(error, ValueError) or (error is None and not differences(before, state_of(base)))
    assert not wrong


@pytest.mark.parametrize("name", ["spline_weight", "base_weight"])
def test_layers_that_share_a_parameter(name):
    base = Net()
    base.kan = KAN([3, 3, 3])
    setattr(base.kan.layers[1], name, getattr(base.kan.layers[0], name))
    before = state_of(base)
    try:
        model = adapted(base)
    except ValueError as error:
        assert name in str(error) and not differences(before, state_of(base))
        return
    y = model(X)
    try:
        model.merge_adapter()
    except ValueError as error:
        assert name in str(error)
        torch.testing.assert_close(model(X), y)
        return
    torch.testing.assert_close(model(X), y)


@pytest.mark.parametrize("change", [pruned, old_weight_norm, new_weight_norm])
def test_parameters_that_are_computed_later(change):
    """The forward pass may be right, but a merge would write what the next one computes anew."""
    model = adapted()
    change(model.base_model.model.kan.layers[0].base_layer)
    for merge in (model.merge_adapter, model.merge_and_unload):
        assert_refused(merge, model, error=ValueError, match="spline_weight")


@pytest.mark.parametrize("dtype", [torch.int8, torch.complex64, torch.float8_e4m3fn])
def test_coefficients_that_no_update_can_be_added_to(dtype):
    base = Net()
    weight = base.kan.layers[0].spline_weight
    base.kan.layers[0].spline_weight = nn.Parameter((weight * 100).to(dtype), requires_grad=False)
    with pytest.raises(ValueError, match=f"spline_weight.*{dtype}"):
        adapted(base)
    assert not hasattr(base, "peft_config")


def test_components_that_no_layer_has():
    """The adapter trained nothing."""
    base = Net()
    assert_refused(lambda: adapted(base, train=["factor_kernel"]), base, match="nothing would be trained")


@pytest.mark.parametrize("in_place", [True, False])
def test_names_of_adapters_in_a_part_that_is_compiled(in_place):
    """Compiled code takes no notice of hooks that are new: all rows got the active adapter."""
    base = Net()
    if in_place:
        base.kan.compile(backend="eager")
    else:
        base.kan = torch.compile(base.kan, backend="eager")
    model = adapted(base)
    model(X)
    assert_refused(lambda: model(X, adapter_names=["__base__"] * 5), model, match="compile the whole model")


def test_an_adapter_that_is_named_twice_is_merged_once():
    model = adapted()
    y = model(X)
    model.merge_adapter(["default", "default"])
    torch.testing.assert_close(model(X), y)
    model.unmerge_adapter()
    torch.testing.assert_close(model.merge_and_unload(adapter_names=["default", "default"])(X), y)


def test_modules_to_save_that_no_module_is_called():
    with pytest.raises(ValueError, match=r"modules_to_save.*'haed'"):
        adapted(modules_to_save=["haed", "head"])


def test_a_layer_in_two_places_shares_nothing_with_another():
    layer = KAN([3, 3]).layers[0]
    model = adapted(nn.Sequential(layer, nn.Tanh(), layer))
    y = model(X)
    model.merge_adapter()
    torch.testing.assert_close(model(X), y)


def test_unload_while_merged():
    model = adapted()
    model.merge_adapter()
    try:
        base = model.unload()
    except (ValueError, RuntimeError) as error:
        assert "merged" in str(error)
        return
    assert torch.equal(base(X), Net()(X))


##########################
# Loading                #
##########################


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_memory_is_saved_without_another_dtype(tmp_path, dtype):
    """PEFT then puts the tensors of the file into the places of parameters that have the dtype of the base."""
    folder = save(tmp_path / "a", modules_to_save=["head"])
    models = [adapted(Net().to(dtype), modules_to_save=["head"]) for _ in range(2)]
    for model, low in zip(models, (False, True), strict=True):
        model.load_adapter(folder, "other", low_cpu_mem_usage=low)
        model.set_adapter("other")
    first, second = ({n: p for n, p in m.named_parameters() if "other" in n} for m in models)
    assert {n: p.dtype for n, p in first.items()} == {n: p.dtype for n, p in second.items()}
    x = X.to(dtype)
    torch.testing.assert_close(models[1](x), models[0](x), atol=0.02, rtol=0.02)  # components are rounded or not
    names = ["default", "other", "__base__", "other", "default"]
    assert models[1](x, adapter_names=names).dtype == dtype


##########################
# Loading over           #
##########################


def test_loading_over_an_adapter_of_another_alpha(tmp_path):
    """PEFT reads the tensors alone, and they would count with the alpha that is there."""
    save(tmp_path / "a", alpha=4.0)
    model = adapted()
    assert_refused(lambda: model.load_adapter(tmp_path / "a", "default"), model, error=ValueError, match="alpha")
    hotswap_adapter(model, tmp_path / "a")
    torch.testing.assert_close(model(X), PeftModel.from_pretrained(Net(), tmp_path / "a")(X))


def test_loading_over_an_adapter_of_another_grid(tmp_path):
    save(tmp_path / "a", adapted(Other(grid_range=(-3, 3))))
    model = adapted()
    assert_refused(lambda: model.load_adapter(tmp_path / "a", "default"), model, error=ValueError, match="grid")
    model.load_adapter(tmp_path / "a", "default", check_base="ignore")


@pytest.mark.parametrize("adapter", ["existing", "other"])
@pytest.mark.parametrize(("check_base", "match"), [("error", "are not those"), ("maybe", "`check_base` must be")])
def test_load_adapter_checks_the_base_as_it_is_told(tmp_path, adapter, check_base, match):
    """PEFT passes `check_base` on in `from_pretrained` alone."""
    save(tmp_path)
    base = Net()
    base.kan.layers[0].spline_weight.data += 0.1
    model = adapted(base, "existing")
    load = lambda: model.load_adapter(tmp_path, adapter, check_base=check_base)  # noqa: E731
    assert_refused(load, model, match=match)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.load_adapter(tmp_path, adapter, check_base="ignore")


def test_loading_over_a_merged_adapter(tmp_path):
    save(tmp_path / "a")
    model = adapted()
    model.merge_adapter()
    assert_refused(lambda: model.load_adapter(tmp_path / "a", "default"), model, error=ValueError, match="merged")


def test_loading_a_pickle_over_an_adapter(tmp_path):
    tensors = load_file(save(tmp_path / "a") / WEIGHTS)
    (tmp_path / "a" / WEIGHTS).unlink()
    torch.save(tensors, tmp_path / "a" / "adapter_model.bin")
    model = adapted()
    assert_refused(lambda: model.load_adapter(tmp_path / "a", "default"), model, error=ValueError, match="pickle")


def test_loading_the_same_adapter_again(tmp_path):
    model = adapted(modules_to_save=["head"])
    y = model(X)
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        model.base_model.model.kan.layers[0].lotra_core["default"].zero_()
    model.load_adapter(str(tmp_path), adapter_name="default")
    torch.testing.assert_close(model(X), y)


CORE, BASIS = (f"base_model.model.kan.layers.0.lotra_{part}" for part in ("core", "factor_basis"))
OTHER_TENSORS = {
    "a name of this adapter's own": (f"{BASIS} is missing", lambda t: t.update({f"{BASIS}.default": t.pop(BASIS)})),
    "another layer": ("kan.layers.7.lotra_core", lambda t: t.update({CORE.replace("0", "7"): t[CORE].clone()})),
    "no head": ("head.bias is missing", lambda t: t.pop("base_model.model.head.bias")),
    "a module that is not saved": (
        "kan.layers.1.bias",
        lambda t: t.update({CORE.replace("0.lotra_core", "1.bias"): t[CORE].clone()}),
    ),
    "no prefix": (
        "kan.layers.0.lotra_core",
        lambda t: t.update({CORE.removeprefix("base_model.model."): t[CORE].clone()}),
    ),
}


@pytest.mark.parametrize("kind", OTHER_TENSORS)
def test_loading_over_an_adapter_of_other_tensors(tmp_path, kind):
    """The names are compared as they are for an adapter that is not there yet."""
    folder = save(tmp_path / "a", modules_to_save=["head"])
    match, change = OTHER_TENSORS[kind]
    edit_tensors(folder, change)
    edit_config(folder, base_layers=None, base_digest=None)
    model = adapted(modules_to_save=["head"])
    match = match.removeprefix("base_model.model.")
    assert_refused(lambda: model.load_adapter(folder, "default"), model, error=ValueError, match=match)
    assert_load_refused(folder, match=match, error=ValueError)


def test_loading_over_an_adapter_with_other_saved_modules(tmp_path):
    for mine, theirs, match in (
        ({}, {"modules_to_save": ["head"]}, "nothing"),
        ({"modules_to_save": ["head"]}, {}, "missing"),
    ):
        model, folder = adapted(**mine), save(tmp_path / match, **theirs)
        assert_refused(lambda m=model, f=folder: m.load_adapter(f, "default"), model, error=ValueError, match=match)


def test_a_file_with_an_adapter_called_like_the_one_that_is_there(tmp_path):
    """PEFT 0.19 saves the tensors of all adapters; the file's own count, whatever the others are called."""
    folder = save(tmp_path / "a", modules_to_save=["head"])
    expected = PeftModel.from_pretrained(Net(), folder)(X)
    edit_tensors(folder, lambda tensors: tensors.update({f"{CORE}.default": torch.ones_like(tensors[CORE])}))
    model = adapted(modules_to_save=["head"])
    model.load_adapter(folder, "default")
    torch.testing.assert_close(model(X), expected)


##########################
# Hotswap                #
##########################


class Other(Net):
    def __init__(self, **kwargs):
        super().__init__()
        state = {name: value for name, value in self.kan.state_dict().items() if "weight" in name}
        self.kan = KAN([3, 4, 3], **kwargs)
        self.kan.load_state_dict(state, strict=False)


def test_hotswap_of_another_grid(tmp_path):
    save(tmp_path / "a", adapted(Other(grid_range=(-3, 3))))
    model = adapted()
    assert_refused(lambda: hotswap_adapter(model, tmp_path / "a"), model, error=ValueError, match="grid")


def test_hotswap_of_another_base(tmp_path):
    base = Net()
    with torch.no_grad():
        base.kan.layers[0].spline_weight.add_(1)
    save(tmp_path / "a", adapted(base))
    with pytest.warns(UserWarning, match="coefficients"):
        hotswap_adapter(adapted(), tmp_path / "a")


def test_hotswap_of_the_same_base(tmp_path, recwarn):
    save(tmp_path / "a")
    model = adapted()
    hotswap_adapter(model, tmp_path / "a")
    assert not [warning for warning in recwarn if "base" in str(warning.message)]
    torch.testing.assert_close(model(X), PeftModel.from_pretrained(Net(), tmp_path / "a")(X))


def test_hotswap_of_another_grid_on_purpose(tmp_path):
    save(tmp_path / "a", adapted(Other(grid_range=(-3, 3))))
    hotswap_adapter(adapted(), tmp_path / "a", check_base="ignore")


####################################
# State dicts                      #
####################################


def saved_and_read(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("way", [copy.deepcopy, saved_and_read])
@pytest.mark.parametrize("merged", [True, False])
def test_the_state_of_a_model_that_is_merged_otherwise(way, merged):
    """The update counted twice, or not until the model was unmerged."""
    first, second, y = adapted(), adapted(), None
    (first if merged else second).merge_adapter()
    state, y = way(first.state_dict()), first(X)
    assert_refused(lambda: second.load_state_dict(state), second, error=ValueError, match="before, so that both agree")
    (second.merge_adapter if merged else second.unmerge_adapter)()
    second.load_state_dict(state)
    assert torch.equal(second(X), y)
    second.load_state_dict({name: tensor.clone() for name, tensor in state.items()})  # which does not say it
