# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import pytest
import torch
from helpers import adapt, assert_same, lotra_layers, nested, snapshot
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from peft_lotra import LoTRAConfig, hotswap_adapter
from peft_lotra.kan import KAN


X = torch.rand(6, 3) * 1.8 - 0.9


def base(widths=(3, 5, 2)) -> KAN:
    torch.manual_seed(7)
    return KAN(list(widths))


@pytest.fixture
def folder(tmp_path):
    """Saves an adapter of another function, and returns its folder and its outputs on X."""

    def save(model=None, **config):
        model = base() if model is None else model
        torch.manual_seed(len(list(tmp_path.iterdir())) + 1)
        model = adapt(model, **config)
        path = tmp_path / str(len(list(tmp_path.iterdir())))
        model.save_pretrained(path)
        with torch.no_grad():
            return path, model(X)

    return save


def test_the_weights_are_replaced_in_place(folder):
    first, second = folder(), folder()
    model = PeftModel.from_pretrained(base(), first[0])
    places = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    assert torch.equal(model(X), first[1])
    hotswap_adapter(model, second[0])
    assert torch.equal(model(X), second[1]) and not torch.equal(first[1], second[1])
    assert {name: parameter.data_ptr() for name, parameter in model.named_parameters()} == places
    hotswap_adapter(model, str(first[0]), adapter_name="default")
    assert torch.equal(model(X), first[1])


@pytest.mark.parametrize("in_place", [False, True])
def test_a_compiled_model_is_not_compiled_again(folder, in_place):
    first, second, third = folder(), folder(), folder(alpha=0.5)
    model = PeftModel.from_pretrained(base(), first[0])
    torch._dynamo.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    if in_place:
        model.compile(backend=backend, fullgraph=True)
        compiled = model
    else:
        compiled = torch.compile(model, backend=backend, fullgraph=True)
    with torch.inference_mode():
        torch.testing.assert_close(compiled(X), first[1])
        for path, expected in (second, third, first):
            hotswap_adapter(compiled, path)
            torch.testing.assert_close(compiled(X), expected)
    assert len(graphs) == 1


def test_another_alpha_and_another_scale(folder):
    first, second = folder(alpha=2.0), folder(alpha=0.5, alpha_pattern={"layers.1": 3.0})
    model = PeftModel.from_pretrained(base(), first[0])
    hotswap_adapter(model, second[0])
    torch.testing.assert_close(model(X), second[1])
    loaded = PeftModel.from_pretrained(base(), second[0])
    for adapted in (model, loaded):
        for layer in lotra_layers(adapted).values():
            layer.set_scale("default", 0.3)
    torch.testing.assert_close(model(X), loaded(X))


def test_another_alpha_in_a_file_of_half_precision(folder, tmp_path):
    """The alpha is made up for in the precision of the adapter here, not of the file."""
    half = PeftModel.from_pretrained(base(), folder(alpha=1.1)[0])
    for name, parameter in half.named_parameters():
        if "lotra_" in name:
            parameter.data = parameter.data.bfloat16()
    half.save_pretrained(tmp_path / "half")
    model = PeftModel.from_pretrained(base(), folder(alpha=0.7)[0])
    hotswap_adapter(model, tmp_path / "half")
    loaded = PeftModel.from_pretrained(base(), tmp_path / "half")
    torch.testing.assert_close(model(X), loaded(X))


def test_what_is_saved_after_a_swap(folder, tmp_path):
    first, second = folder(alpha=2.0), folder(alpha=0.5)
    model = PeftModel.from_pretrained(base(), first[0])
    hotswap_adapter(model, second[0])
    model.save_pretrained(tmp_path / "again")
    torch.testing.assert_close(PeftModel.from_pretrained(base(), tmp_path / "again")(X), second[1])


def test_saved_modules_are_replaced_too(folder):
    def model():
        torch.manual_seed(3)
        return nested()

    config = {"target_modules": ["body.0"], "modules_to_save": ["head"]}
    torch.manual_seed(0)
    first = folder(model(), **config)
    other = model()
    nn.init.ones_(other["head"].weight)
    second = folder(other, **config)
    loaded = PeftModel.from_pretrained(model(), first[0])
    hotswap_adapter(loaded, second[0])
    torch.testing.assert_close(loaded(X), second[1])


