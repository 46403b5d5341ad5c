# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Trainer of transformers ends with the best adapter; `examples/test_libraries.py` kills and resumes it."""

import torch
from helpers import assert_equal
from peft import PeftModel, get_peft_model
from torch import nn
from torch.nn.functional import mse_loss
from transformers import Trainer, TrainingArguments

from peft_lotra import LoTRAConfig, create_lotra_optimizer
from peft_lotra.kan import KAN


X = torch.linspace(-0.9, 0.9, 48).view(16, 3)
DATA = [{"inputs": x, "labels": x.prod()} for x in X]
OPTIONS = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "remove_unused_columns": False}
OPTIONS |= {"max_steps": 4, "save_steps": 2, "per_device_train_batch_size": 8}


class Regression(nn.Module):
    """A KAN with the loss that Trainer asks for."""

    def __init__(self):
        super().__init__()
        self.kan = KAN([3, 4, 1])

    def forward(self, inputs, labels=None):
        y = self.kan(inputs).squeeze(-1)
        return {"logits": y} if labels is None else {"loss": mse_loss(y, labels), "logits": y}


def kan():
    torch.manual_seed(3)
    return Regression()


def trainer(folder, config=None, **options):
    model = get_peft_model(kan(), config or LoTRAConfig(r=2))
    optimizer = create_lotra_optimizer(model, torch.optim.AdamW, lr=1e-2, other_lr=1e-4)
    options = {"args": TrainingArguments(str(folder), **OPTIONS, **options), "optimizers": (optimizer, None)}
    return Trainer(model=model, train_dataset=DATA, eval_dataset=DATA, **options)


def loaded(folder):
    return PeftModel.from_pretrained(kan(), folder).eval()(X)["logits"]


def test_the_best_model_at_the_end(tmp_path):
    # the best is here the one with the largest loss, which is not the last
    best = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": True}
    run = trainer(tmp_path, eval_strategy="steps", eval_steps=2, **best)
    run.train()

    assert run.state.best_model_checkpoint.endswith("checkpoint-2")

    y = run.model.eval()(X)["logits"]

    assert_equal(loaded(tmp_path / "checkpoint-2"), y)
    assert not torch.equal(loaded(tmp_path / "checkpoint-4"), y)


def test_trainer_keeps_the_rate_of_other_parameters(tmp_path):
    config = LoTRAConfig(r=2, target_modules=["kan.layers.0"], modules_to_save=["kan.layers.1"])
    run = trainer(tmp_path, config, lr_scheduler_type="constant")

    run.train()

    rates = {group["name"]: group["lr"] for group in run.optimizer.param_groups}
    assert rates["core"] == 1e-2
    assert rates["other"] == 1e-4
