# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""`hotswap_adapter` while a model serves: compiled, in another precision, with other scales and saved modules."""

from __future__ import annotations

import threading

import pytest
import torch
from helpers import adapt, assert_same, lotra_layers, nested, snapshot
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from peft_lotra import LoTRAConfig, hotswap_adapter
from peft_lotra.kan import KAN


X = torch.linspace(-0.9, 0.9, 18).view(6, 3)


def base(widths=(3, 5, 2), **kwargs) -> KAN:
    torch.manual_seed(7)
    return KAN(list(widths), **kwargs)


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


def test_other_threads_get_the_old_answer_or_the_new_one(folder):
    adapters, wrong, done = [folder(), folder()], [], threading.Event()
    model = PeftModel.from_pretrained(base(), adapters[0][0])

    def serve():
        with torch.no_grad():
            while not done.is_set():
                y = model(X)
                wrong.extend([y] if not any(torch.allclose(y, expected) for _, expected in adapters) else ())

    threads = [threading.Thread(target=serve) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        for i in range(20):
            hotswap_adapter(model, adapters[i % 2][0])
    finally:
        done.set()
        for thread in threads:
            thread.join()
    assert not wrong


def test_another_alpha_and_another_scale(folder, tmp_path):
    first, second = folder(alpha=2.0), folder(alpha=0.5, alpha_pattern={"layers.1": 3.0})
    model = PeftModel.from_pretrained(base(), first[0])
    hotswap_adapter(model, second[0])
    torch.testing.assert_close(model(X), second[1])
    model.save_pretrained(tmp_path / "again")
    torch.testing.assert_close(PeftModel.from_pretrained(base(), tmp_path / "again")(X), second[1])
    loaded = PeftModel.from_pretrained(base(), second[0])
    for adapted in (model, loaded):
        for layer in lotra_layers(adapted).values():
            layer.set_scale("default", 0.3)
    torch.testing.assert_close(model(X), loaded(X))


def test_ranks_that_were_raised_are_saved(folder, tmp_path):
    model = adapt(base(), r=2)
    hotswap_adapter(model, folder(r=3)[0], target_rank=4)
    model.save_pretrained(tmp_path / "again")
    y = model(X)
    assert torch.equal(PeftModel.from_pretrained(base(), tmp_path / "again")(X), y)


def test_files_and_models_in_half_precision(folder, tmp_path):
    path, expected = folder(alpha=1.1)
    half = PeftModel.from_pretrained(base(), path)
    for name, parameter in half.named_parameters():
        if "lotra_" in name:
            parameter.data = parameter.data.bfloat16()
    half.save_pretrained(tmp_path / "half")
    model = PeftModel.from_pretrained(base(), folder(alpha=0.7)[0])
    hotswap_adapter(model, tmp_path / "half")  # the alpha is made up for in the precision of the adapter here
    torch.testing.assert_close(model(X), PeftModel.from_pretrained(base(), tmp_path / "half")(X))
    model = get_peft_model(base().bfloat16(), LoTRAConfig(r=(2, 3, 4)), autocast_adapter_dtype=False).eval()
    hotswap_adapter(model, path)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    torch.testing.assert_close(model(X.bfloat16()).float(), expected, rtol=0.05, atol=0.1)


def test_saved_modules_are_replaced_too(folder):
    def model():
        torch.manual_seed(3)
        return nested()

    config = {"target_modules": ["body.0"], "modules_to_save": ["head"]}
    first, other = folder(model(), **config), model()
    nn.init.ones_(other["head"].weight)
    second = folder(other, **config)
    loaded = PeftModel.from_pretrained(model(), first[0])
    hotswap_adapter(loaded, second[0])
    torch.testing.assert_close(loaded(X), second[1])


def test_another_grid_or_base(folder):
    path, _ = folder(base(grid_range=(-3, 3)))
    model = adapt(base())
    before = snapshot(model)
    with pytest.raises(ValueError, match="grid"):
        hotswap_adapter(model, path)
    assert_same(model, before)
    hotswap_adapter(model, path, check_base="ignore")
    other = base()
    other.layers[0].spline_weight.data.add_(1)
    with pytest.warns(UserWarning, match="parameters"):
        hotswap_adapter(model, folder(other)[0])


def test_no_lotra_adapter(folder, tmp_path):
    path, _ = folder()
    model = PeftModel.from_pretrained(base(), path)
    lora = get_peft_model(nn.Sequential(nn.Linear(3, 2)), LoraConfig(target_modules=["0"]))
    lora.save_pretrained(tmp_path / "lora")
    before = snapshot(model)
    for folder_, words in ((tmp_path, "Can't find 'adapter_config.json'"), (tmp_path / "lora", "LORA")):
        with pytest.raises(ValueError, match=words):
            hotswap_adapter(model, folder_)
    for other in (lora, base()):
        with pytest.raises(ValueError, match="must be a PeftModel with a LoTRA adapter"):
            hotswap_adapter(other, path)
    assert_same(model, before)
