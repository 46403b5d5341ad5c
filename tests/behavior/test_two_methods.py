# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""LoTRA on the KAN layers and PEFT's LoRA on a linear head, as docs/recipes/lotra_and_lora.md has it."""

import shutil

import pytest
import torch
from helpers import X, adapt, add_adapter, assert_equal, edit_config, load, lotra_layers, net, refused
from peft import (
    IA3Config,
    LoHaConfig,
    LoraConfig,
    PeftModel,
    PromptTuningConfig,
    inject_adapter_in_model,
)
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import nn
from torch.testing import assert_close

from peft_lotra import LoTRALayer, create_lotra_optimizer, load_adapters, save_adapter
from peft_lotra.kan import KAN


def both():
    model = adapt(net())
    config = LoraConfig(r=2, target_modules=["head"], init_lora_weights=False)
    inject_adapter_in_model(config, model.base_model.model, adapter_name="head")
    return model.eval()


def test_both_are_trained_merged_and_the_base_is_not():
    model = both().train()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}

    assert len(trained) == 7 + 2
    assert all("lotra_" in name or "lora_" in name for name in trained)

    model(X).square().sum().backward()

    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)

    with model.disable_adapter():
        assert_equal(model(X), net()(X))
    y, merged = model.eval()(X), model.merge_and_unload()

    assert_close(merged(X), y)
    assert type(merged.head) is nn.Linear
    assert not any(isinstance(m, LoTRALayer | LoraLayer) for m in merged.modules())


def test_a_load_that_leaves_lora_out_warns(tmp_path, recwarn):
    both().save_pretrained(tmp_path)
    recwarn.clear()

    load_adapters(net(), tmp_path)
    load_adapters(net(), tmp_path, names=["default"])

    assert not [str(warning.message) for warning in recwarn if "other methods" in str(warning.message)]
    with pytest.warns(UserWarning, match=r"other methods, \['head'\], which are not loaded"):
        load(tmp_path)


def test_a_lotra_adapter_that_was_removed_is_not_missed(tmp_path):
    """Each of several LoTRA adapters is a model of its own."""
    model = both()
    add_adapter(model, "ben")
    model.save_pretrained(tmp_path)
    shutil.rmtree(tmp_path / "ben")

    loaded = load_adapters(net(), tmp_path)

    assert list(loaded.peft_config) == ["default", "head"]


def test_a_model_with_lora_gets_lotra():
    base = inject_adapter_in_model(LoraConfig(target_modules=["head"], init_lora_weights=False), net())
    before = base(X)
    model = adapt(base, init_weights=True)

    assert_equal(model(X), before)
    assert len(lotra_layers(model)) == 2


def inject(model, name, config):
    inject_adapter_in_model(config, model.get_base_model(), adapter_name=name)


def randomize(model, name):
    """Give all parameters of an adapter random values, so that each of them has an effect."""
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if f".{name}" in key and parameter.is_floating_point():
                parameter.copy_(torch.randn_like(parameter) / 2)


OTHERS = {
    "LoRA": LoraConfig(r=2, target_modules=["head"], lora_dropout=0.5),
    "LoHa": LoHaConfig(r=2, target_modules=["head"]),
    "IA3": IA3Config(target_modules=["head"], feedforward_modules=[]),
}


@pytest.mark.parametrize("is_trainable", [False, True])
@pytest.mark.parametrize("method", OTHERS)
def test_one_call_loads_what_one_call_saved(method, is_trainable, tmp_path):
    model = adapt(net())
    inject(model, "other", OTHERS[method])
    randomize(model, "other")
    model.eval().save_pretrained(tmp_path)

    loaded = load_adapters(net(), tmp_path, is_trainable=is_trainable)

    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    expected = trained if is_trainable else set()
    assert {name for name, parameter in loaded.named_parameters() if parameter.requires_grad} == expected
    assert loaded.training == is_trainable
    assert_equal(loaded.eval()(X), model(X))


def test_loaded_adapters_are_saved_again(tmp_path):
    model = both()
    model.save_pretrained(tmp_path / "first")

    loaded = load_adapters(net(), tmp_path / "first")
    loaded.save_pretrained(tmp_path / "second")
    again = load_adapters(net(), tmp_path / "second")

    assert_equal(again(X), model(X))


