# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""A KAN that predicts the progression of diabetes for one group of patients is adapted to another, by Trainer.

    python examples/studies/finetune_trainer.py  # a minute or two on two cores, no network
    python examples/studies/finetune_trainer.py --resume  # continues an interrupted run

The data are scikit-learn's diabetes patients (442 real ones; age, body mass index, blood pressure and six blood
values; the disease's progression after a year). A KANModel is trained on the patients of one sex, and adapted to those
of the other: by LoTRA with a learning rate per component, and for comparison by full fine-tuning, and from scratch.
All of it runs through transformers.Trainer: evaluation, early stopping, checkpoints that hold the adapter only,
logging to Trackio or TensorBoard if one of them is installed, and a resume that continues bit for bit.
"""

from __future__ import annotations

from study_tools import command_line  # isort: split


import copy
import json
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import matplotlib
import numpy as np
import torch
from peft import PeftModel, get_peft_model
from rich.console import Console
from rich.table import Table
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
from peft_lotra.kan import KANConfig, KANModel
from peft_lotra.plotting import plot_edge_functions


matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402


torch.set_num_threads(1)  # additional threads slow down such small matrices

KAN = {"widths": [9, 8, 1], "grid_size": 3, "grid_range": (-1.5, 1.5), "problem_type": "regression"}
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


def collate(rows: list[tuple[torch.Tensor, torch.Tensor]]) -> dict[str, torch.Tensor]:
    inputs, labels = zip(*rows, strict=True)
    return {"inputs": torch.stack(inputs), "labels": torch.stack(labels)}


def metrics(prediction: EvalPrediction) -> dict[str, float]:
    """Root mean squared error, in units of the progression, and the share of its variance that is explained."""
    guess, truth = np.ravel(prediction.predictions), np.ravel(prediction.label_ids)
    return {"rmse": float(TARGET_STD * np.sqrt(np.mean((guess - truth) ** 2))), "r2": float(r2_score(truth, guess))}


def loggers() -> list[str]:
    return [name for name in ("trackio", "tensorboard") if find_spec(name)][:1] or ["none"]


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
    """Trains a model by Trainer with early stopping on the evaluation patients, and returns its results.

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
        report_to=loggers(),
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
        "predictions": np.ravel(test.predictions).tolist(),
        "losses": [(line["step"], line["loss"]) for line in trainer.state.log_history if "loss" in line],
        "evaluations": [
            (line["step"], line["eval_rmse"]) for line in trainer.state.log_history if "eval_rmse" in line
        ],
    }
    files.replace(finished, result)
    return result


def compare(seed: int, args, bar: tqdm) -> dict[str, dict]:
    """Trains a base for the source patients, and three models for the target patients."""
    groups = load_patients(seed)
    folder = args.output / f"seed{seed}"

    def new() -> KANModel:
        return KANModel(KANConfig(**KAN))

    def base() -> KANModel:
        return KANModel.from_pretrained(folder / "base" / "best")

    results = {"base": run("base", new, groups["source"], folder / "base", seed, args, bar)}
    makers = {
        "LoTRA": lambda: get_peft_model(base(), copy.deepcopy(LOTRA)),
        "full fine-tuning": base,
        "from scratch": new,
    }
    for name in METHODS:
        place = folder / name.replace(" ", "-")
        results[name] = run(name, makers[name], groups["target"], place, seed, args, bar)

    x, y = groups["target"]["test"].tensors
    with torch.no_grad():
        guess = base()(x).logits[:, 0].numpy()
    results["base, not adapted"] = {
        **metrics(EvalPrediction(guess, y.numpy())),
        "trainable": 0,
        "steps": 0,
        "predictions": guess.tolist(),
    }
    return results


def show_table(console: Console, runs: list[dict]) -> None:
    table = Table(title=f"Patients of the other sex, mean of {len(runs)} splits")
    table.add_column("")
    for column in ("error (RMSE)", "splits", "variance explained", "trained parameters", "steps"):
        table.add_column(column, justify="right")
    for name in ("base, not adapted", *METHODS):
        rows = [run[name] for run in runs]
        mean = {key: np.mean([row[key] for row in rows]) for key in ("rmse", "r2", "steps")}
        table.add_row(
            name,
            f"{mean['rmse']:.1f}",
            " ".join(f"{row['rmse']:.0f}" for row in rows),
            f"{100 * mean['r2']:.0f} %",
            f"{rows[0]['trainable']:,}" if rows[0]["trainable"] else "-",
            f"{mean['steps']:.0f}" if rows[0]["trainable"] else "-",
        )
    console.print(table)


def draw(runs: list[dict], args) -> None:
    """Draws the training, the predictions before and after it, and the functions before and after it."""
    colors = {"LoTRA": "tab:green", "full fine-tuning": "tab:blue", "from scratch": "tab:orange"}
    figure = plt.figure(figsize=(14, 4.6), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=[1.45, 1])
    course, scatter = left.subplots(1, 2)
    first = runs[0]
    for name, color in colors.items():
        steps, errors = zip(*first[name]["evaluations"], strict=True)
        course.plot(steps, errors, color=color, label=name)
    course.set(xlabel="step", ylabel="error (RMSE) on evaluation patients", title="Until early stopping")
    course.legend()
    course.grid(alpha=0.25)
    truth = TARGET_MEAN + TARGET_STD * load_patients(0)["target"]["test"].tensors[1].numpy()
    for name, color in (("base, not adapted", "tab:gray"), ("LoTRA", "tab:green")):
        guess = TARGET_MEAN + TARGET_STD * np.array(first[name]["predictions"])
        scatter.scatter(truth, guess, s=14, alpha=0.7, color=color, label=f"{name}: {first[name]['rmse']:.1f}")
    ends = (truth.min(), truth.max())
    scatter.plot(ends, ends, color="black", linewidth=0.8)
    scatter.set(xlabel="progression", ylabel="prediction", title="Test patients of the other sex")
    scatter.legend(title="RMSE")
    scatter.grid(alpha=0.25)
    folder = args.output / "seed0"
    model = PeftModel.from_pretrained(KANModel.from_pretrained(folder / "base" / "best"), folder / "LoTRA" / "best")
    names = [name for name in load_diabetes().feature_names if name != "sex"]
    plot_edge_functions(model, "kan.layers.0", inputs=names, figure=right)
    right.suptitle("The edge functions that the adapter changed most")
    figure.savefig(args.output / "finetune_trainer.png", dpi=110)


def main(arguments: list[str] | None = None) -> None:
    parser = command_line.Parser(
        __doc__,
        takes="a minute or two on two cores",
        writes="results.json, finetune_trainer.png, checkpoints and adapters",
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
    console = Console(width=110)
    show_table(console, runs)
    adapter = args.output / "seed0" / "LoTRA" / "best" / "adapter_model.safetensors"
    console.print(f"adapter: {adapter.stat().st_size / 1000:.1f} kB, in {adapter.parent}")
    draw(runs, args)
    console.print(f"picture: {args.output / 'finetune_trainer.png'}")


if __name__ == "__main__":
    main()
