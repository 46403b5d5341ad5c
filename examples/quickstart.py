# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Quickstart: a KAN that reads digits learns new scans from 200 labels.

    python examples/quickstart.py
    # push the adapter to the Hugging Face Hub, its base to REPO-base
    python examples/quickstart.py --push USER/REPO

The scans are scikit-learn's digits (1,797 real ones, 8x8 pixels). A base model
is trained on them as they are. Then the scanner changes: scans come rotated by
30 degrees and noisy, and only 200 of them have labels. The base model is
adapted by LoTRA, by full fine-tuning, and by PEFT's own LoRA on the same
tensors. Finally the adapter is saved, loaded into a fresh base, exchanged with
an adapter for a third kind of scans (negatives), and merged.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import time
from pathlib import Path


try:
    import matplotlib
    from scipy.ndimage import rotate
    from sklearn.datasets import load_digits
    from tqdm import tqdm
except ModuleNotFoundError as error:
    raise SystemExit(
        f"quickstart.py: error: {error.name} is not installed: "
        'pip install -e ".[examples]"'
    ) from None

import numpy as np
import torch
from huggingface_hub import EvalResult
from peft import LoraConfig, PeftModel, get_peft_model
from rich.console import Console
from rich.table import Table

from peft_lotra import LoTRAConfig, push_to_hub, start_from_gradient
from peft_lotra.kan import KAN, KANConfig, KANModel
from peft_lotra.optim import create_lotra_optimizer
from peft_lotra.plotting import plot_edge_functions


matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402


torch.set_num_threads(1)  # additional threads slow down such small matrices

WIDTHS = [64, 32, 10]
LABELS = 200  # of the new kind of scans
TEST = 597  # scans of either kind that no model is trained on

# The adapted layers, and the best learning rate of 5e-3, 1e-2, 2e-2 and 3e-2
LOTRA = LoTRAConfig(r=(16, 16, 6))
LORA = LoraConfig(
    r=2,
    lora_alpha=2,
    target_modules=[],
    target_parameters=["layers.0.spline_weight", "layers.1.spline_weight"],
)
LEARNING_RATES = {"LoTRA": 1e-2, "full fine-tuning": 1e-2, "PEFT LoRA": 1e-2}


def scan(kind: str, images: np.ndarray, seed: int) -> torch.Tensor:
    """What a scanner makes of images (N, 8, 8), 0 to 16: (N, 64), -1 to 1."""
    noise = np.random.default_rng(seed).normal(0, 2, images.shape)
    if kind == "rotated":
        images = rotate(images, 30, axes=(1, 2), reshape=False, order=1) + noise
    elif kind == "negative":
        images = 16 - images + noise
    return torch.tensor(
        images.clip(0, 16) / 8 - 1, dtype=torch.float32
    ).flatten(1)


def adam(model, lr: float) -> torch.optim.Optimizer:
    return torch.optim.Adam(
        [p for p in model.parameters() if p.requires_grad], lr=lr
    )


