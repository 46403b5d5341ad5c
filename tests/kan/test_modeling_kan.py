# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import copy
import json
import pickle

import pytest
import torch
import torch.nn.functional as F
from helpers import ALLOWED
from peft import AutoPeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, Trainer, TrainingArguments

from peft_lotra import LoTRAConfig, kan
from peft_lotra.kan import KAN, KANConfig, KANModel, SlimKAN


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def moved_model(**kwargs):
    """A model that a new one of the same configuration differs from in each tensor, grids included."""
    model = KANModel(KANConfig(widths=(3, 5, 2), **kwargs))
    model.kan.update_grid(2 + torch.randn(100, 3))
    return model


def assert_same_state(one, other):
    one, other = one.state_dict(), other.state_dict()
    assert one.keys() == other.keys()
    for name in one:
        assert one[name].dtype == other[name].dtype
        assert torch.equal(one[name], other[name]), name


def test_config_round_trip(tmp_path):
    config = KANConfig(widths=[4, 6, 3], grid_size=7, spline_order=2, grid_range=[0, 2], problem_type="regression")
    assert config.widths == (4, 6, 3) and config.grid_range == (0, 2)
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is KANConfig
    assert KANConfig(widths=(2, 3)) == KANConfig(widths=[2, 3]) != KANConfig(widths=(2, 5, 3))
    for field in ("widths", "grid_size", "spline_order", "grid_range", "problem_type", "id2label"):
        assert getattr(loaded, field) == getattr(config, field)


def test_the_labels_follow_the_last_width(tmp_path):
    assert KANConfig(widths=(4, 3)).id2label == {i: f"LABEL_{i}" for i in range(3)}
    config = KANConfig(widths=(4, 1), id2label={0: "name"})
    config.save_pretrained(tmp_path)
    assert KANConfig.from_pretrained(tmp_path).id2label == config.id2label
    for wrong in ({"num_labels": 5}, {"id2label": dict.fromkeys(range(5), "a")}):
        with pytest.raises(ValueError, match="`num_labels`.* is 5, .* is 3"):
            KANConfig(widths=(4, 3), **wrong)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_save_and_load_are_exact(tmp_path, dtype):
    model = moved_model().to(dtype)
    model.save_pretrained(tmp_path)
    loaded, info = AutoModel.from_pretrained(tmp_path, dtype=dtype, output_loading_info=True)
    assert type(loaded) is KANModel and not info["missing_keys"] and not info["unexpected_keys"]
    assert_same_state(loaded, model)
    x = torch.randn(4, 3, dtype=dtype)
    assert torch.equal(loaded(x).logits, model(x).logits)
    assert loaded(x, torch.randn(4, 2, dtype=dtype) > 0).loss.dtype == dtype


@pytest.mark.parametrize("missing", ["spline_weight", "base_weight", "grid_bounds"])
def test_a_missing_tensor_does_not_spoil_those_that_were_loaded(tmp_path, missing):
    model = moved_model()
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = f"kan.layers.0.{missing}"
    del tensors[name]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded = KANModel.from_pretrained(tmp_path)
    for key, tensor in loaded.state_dict().items():
        assert tensor.isfinite().all() and torch.equal(tensor, model.state_dict()[key]) == (key != name), key


