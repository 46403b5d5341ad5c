# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""A KAN that predicts the progression of diabetes for one group of patients is adapted to another, by Trainer.

Shown in docs/training.md.

    python examples/studies/finetune_trainer.py  # a minute or two on two cores, no network
    python examples/studies/finetune_trainer.py --resume  # continues an interrupted run

The data are scikit-learn's diabetes patients (442 real ones; age, body mass index, blood pressure and six blood
values; the disease's progression after a year). A KAN is trained on the patients of one sex, and adapted to those
of the other: by LoTRA with a learning rate per component, and for comparison by full fine-tuning, and from scratch.
All of it runs through transformers.Trainer: evaluation, early stopping, checkpoints that hold the adapter only, and a
resume that continues bit for bit.
"""

from __future__ import annotations

from study_tools import command_line  # isort: split


import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_model
from sklearn.datasets import load_diabetes
from sklearn.metrics import r2_score
from study_tools import files
from torch import nn
from torch.utils.data import TensorDataset
from tqdm import tqdm
from transformers import (
    EarlyStoppingCallback,
    EvalPrediction,
    PrinterCallback,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.utils import logging

from peft_lotra import LoTRAConfig, create_lotra_optimizer
from peft_lotra.kan import KAN


torch.set_num_threads(1)  # additional threads slow down such small matrices

LOTRA = LoTRAConfig(r=2)
METHODS = ("LoTRA", "full fine-tuning", "from scratch")
# of the last three, the best of 1e-3, 3e-3, 1e-2 and 3e-2 on the evaluation patients of splits 100 to 103
LEARNING_RATES = {"base": 3e-3, "LoTRA": 1e-2, "full fine-tuning": 1e-3, "from scratch": 3e-3}
TARGET_MEAN, TARGET_STD = 152.0, 77.0  # of the progression, over all patients


def load_patients(seed: int) -> dict[str, dict[str, TensorDataset]]:
    """The patients of both groups in three parts each: {"source" or "target": {"train", "eval" or "test": data}}."""
    data = load_diabetes(scaled=False)
    sex = data.data[:, data.feature_names.index("sex")]
    features = np.delete(data.data, data.feature_names.index("sex"), axis=1)
    source = sex == 1
    # in units of three standard deviations of the source, so that nearly all values lie on the grid
    x = (features - features[source].mean(0)) / features[source].std(0) / 3
    x = torch.tensor(x.clip(-1.5, 1.5), dtype=torch.float32)
    y = torch.tensor((data.target - TARGET_MEAN) / TARGET_STD, dtype=torch.float32)
    groups = {}
    # few patients of the target group have a known progression
    for name, rows, share in (("source", np.flatnonzero(source), 0.6), ("target", np.flatnonzero(~source), 0.2)):
        rows = np.random.default_rng(seed).permutation(rows)
        parts = np.split(rows, [int(share * len(rows)), int((share + 0.2) * len(rows))])
        groups[name] = {
            part: TensorDataset(x[index], y[index])
            for part, index in zip(("train", "eval", "test"), parts, strict=True)
        }
    return groups


class Regression(nn.Module):
    """A KAN whose outputs include the loss, which Trainer asks for."""

    def __init__(self) -> None:
        super().__init__()
        self.kan = KAN([9, 8, 1], grid_size=3, grid_range=(-1.5, 1.5))

    def forward(self, inputs: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        logits = self.kan(inputs).squeeze(-1)
        if labels is None:
            return {"logits": logits}
        return {"loss": nn.functional.mse_loss(logits, labels), "logits": logits}


def collate(rows: list[tuple[torch.Tensor, torch.Tensor]]) -> dict[str, torch.Tensor]:
    inputs, labels = zip(*rows, strict=True)
    return {"inputs": torch.stack(inputs), "labels": torch.stack(labels)}


def metrics(prediction: EvalPrediction) -> dict[str, float]:
    """Root mean squared error, in units of the progression, and the share of its variance that is explained."""
    guess, truth = np.ravel(prediction.predictions), np.ravel(prediction.label_ids)
    return {"rmse": float(TARGET_STD * np.sqrt(np.mean((guess - truth) ** 2))), "r2": float(r2_score(truth, guess))}


def last_whole_checkpoint(folder: Path) -> Path | None:
    """The last complete checkpoint; removes incomplete ones, which lack the state that Trainer writes last."""
    checkpoints = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    while checkpoints:
        try:
            json.loads((checkpoints[-1] / "trainer_state.json").read_text())
            return checkpoints[-1]
        except (OSError, ValueError):
            shutil.rmtree(checkpoints.pop())
    return None


def run(name: str, make: Callable[[], nn.Module], data: dict, folder: Path, seed: int, args, bar: tqdm) -> dict:
    """Train a model by Trainer with early stopping on the evaluation patients, and return its results.

    A resume reads finished results from `folder`, and continues an unfinished training from its last checkpoint.
    """
    finished = folder / "result.json"
    bar.set_description(f"split {seed}, {name}")
    bar.update()
    if args.resume and finished.exists():
        return json.loads(finished.read_text())
    if not args.resume:
        shutil.rmtree(folder, ignore_errors=True)
    set_seed(seed)
    model = make()
    if isinstance(model, PeftModel):
        optimizer = create_lotra_optimizer(model, torch.optim.AdamW, lr=LEARNING_RATES[name], weight_decay=0.0)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATES[name], weight_decay=0.01)
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=args.steps,
        per_device_train_batch_size=32,
        per_device_eval_batch_size=256,
        lr_scheduler_type="cosine",
        eval_strategy="steps",
        save_strategy="steps",
        eval_steps=args.every,
        save_steps=args.every,
        logging_steps=args.every,
        save_total_limit=2,  # the best one, and the last one to resume from
        load_best_model_at_end=True,
        metric_for_best_model="rmse",
        greater_is_better=False,
        restore_callback_states_from_checkpoint=True,  # the count of early stopping
        label_names=["labels"],
        report_to="none",
        disable_tqdm=True,  # replaced by one bar for all runs
        dataloader_pin_memory=torch.cuda.is_available(),
        seed=seed,
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        data_collator=collate,
        train_dataset=data["train"],
        eval_dataset=data["eval"],
        compute_metrics=metrics,
        optimizers=(optimizer, None),
        callbacks=[EarlyStoppingCallback(early_stopping_patience=args.patience)],
    )
    trainer.remove_callback(PrinterCallback)
    checkpoint = last_whole_checkpoint(folder) if args.resume else None
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    test = trainer.predict(data["test"])
    trainer.save_model(str(folder / "best"))
    result = {
        "rmse": test.metrics["test_rmse"],
        "r2": test.metrics["test_r2"],
        "trainable": sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
        "steps": trainer.state.global_step,
        "losses": [(line["step"], line["loss"]) for line in trainer.state.log_history if "loss" in line],
    }
    files.replace(finished, result)
    return result


def compare(seed: int, args, bar: tqdm) -> dict[str, dict]:
    """Train a base for the source patients, and three models for the target patients."""
    groups = load_patients(seed)
    folder = args.output / f"seed{seed}"

    def base() -> Regression:
        model = Regression()
        load_model(model, folder / "base" / "best" / "model.safetensors")
        return model

    results = {"base": run("base", Regression, groups["source"], folder / "base", seed, args, bar)}
    makers = {
        "LoTRA": lambda: get_peft_model(base(), copy.deepcopy(LOTRA)),
        "full fine-tuning": base,
        "from scratch": Regression,
    }
    for name in METHODS:
        place = folder / name.replace(" ", "-")
        results[name] = run(name, makers[name], groups["target"], place, seed, args, bar)

    x, y = groups["target"]["test"].tensors
    with torch.no_grad():
        guess = base().eval()(x)["logits"].numpy()
    results["base, not adapted"] = metrics(EvalPrediction(guess, y.numpy())) | {"trainable": 0}
    return results


def show(runs: list[dict]) -> None:
    print(f"error (RMSE) on patients of the other sex, mean of {len(runs)} splits")
    for name in ("base, not adapted", *METHODS):
        errors = [run[name]["rmse"] for run in runs]
        print(f"{name:18} {np.mean(errors):5.1f}  {runs[0][name]['trainable']:6,} trained parameters")


def main(arguments: list[str] | None = None) -> None:
    parser = command_line.Parser(
        __doc__,
        takes="a minute or two on two cores",
        writes="results.json, checkpoints and adapters",
        folder=command_line.OUTPUT / "trainer",
    )
    parser.add_argument("--splits", type=int, default=5, help="how many random splits of the patients (default: 5)")
    parser.add_argument("--steps", type=int, default=400, help="most steps of each training (default: 400)")
    parser.add_argument("--every", type=int, default=20, help="steps between checkpoints (default: 20)")
    parser.add_argument("--patience", type=int, default=6, help="evaluations without a gain (default: 6)")
    parser.add_argument("--resume", action="store_true", help="go on with what is in the output folder")
    args = parser.parse_args(arguments)
    if not args.resume:
        (args.output / "results.json").unlink(missing_ok=True)
    logging.disable_progress_bar()  # of the files that transformers reads and writes
    with tqdm(total=args.splits * (1 + len(METHODS)), unit="run", ncols=100) as bar:
        runs = [compare(seed, args, bar) for seed in range(args.splits)]
    files.replace(args.output / "results.json", runs)
    show(runs)
    print(f"the first adapter: {args.output / 'seed0' / 'LoTRA' / 'best'}")


if __name__ == "__main__":
    main()