def train(
    model,
    x,
    y,
    steps: int,
    optimizer: torch.optim.Optimizer,
    bar: tqdm,
    name: str,
) -> float:
    """Trains the model on batches of 128 and returns the seconds."""
    start = time.perf_counter()
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    model.train()
    bar.set_description(name)
    for _ in range(steps):
        rows = torch.randint(len(x), (128,))
        loss = torch.nn.functional.cross_entropy(model(x[rows]), y[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        bar.update()
    model.eval()
    return time.perf_counter() - start


@torch.no_grad()
def accuracy(model, x, y) -> float:
    return 100 * (model(x).argmax(1) == y).float().mean().item()


def count(model) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def adapt(
    base: KAN, x, y, steps: int, bar: tqdm, name: str = "LoTRA"
) -> tuple[PeftModel, float]:
    """The main job: an adapter for the scans x with the labels y."""
    model = get_peft_model(copy.deepcopy(base), LOTRA)
    start_from_gradient(
        model, lambda: torch.nn.functional.cross_entropy(model(x), y)
    )
    optimizer = create_lotra_optimizer(
        model, torch.optim.Adam, lr=LEARNING_RATES["LoTRA"]
    )
    return model, train(model, x, y, steps, optimizer, bar, name)


def compare(seed: int, images, labels, args, bar) -> dict:
    """Trains a base and adapts it in each way.

    Returns accuracies on rotated scans, parameters and seconds.
    """
    torch.manual_seed(seed)
    order = np.random.default_rng(seed).permutation(len(images))
    test, seen = order[:TEST], order[TEST:]
    y = torch.tensor(labels)
    plain, rotated = (scan(kind, images, seed) for kind in ("plain", "rotated"))
    few = seen[:LABELS]

    base = KAN(WIDTHS)
    train(
        base,
        plain[seen],
        y[seen],
        2 * args.steps,
        adam(base, 5e-3),
        bar,
        "base model",
    )
    rows = {
        "base, not adapted": (accuracy(base, rotated[test], y[test]), 0, 0.0)
    }

    lotra, seconds = adapt(base, rotated[few], y[few], args.steps, bar)
    rows["LoTRA"] = (
        accuracy(lotra, rotated[test], y[test]),
        count(lotra),
        seconds,
    )

    for name in ("full fine-tuning", "PEFT LoRA"):
        model = copy.deepcopy(base)
        if name == "PEFT LoRA":
            model = get_peft_model(model, LORA)
        seconds = train(
            model,
            rotated[few],
            y[few],
            args.steps,
            adam(model, LEARNING_RATES[name]),
            bar,
            name,
        )
        rows[name] = (
            accuracy(model, rotated[test], y[test]),
            count(model),
            seconds,
        )
    return {
        "rows": rows,
        "base": base,
        "lotra": lotra,
        "test": test,
        "few": few,
        "labels": y,
    }


def show_table(
    console: Console, runs: list[dict]
) -> dict[str, tuple[float, float, float]]:
    """Prints the means over the runs, and returns them."""
    table = Table(
        title=f"Rotated scans, {LABELS} labels, mean of {len(runs)} seeds"
    )
    table.add_column("")
    for column in (
        "accuracy %",
        "seeds",
        "trainable parameters",
        "% of full",
        "seconds",
    ):
        table.add_column(column, justify="right")
    means = {
        name: tuple(np.mean([run["rows"][name] for run in runs], axis=0))
        for name in runs[0]["rows"]
    }
    full = means["full fine-tuning"][1]
    for name, (mean, parameters, seconds) in means.items():
        seeds = " ".join(f"{run['rows'][name][0]:.1f}" for run in runs)
        share = f"{100 * parameters / full:.1f}" if parameters else "-"
        table.add_row(
            name,
            f"{mean:.1f}",
            seeds,
            f"{parameters:,.0f}",
            share,
            f"{seconds:.1f}" if parameters else "-",
        )
    console.print(table)
    return means


def save_switch_merge(console: Console, run: dict, images, args) -> None:
    """Saves the adapter, loads it, switches it with another, merges it."""
    base, lotra, second, y, test = (
        run[key] for key in ("base", "lotra", "second", "labels", "test")
    )
    scans = {kind: scan(kind, images, 0) for kind in ("rotated", "negative")}
    if args.push:
        push(
            args.push,
            base,
            lotra,
            accuracy(lotra, scans["rotated"][test], y[test]),
        )
        source = args.push
    else:
        source = args.output / "rotated"
        lotra.save_pretrained(source)
    second.save_pretrained(args.output / "negative")

    model = PeftModel.from_pretrained(
        copy.deepcopy(base), source, adapter_name="rotated"
    )
    model.load_adapter(args.output / "negative", adapter_name="negative")
    x = scans["rotated"][test]
    console.print(
        f"\nreloaded into a fresh base: largest difference "
        f"{(model(x) - lotra(x)).abs().max():.1e}"
    )

    table = Table(title="Two adapters on one base, accuracy %")
    table.add_column("active adapter")
    for kind in scans:
        table.add_column(f"{kind} scans", justify="right")
    for adapter in scans:
        model.set_adapter(adapter)
        table.add_row(
            adapter,
            *(
                f"{accuracy(model, s[test], y[test]):.1f}"
                for s in scans.values()
            ),
        )
    console.print(table)

    model.set_adapter("rotated")
    before = model(x)
    merged = model.merge_and_unload()
    console.print(
        f"merged: a {type(merged).__name__} with {count(merged):,} "
        f"parameters again, "
        f"largest difference {(merged(x) - before).abs().max():.1e}"
    )
    if not args.push:
        size = (source / "adapter_model.safetensors").stat().st_size
        whole = sum(p.numel() * p.element_size() for p in base.parameters())
        console.print(
            f"adapter file: {size / 1000:.1f} kB "
            f"(the whole model: {whole / 1000:.0f} kB), in {source}"
        )


def push(repo: str, base: KAN, lotra: PeftModel, percent: float) -> None:
    """Pushes the base, for transformers, and the adapter; its card has both."""
    model = KANModel(
        KANConfig(widths=WIDTHS, problem_type="single_label_classification")
    )
    model.kan.load_state_dict(base.state_dict())
    model.push_to_hub(f"{repo}-base")
    push_to_hub(
        lotra,
        repo,
        base_model=f"{repo}-base",
        base_code="from peft_lotra.kan import KANModel\n\n"
        f'base = KANModel.from_pretrained("{repo}-base").kan',
        metrics=[
            EvalResult(
                task_type="image-classification",
                dataset_type="scikit-learn/digits",
                dataset_name="scikit-learn's digits, "
                "rotated by 30 degrees and noisy",
                metric_type="accuracy",
                metric_value=round(percent / 100, 3),
            )
        ],
    )


def draw(runs: list[dict], means: dict, images, path: Path) -> None:
    """Draws changed scans, predictions, and functions before and after."""
    run = runs[0]
    base, lotra, test, y = run["base"], run["lotra"], run["test"], run["labels"]
    rotated = scan("rotated", images, 0)
    with torch.no_grad():
        guesses = {
            "base": base(rotated[test]).argmax(1),
            "LoTRA": lotra(rotated[test]).argmax(1),
        }

    figure = plt.figure(figsize=(12, 8.4), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=[0.95, 1.25])
    axes = top.subplots(2, 10)
    for digit in range(10):
        i = int(np.flatnonzero(y[test].numpy() == digit)[0])
        for row, image in zip(
            axes[:, digit], (scan("plain", images, 0), rotated), strict=True
        ):
            row.imshow(image[test[i]].view(8, 8), cmap="Greys")
            row.set(xticks=[], yticks=[])
        colors = {
            name: "tab:green" if guess[i] == digit else "tab:red"
            for name, guess in guesses.items()
        }
        texts = {
            name: f"{name}: {guess[i]}{'' if guess[i] == digit else ' ✗'}"
            for name, guess in guesses.items()
        }
        axes[1, digit].set_xlabel(
            texts["LoTRA"], color=colors["LoTRA"], fontsize=11
        )
        axes[1, digit].set_title(
            texts["base"], color=colors["base"], fontsize=11
        )
    axes[0, 0].set_ylabel("trained on")
    axes[1, 0].set_ylabel("now coming in")
    top.suptitle("The scanner changes, and the base model fails", fontsize=13)

    left, right = bottom.subfigures(1, 2, width_ratios=[1, 1.15])
    axis = left.subplots()
    colors = {
        "LoTRA": "tab:green",
        "full fine-tuning": "tab:blue",
        "PEFT LoRA": "tab:orange",
    }
    # positions at which labels hide neither each other nor the points
    places = {
        "LoTRA": (0, 14, "bottom"),
        "full fine-tuning": (0, -14, "top"),
        "PEFT LoRA": (0, -14, "top"),
    }
    for name, color in colors.items():
        dx, dy, vertical = places[name]
        values = [r["rows"][name][0] for r in runs]
        parameters = means[name][1]
        axis.scatter(
            [parameters] * len(values), values, color=color, alpha=0.35, s=25
        )
        axis.scatter(
            [parameters], [means[name][0]], color=color, s=110, zorder=3
        )
        axis.annotate(
            f"{name}\n{means[name][0]:.1f} %, {parameters:,.0f}",
            (parameters, max(values) if vertical == "bottom" else min(values)),
            xytext=(dx, dy),
            textcoords="offset points",
            ha="center",
            va=vertical,
            color=color,
            fontsize=10,
        )
    low = min(means[name][0] for name in colors)
    axis.set(
        xscale="log",
        xlim=(500, 70_000),
        ylim=(low - 12, 100),
        xlabel="trainable parameters",
    )
    axis.set(
        ylabel="accuracy on rotated scans, % "
        f"(base: {means['base, not adapted'][0]:.0f})"
    )
    axis.grid(alpha=0.25)
    left.suptitle(f"Adapting it with {LABELS} labels", fontsize=13)

    plot_edge_functions(
        lotra,
        "layers.0",
        inputs=[f"pixel ({i // 8}, {i % 8})" for i in range(64)],
        figure=right,
    )
    right.suptitle(
        "The edge functions that the adapter changed most", fontsize=13
    )
    figure.savefig(path, dpi=110)


def main() -> None:
    epilog = (
        'needs:  pip install -e ".[examples]"\n'
        "takes:  half a minute on two cores, no network\n"
        "writes: quickstart.png, quickstart.json and two adapters, to --output"
    )
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS,  # an error is one line
        description=__doc__,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--seeds",
        type=int,
        default=3,
        help="how many runs the table averages (default: 3)",
    )
    parser.add_argument(
        "--steps",
        type=int,
        default=300,
        help="training steps of each adaptation (default: 300)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path(__file__).parent / "output",
        help="folder for the results",
    )
    parser.add_argument(
        "--push",
        metavar="USER/REPO",
        help="push the adapter to the Hub instead of saving it",
    )
    args = parser.parse_args()
    try:
        args.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--output {args.output}: {error.strerror}")
    if not os.access(args.output, os.W_OK):
        parser.error(f"--output {args.output}: no permission to write")
    if args.seeds < 1 or args.steps < 1:
        parser.error("--seeds and --steps must be at least 1")

    images, labels = load_digits(return_X_y=True)
    images = images.reshape(-1, 8, 8)
    console = Console(width=100)
    bar = tqdm(total=args.steps * (5 * args.seeds + 1), unit="step", ncols=100)
    runs = [
        compare(seed, images, labels, args, bar) for seed in range(args.seeds)
    ]
    # before a table is printed, which would break the progress bar
    run = runs[0]
    few = run["few"]
    run["second"], _ = adapt(
        run["base"],
        scan("negative", images, 0)[few],
        run["labels"][few],
        args.steps,
        bar,
        "second adapter",
    )
    bar.close()
    means = show_table(console, runs)
    rows = {name: [run["rows"][name] for run in runs] for name in means}
    (args.output / "quickstart.json").write_text(
        json.dumps({"steps": args.steps, "rows": rows}, indent=1) + "\n"
    )
    save_switch_merge(console, run, images, args)
    draw(runs, means, images, args.output / "quickstart.png")
    console.print(f"picture: {args.output / 'quickstart.png'}")


if __name__ == "__main__":
    main()
