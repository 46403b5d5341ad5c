# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

import copy
import json
import pickle
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from helpers import ALLOWED, assert_equal, refused
from peft import AutoPeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, Trainer, TrainingArguments

from peft_lotra import LoTRAConfig
from peft_lotra.kan import KAN, KANConfig, KANModel, SlimKAN


def moved_model(**kwargs):
    """Return a model all of whose tensors, with the grids, differ from a new one of its configuration."""
    model = KANModel(KANConfig(widths=(3, 5, 2), **kwargs))
    model.kan.update_grid(2 + torch.randn(100, 3))
    return model


def assert_same_state(model, expected):
    assert_equal(model.state_dict(), expected.state_dict())


def test_a_configuration_is_saved_and_loaded(tmp_path):
    labels = {0: "low", 1: "middle", 2: "high"}
    options = {"grid_size": 7, "spline_order": 2, "problem_type": "regression", "id2label": labels}
    config = KANConfig(widths=[4, 6, 3], grid_range=[0, 2], **options)

    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)

    assert type(loaded) is KANConfig
    for name in ("widths", "grid_size", "spline_order", "grid_range", "problem_type", "id2label"):
        assert getattr(loaded, name) == getattr(config, name)
    assert config == KANConfig(widths=(4, 6, 3), grid_range=(0, 2), **options) != KANConfig(widths=(4, 3))


def test_the_labels_follow_the_last_width():
    assert KANConfig(widths=(4, 3)).id2label == {0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"}


@pytest.mark.parametrize("labels", [{"num_labels": 5}, {"id2label": dict.fromkeys(range(5), "a")}])
def test_another_number_of_labels_is_refused(labels):
    with refused("`num_labels`.* is 5, .* is 3"):
        KANConfig(widths=(4, 3), **labels)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_model_is_saved_and_loaded_exactly(tmp_path, dtype):
    model, x = moved_model().to(dtype), torch.randn(4, 3, dtype=dtype)

    model.save_pretrained(tmp_path)
    loaded, info = AutoModel.from_pretrained(tmp_path, dtype=dtype, output_loading_info=True)

    assert type(loaded) is KANModel
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert_same_state(loaded, model)
    assert_equal(loaded(x).logits, model(x).logits)
    assert loaded(x, torch.randn(4, 2, dtype=dtype) > 0).loss.dtype == dtype


@pytest.mark.parametrize("missing", ["spline_weight", "base_weight", "grid_bounds"])
def test_a_missing_tensor_does_not_spoil_those_that_were_loaded(tmp_path, missing):
    model = moved_model()
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = f"kan.layers.0.{missing}"
    del tensors[name]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})

    state = KANModel.from_pretrained(tmp_path).state_dict()

    assert state.pop(name).isfinite().all()
    expected = model.state_dict()
    del expected[name]
    assert_equal(state, expected)


LOSSES = {
    "regression": lambda y, labels: F.mse_loss(y, labels.reshape(y.shape).float()),
    "single_label_classification": lambda y, labels: F.cross_entropy(y.reshape(-1, 4), labels.reshape(-1).long()),
    "multi_label_classification": lambda y, labels: F.binary_cross_entropy_with_logits(y, labels.float()),
}


def real(*shape, dtype=torch.float32):
    return torch.randn(shape, dtype=dtype)


def classes(*shape):
    return torch.randint(4, shape).int()


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize(
    "problem, outputs, leading, labels",
    [
        ("regression", 1, (6,), partial(real, 6, 1)),
        ("regression", 1, (6,), partial(real, 6)),
        ("regression", 2, (4, 6), partial(real, 4, 6, 2, dtype=torch.float64)),
        ("single_label_classification", 4, (6,), partial(classes, 6)),
        ("single_label_classification", 4, (2, 3), partial(classes, 2, 3)),
        ("single_label_classification", 4, (), classes),
        ("multi_label_classification", 4, (6,), lambda: torch.rand(6, 4) > 0.5),
    ],
)
def test_the_loss_is_that_of_the_problem(problem, outputs, leading, labels, named):
    labels = labels()
    guessed = not named and outputs != 2  # floats for several outputs need a name
    model = KANModel(KANConfig(widths=(3, outputs), problem_type=None if guessed else problem))
    x = torch.randn(*leading, 3)

    output = model(x, labels=labels)
    loss, logits = model(x, labels, return_dict=False)

    torch.testing.assert_close(output.loss, LOSSES[problem](output.logits, labels))
    assert_equal(loss, output.loss)
    assert_equal(logits, output.logits)
    assert list(model(x).keys()) == ["logits"]


@pytest.mark.parametrize(
    "problem, labels, message",
    [
        (None, torch.randn(6, 4), "float32 for several outputs do not tell it"),
        (None, torch.zeros(6, 1, dtype=torch.long), r"labels have shape \(6, 1\).* expects \(6,\)"),
        ("regression", torch.randn(6), r"labels have shape \(6,\).* expects \(6, 4\)"),
        ("ranking", torch.randn(6), "`config.problem_type` is 'ranking'"),
    ],
)
def test_labels_that_do_not_fit_are_refused(problem, labels, message):
    model = KANModel(KANConfig(widths=(3, 4)))
    model.config.problem_type = problem

    with refused(message):
        model(torch.randn(6, 3), labels=labels)


def test_a_model_is_trained_evaluated_and_saved_by_the_trainer(tmp_path):
    model = KANModel(KANConfig(widths=(3, 5, 2)))
    weights = model.kan.layers[0].spline_weight.clone()
    data = [{"inputs": x, "labels": (x[0] > 0).long()} for x in torch.randn(16, 3)]
    options = {"max_steps": 2, "per_device_train_batch_size": 8, "report_to": [], "use_cpu": True}
    arguments = TrainingArguments(output_dir=str(tmp_path), **options)
    trainer = Trainer(model=model, args=arguments, train_dataset=data, eval_dataset=data)

    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))

    assert not torch.equal(model.kan.layers[0].spline_weight, weights)
    assert trainer.evaluate()["eval_loss"] > 0
    assert trainer.predict(data).predictions.shape == (16, 2)
    assert_same_state(KANModel.from_pretrained(tmp_path / "saved"), model)


MODELS = [
    lambda: KAN([2, 3, 1]),
    lambda: SlimKAN([2, 3, 1], (1, 2, 2)),
    lambda: KANModel(KANConfig([2, 3, 1])).kan,
]


@pytest.mark.parametrize("make", MODELS)
def test_models_name_the_public_module_and_are_copied(make):
    model, x = make(), torch.rand(5, 2)

    assert type(model).__module__ == "peft_lotra.kan"
    for copied in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert_equal(copied(x), model(x))


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
    assert_equal(loaded(x).logits, model(x).logits)