class Tail(nn.Module):
    """A KAN, two linear layers and a head."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(7)
        self.kan = KAN([3, 4])
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.second(self.first(self.kan(x))))


def test_several_other_adapters_and_a_new_head_are_all_active(tmp_path):
    """PEFT leaves only the adapter that is injected last active."""
    model = adapt(Tail(), modules_to_save=["head"])
    inject(model, "a", LoraConfig(r=2, target_modules=["first"], init_lora_weights=False))
    inject(model, "b", LoraConfig(r=2, target_modules=["second"], init_lora_weights=False))
    with torch.no_grad():
        model.get_base_model().head.modules_to_save["default"].weight.zero_()
    model.save_pretrained(tmp_path)

    loaded = load_adapters(Tail(), tmp_path)

    network = loaded.get_base_model()
    assert network.first.active_adapters == ["a"]
    assert network.second.active_adapters == ["b"]
    assert_close(loaded(X), network.head.bias.expand(8, 2))  # of the head with zero weights


def test_a_head_that_the_other_method_trains_comes_back(tmp_path):
    model = adapt(Tail())
    inject(model, "lora", LoraConfig(r=2, target_modules=["first"], modules_to_save=["head"]))
    randomize(model, "lora")
    model.save_pretrained(tmp_path)

    loaded = load_adapters(Tail(), tmp_path)

    assert_equal(loaded(X), model.eval()(X))


def test_biases_are_trained_and_saved_with_lora(tmp_path):
    """`bias="all"` saves them; PEFT trains them in the first adapter only, so docs/training.md has the loop below."""
    model = adapt(Tail())
    inject(model, "lora", LoraConfig(r=2, target_modules=["first"], bias="all"))
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):
            parameter.requires_grad_()
    before = model.get_base_model().head.bias.detach().clone()
    optimizer = create_lotra_optimizer(model, torch.optim.Adam, lr=1e-2, other_lr=1e-3)

    model(X).square().sum().backward()
    optimizer.step()
    model.save_pretrained(tmp_path)
    loaded = load_adapters(Tail(), tmp_path)

    change = model.get_base_model().head.bias - before
    assert_close(change.abs(), torch.full_like(change, 1e-3))
    assert_equal(loaded(X), model(X))


@pytest.mark.parametrize("save", [PeftModel.save_pretrained, save_adapter])
def test_an_adapter_of_an_earlier_save_is_not_loaded(save, tmp_path):
    save(both(), tmp_path)
    model = adapt(net()).eval()
    save(model, tmp_path)

    with pytest.warns(UserWarning, match=r"also has \['head'\]"):
        loaded = load_adapters(net(), tmp_path)

    assert_equal(loaded(X), model(X))
    named = load_adapters(net(), tmp_path, names=["default", "head"])
    assert list(named.peft_config) == ["default", "head"]


def test_an_adapter_that_was_lost_is_named(tmp_path):
    model = both()
    model.save_pretrained(tmp_path)
    shutil.rmtree(tmp_path / "head")
    base = net()

    with refused(r"has no adapter \['head'\], which was saved with 'default'"):
        load_adapters(base, tmp_path)

    loaded = load_adapters(base, tmp_path, names=["default"])
    model.get_base_model().head.set_adapter([])
    assert_equal(loaded(X), model(X))


def test_a_subfolder_is_loaded_as_a_folder(tmp_path):
    model = both()
    add_adapter(model, "ben")
    model.save_pretrained(tmp_path)
    model.set_adapter("ben")

    loaded = load_adapters(net(), tmp_path / "ben")

    model.get_base_model().head.set_adapter([])
    assert_equal(loaded(X), model.eval()(X))


def test_two_methods_with_one_name_are_not_saved(tmp_path):
    """PEFT has one configuration for each name, and would write LoRA's alone."""
    model = adapt(net())
    inject(model, "default", LoraConfig(target_modules=["head"]))

    for save in (PeftModel.save_pretrained, save_adapter):
        with refused("'default' is also the name of an adapter of LORA"):
            save(model, tmp_path)

    assert not (tmp_path / "adapter_model.safetensors").exists()