LOSSES = {
    "regression": lambda y, labels: F.mse_loss(y, labels.reshape(y.shape).float()),
    "single_label_classification": lambda y, labels: F.cross_entropy(y.reshape(-1, 4), labels.reshape(-1).long()),
    "multi_label_classification": lambda y, labels: F.binary_cross_entropy_with_logits(y, labels.float()),
}


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize(
    "problem, outputs, labels",
    [
        *(("regression", 1, lambda shape=shape: torch.randn(shape)) for shape in ((6, 1), (6,))),
        *(("single_label_classification", 4, lambda s=s: torch.randint(4, s).int()) for s in ((6,), (2, 3), ())),
        ("multi_label_classification", 4, lambda: torch.rand(6, 4) > 0.5),
        ("regression", 2, lambda: torch.randn(4, 6, 2, dtype=torch.float64)),
    ],
)
def test_losses(problem, outputs, labels, named):
    labels = labels()
    guessed = not named and outputs != 2  # floats for several outputs need a name
    model = KANModel(KANConfig(widths=(3, outputs), problem_type=None if guessed else problem))
    x = torch.randn(*labels.shape[: 1 if problem.startswith("multi") or outputs == 1 else 2], 3)
    output = model(x, labels=labels)
    torch.testing.assert_close(output.loss, LOSSES[problem](output.logits, labels))
    assert list(model(x).keys()) == ["logits"]
    loss, logits = model(x, labels, return_dict=False)
    assert torch.equal(logits, output.logits) and torch.equal(loss, output.loss)


def test_refuses_labels():
    model = KANModel(KANConfig(widths=(3, 4)))
    x = torch.randn(6, 3)
    with pytest.raises(ValueError, match="float32 for several outputs do not tell it"):
        model(x, labels=torch.randn(6, 4))
    with pytest.raises(ValueError, match=r"labels have shape \(6, 1\).* expects \(6,\)"):
        model(x, labels=torch.zeros(6, 1, dtype=torch.long))
    model.config.problem_type = "regression"
    with pytest.raises(ValueError, match=r"labels have shape \(6,\).* expects \(6, 4\)"):
        model(x, labels=torch.randn(6))
    model.config.problem_type = "ranking"
    with pytest.raises(ValueError, match="`config.problem_type` is 'ranking'"):
        model(x, labels=torch.randn(6))


def test_trainer(tmp_path):
    model = KANModel(KANConfig(widths=(3, 5, 2)))
    before, inputs = model.kan.layers[0].spline_weight.clone(), torch.randn(16, 3)
    data = [{"inputs": x, "labels": (x[0] > 0).long()} for x in inputs]
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=8, report_to=[], use_cpu=True
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=data, eval_dataset=data)
    trainer.train()
    assert not torch.equal(model.kan.layers[0].spline_weight, before)
    assert trainer.evaluate()["eval_loss"] > 0 and trainer.predict(data).predictions.shape == (16, 2)
    trainer.save_model(str(tmp_path / "saved"))
    assert_same_state(KANModel.from_pretrained(tmp_path / "saved"), model)


MODELS = [
    lambda: KAN([2, 3, 1]),
    lambda: SlimKAN([2, 3, 1], (1, 2, 2)),
    lambda: KANModel(KANConfig([2, 3, 1])).kan,
]


@pytest.mark.parametrize("make", MODELS)
def test_models_name_the_public_module_and_are_copied(make):
    assert all(hasattr(kan, name) for name in kan.__all__)
    model, x = make(), torch.rand(5, 2)
    assert type(model).__module__ == "peft_lotra.kan"
    for twin in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert torch.equal(twin(x), model(x))


@pytest.mark.parametrize("library", ["peft_lotra.kan", "peft_lotra.kan.modeling_kan"])
def test_files_of_adapters_name_the_public_module_and_old_ones_load(library, tmp_path):
    KANModel(KANConfig([2, 3, 1])).save_pretrained(tmp_path / "base")
    base = AutoModel.from_pretrained(tmp_path / "base")
    model = get_peft_model(base, LoTRAConfig(r=2, init_weights=False)).eval()
    model.save_pretrained(tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    config = json.loads(file.read_text())
    assert config["auto_mapping"] == {"base_model_class": "KANModel", "parent_library": "peft_lotra.kan"}
    config["auto_mapping"]["parent_library"] = library
    file.write_text(json.dumps(config))
    loaded = AutoPeftModel.from_pretrained(tmp_path / "adapter", **ALLOWED)
    x = torch.rand(5, 2)
    assert torch.equal(loaded(x).logits, model(x).logits)