def test_the_other_adapters_stay(folder):
    first, second, third = folder(), folder(), folder()
    model = PeftModel.from_pretrained(base(), first[0], adapter_name="one")
    model.load_adapter(second[0], adapter_name="two")
    hotswap_adapter(model, third[0], adapter_name="one")
    assert torch.equal(model(X), third[1])
    model.set_adapter("two")
    assert torch.equal(model(X), second[1])


@pytest.mark.parametrize(
    "config, message",
    [
        ({"r": (2, 3, 3)}, r"layers.0.lotra_core: \(2, 3, 3\) in the new adapter, \(2, 3, 4\) in the loaded one"),
        ({"target_modules": ["layers.0"]}, "layers.1.lotra_core is in the loaded adapter only"),
        ({"adapt_residual": False}, r"layers.0.lotra_factor_basis: \(8, 4\) in the new adapter, \(9, 4\)"),
        ({"model": KAN([3, 4, 2])}, r"layers.0.lotra_factor_out: \(4, 2\) in the new adapter, \(5, 2\)"),
        ({"model": KAN([3, 5, 4, 2])}, "layers.2.lotra_core is in the new adapter only"),
    ],
)
def test_another_adapter_is_refused_and_nothing_changed(folder, config, message):
    model = PeftModel.from_pretrained(base(), folder()[0])
    path, _ = folder(**config)
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        hotswap_adapter(model, path)
    assert_same(model, before)


def test_another_family_is_refused(folder):
    from stand_ins import FAMILIES

    own = nn.Sequential(KAN([3, 5]).layers[0], KAN([5, 2]).layers[0])
    path, _ = folder(own)
    efficient = nn.Sequential(FAMILIES["efficient-kan"](3, 5), FAMILIES["efficient-kan"](5, 2))
    model = adapt(efficient)
    with pytest.raises(ValueError, match="0: a peft-lotra layer in the new adapter, a efficient-kan layer"):
        hotswap_adapter(model, path)


def test_wrong_calls(folder, tmp_path):
    path, _ = folder()
    model = PeftModel.from_pretrained(base(), path)
    before = snapshot(model)
    with pytest.raises(ValueError, match="no adapter 'other' to replace, the model has \\['default'\\]"):
        hotswap_adapter(model, path, adapter_name="other")
    with pytest.raises(ValueError, match="Can't find 'adapter_config.json'"):
        hotswap_adapter(model, tmp_path)
    lora = get_peft_model(nn.Sequential(nn.Linear(3, 2)), LoraConfig(target_modules=["0"]))
    lora.save_pretrained(tmp_path / "lora")
    with pytest.raises(ValueError, match="is of the type LORA, and not LOTRA"):
        hotswap_adapter(model, tmp_path / "lora")
    with pytest.raises(ValueError, match="'default' is of the type LORA, and not LOTRA"):
        hotswap_adapter(lora, path)
    with pytest.raises(ValueError, match="is a KAN, but must be a PeftModel"):
        hotswap_adapter(base(), path)
    assert_same(model, before)
    model.merge_adapter()
    before = snapshot(model)
    with pytest.raises(ValueError, match="'default' is merged"):
        hotswap_adapter(model, path)
    assert_same(model, before)


def test_an_adapter_scaled_to_nothing_is_refused(folder):
    path, _ = folder()
    model = adapt(base())
    config = model.peft_config["default"]
    config.alpha = 0.0
    with pytest.raises(ValueError, match="alpha 0"):
        hotswap_adapter(model, path)


def test_bfloat16_models_keep_their_dtype(folder):
    path, expected = folder()
    model = get_peft_model(base().bfloat16(), LoTRAConfig(r=(2, 3, 4)), autocast_adapter_dtype=False).eval()
    hotswap_adapter(model, path)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    torch.testing.assert_close(model(X.bfloat16()).float(), expected, rtol=0.05, atol=0.1)