def test_unrelated_folders_are_left_alone(tmp_path):
    model = both()
    model.save_pretrained(tmp_path)
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "run.json").write_text("{}")
    for name in ("checkpoint-10", ".cache"):
        shutil.copytree(tmp_path / "head", tmp_path / name)

    loaded = load_adapters(net(), tmp_path)

    assert list(loaded.peft_config) == ["default", "head"]


def test_names_choose_among_several_lotra_adapters(tmp_path):
    model = both()
    add_adapter(model, "ben")
    model.save_pretrained(tmp_path)
    model.set_adapter("ben")
    model.get_base_model().head.set_adapter("head")

    loaded = load_adapters(net(), tmp_path, names=["ben", "head"])

    assert_equal(loaded(X), model.eval()(X))
    with refused(r"LoTRA adapters \['default', 'ben'\]. Pass one of them"):
        load_adapters(net(), tmp_path)


def edit_tensors(folder, edit):
    path = folder / "adapter_model.safetensors"
    save_file({key: edit(tensor) for key, tensor in load_file(path).items()}, path)


def truncate(path):
    path.write_bytes(path.read_bytes()[:50])


def rename_a_tensor(folder):
    path = folder / "adapter_model.safetensors"
    save_file({key.replace("lora_A", "lora_C"): tensor for key, tensor in load_file(path).items()}, path)


DAMAGES = {
    "no subfolder": (lambda f: shutil.rmtree(f / "head"), {"names": ["default", "head"]}, "no adapter .'head'."),
    "no tensors": (
        lambda f: (f / "head/adapter_model.safetensors").unlink(),
        {},
        "head has no adapter_model",
    ),
    "no configuration": (
        lambda f: (f / "head/adapter_config.json").unlink(),
        {},
        "head holds tensors without",
    ),
    "cut tensors": (lambda f: truncate(f / "head/adapter_model.safetensors"), {}, "head.adapter_model.*damaged"),
    "cut configuration": (lambda f: truncate(f / "head/adapter_config.json"), {}, "head.adapter_config.*damaged"),
    "an unknown method": (lambda f: edit_config(f / "head", peft_type="NEW"), {}, "head.adapter_config.*damaged"),
    "another layer": (lambda f: edit_config(f / "head", target_modules=["tail"]), {}, "tail.* not found"),
    "another shape": (lambda f: edit_tensors(f / "head", lambda t: t[:1].clone()), {}, "'head' does not fit the base"),
    "another tensor": (lambda f: rename_a_tensor(f / "head"), {}, "'head' does not fit.*lora_A.* is missing"),
    "cut LoTRA": (lambda f: truncate(f / "adapter_model.safetensors"), {}, "damaged"),
    "no LoTRA": (lambda f: (f / "adapter_config.json").unlink(), {"names": ["head"]}, "no LoTRA adapter among"),
    "prompts": (lambda f: PromptTuningConfig(num_virtual_tokens=2).save_pretrained(f / "head"), {}, "prompt learning"),
    "no folder": (shutil.rmtree, {}, "There is no folder"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_an_error_leaves_the_base_as_it_was(damage, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    folder = tmp_path / "adapters"
    both().save_pretrained(folder)
    make, options, message = DAMAGES[damage]
    make(folder)
    base = net().train()

    with refused(message, base):
        load_adapters(base, folder, **options)

    assert not hasattr(base, "peft_config")


def test_a_base_with_adapters_is_refused(tmp_path):
    model = both()
    model.save_pretrained(tmp_path)

    with refused("The base has adapters"):
        load_adapters(model.get_base_model(), tmp_path)


class Attention(nn.Module):
    """Attention, and a KAN as its head."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(7)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.kan = KAN([8, 2])

    def forward(self, x):
        return self.kan(torch.tanh(self.attention(x, x, x)[0].mean(1)))


@pytest.mark.parametrize("leave", ["merge_and_unload", "unload"])
def test_lora_on_attention_is_merged_and_unloaded(leave):
    model = adapt(Attention(), r=2)
    inject(model, "other", LoraConfig(r=2, target_modules=["attention"], init_lora_weights=False))
    x = torch.rand(3, 5, 8)
    expected = model(x) if leave == "merge_and_unload" else Attention().eval()(x)

    plain = getattr(model, leave)()

    assert_close(plain(x), expected)
    assert type(plain.attention) is nn.MultiheadAttention
    assert type(plain.attention.out_proj) is type(Attention().attention.out_proj)
