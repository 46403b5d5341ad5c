# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Low-rank evidence: full fine-tuning changes the coefficient tensors of KANs by updates of low tensor rank.

    python examples/studies/low_rank_evidence.py  # about two minutes on one core, no network
    python examples/studies/low_rank_evidence.py --data-dir PATH/TO/mnist  # one more task: digits to MNIST at 8x8

On each task a KAN is trained, and then all of its parameters are fine-tuned on changed data. The script prints the
share of the energy (squared norm) that tensor ranks (4, 4, 4) keep, of the update and of a random update of its size.
Then an adapter of a fifth of the parameters is extracted from the fine-tuned model, for KANs of three libraries, from
the coefficients alone and with the inputs of the fine-tuning. The adapter is tested at once and after 50 more steps.
The folder of --data-dir holds images-idx3-ubyte.gz and labels-idx1-ubyte.gz. Writes low_rank_evidence.json and .png.
"""

from __future__ import annotations

from study_tools import command_line  # isort: split


import copy
import json
import warnings
from pathlib import Path

import matplotlib
import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from study_tools.tasks import Task, build, diabetes, digits_to_mnist, function_family, rotated_digits, score, train
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

from peft_lotra.approximation.extraction import extract_lotra
from peft_lotra.approximation.spectra import LayerSpectrum, Spectrum, spectrum_of, update_spectrum


matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402


torch.set_num_threads(1)  # additional threads slow down such small matrices

RANKS = (4, 4, 4)
SHARE = 0.2  # the parameters of an extracted adapter, as a share of the coefficients
MORE_STEPS, MORE_LR = 50, 3e-4  # the training of an extracted adapter


def random_update(spectrum: Spectrum) -> Spectrum:
    """The control: normal random updates, of the same norm in each layer."""
    layers = {}
    for name, layer in spectrum.layers.items():
        tensor = torch.randn(layer.shape, dtype=torch.float64)
        layers[name] = spectrum_of(tensor * layer.norm / tensor.norm())
    return Spectrum(layers)


def fine_tune(library: str, task: Task, seed: int, steps: int, bar: tqdm) -> tuple[nn.Module, nn.Module]:
    """The base model and the fine-tuned one."""
    torch.manual_seed(seed)
    bar.set_description(f"{task.name}, {library}")
    base = build(library, task.widths)
    base = train(base, task, task.before, 2 * steps, 5e-3, bar)
    return base, train(copy.deepcopy(base), task, task.after, steps, 1e-2, bar)


def extract(base: nn.Module, tuned: nn.Module, task: Task, steps: int, bar: tqdm) -> dict[str, float]:
    """The scores of the base, the tuned model, and the extracted adapter: without data, with the inputs that the tuned
    model was trained on, and that one after more training."""
    coefficients = sum(np.prod(layer.shape) for layer in update_spectrum(base, tuned).layers.values())
    scores = {"base": score(base, task), "fine-tuned": score(tuned, task)}
    for key, inputs in (("without data", None), ("extracted", task.after[0])):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the parameters for symbolic functions of pykan are not used here
            model = extract_lotra(copy.deepcopy(base), tuned, budget=int(SHARE * coefficients), inputs=inputs)
        scores[key] = score(model, task)
    scores["share"] = model.extraction_report.parameters / coefficients
    train(model, task, task.after, steps, MORE_LR, bar)
    gain = scores["fine-tuned"] - scores["base"]
    scores["trained on"] = score(model, task)
    for key in ("without data", "extracted", "trained on"):
        scores[f"gain kept, {key}"] = (scores[key] - scores["base"]) / gain
    return scores


def draw(spectra: dict[str, tuple[Spectrum, Spectrum]], results: dict, path: Path) -> None:
    """The spectra of each task's largest layer, beside the control's, and the energies and scores."""
    figure = plt.figure(figsize=(3.2 * len(spectra), 6.6), layout="constrained")
    top, bottom = figure.subfigures(2, 1)
    top.suptitle("Singular values of the update (solid) and of a random update of the same size (dashed)")
    axes = top.subplots(1, len(spectra))
    for axis, (task, pair) in zip(axes, spectra.items(), strict=True):
        name = max(pair[0].layers, key=lambda key: np.prod(pair[0].layers[key].shape))
        for spectrum, style in zip(pair, ("-", "--"), strict=True):
            layer: LayerSpectrum = spectrum.layers[name]
            for mode, color, values in zip(("out", "in", "basis"), "bgr", layer.singular_values, strict=True):
                index = np.arange(1, len(values) + 1)
                axis.plot(index, values / layer.norm, style, color=f"tab:{dict(b='blue', g='green', r='red')[color]}",
                          label=mode if style == "-" else None)  # fmt: skip
        axis.set_title(f"{task}\n{name}: {' x '.join(map(str, layer.shape))}", fontsize=9)
        axis.set(yscale="log", ylim=(3e-3, 1), xlabel="index")
        axis.grid(alpha=0.25)
    axes[0].set_ylabel("share of the norm")
    axes[0].legend(title="mode", fontsize=8)

    left, right = bottom.subplots(1, 2, width_ratios=[1, 2])
    position = np.arange(len(spectra))
    for shift, key, color in ((-0.2, "update", "tab:green"), (0.2, "random", "0.6")):
        bars = left.bar(
            position + shift, [100 * results["energy"][task][key]["mean"] for task in spectra], 0.4, color=color
        )
        left.bar_label(bars, fmt="%.0f", fontsize=8)
        bars.set_label(key)
    left.set_xticks(position, [task.replace(", ", ",\n").replace(" to ", "\nto ") for task in spectra], fontsize=8)
    left.set(ylabel=f"% of the energy in ranks {RANKS}", ylim=(0, 100))
    left.legend(fontsize=8)
    names = list(results["extraction"])
    position = np.arange(len(names))
    for shift, key, color in (
        (-0.32, "base", "0.6"),
        (-0.16, "without data", "tab:olive"),
        (0.0, "extracted", "yellowgreen"),
        (0.16, "trained on", "tab:green"),
        (0.32, "fine-tuned", "tab:blue"),
    ):
        bars = right.barh(
            position + shift, [results["extraction"][name][key]["mean"] for name in names], 0.16, color=color
        )
        bars.set_label({"trained on": f"and {MORE_STEPS} steps", "without data": "no data"}.get(key, key))
    right.set_yticks(position, [name.replace(": ", ":\n") for name in names], fontsize=7)
    right.invert_yaxis()
    right.set(xlabel="accuracy on the changed data, %", xlim=(0, 100))
    right.legend(fontsize=8, ncols=5, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    figure.savefig(path, dpi=110)


def summarize(runs: list[dict[str, float]]) -> dict[str, dict[str, float | list[float]]]:
    """Mean and single values over the seeds."""
    return {
        key: {"mean": float(np.mean([run[key] for run in runs])), "seeds": [float(run[key]) for run in runs]}
        for key in runs[0]
    }


def main() -> None:
    parser = command_line.Parser(
        __doc__,
        takes="two minutes on one core",
        writes="low_rank_evidence.json and .png",
        folder=command_line.RESULTS,
        needs="test",
        quick="one seed, 60 steps, our own KAN only: to see it run",
    )
    parser.add_argument("--seeds", type=int, default=3, help="how many runs are averaged (default: 3)")
    parser.add_argument("--steps", type=int, default=300, help="steps of each fine-tuning (default: 300)")
    parser.add_argument("--data-dir", type=Path, help="folder with 10,000 images of MNIST, for one more task")
    args = parser.parse_args()
    if args.quick:
        args.seeds, args.steps = 1, 60

    makers = [rotated_digits, function_family, diabetes]
    if args.data_dir is not None:
        makers.insert(1, lambda seed: digits_to_mnist(seed, args.data_dir))
    libraries = ["peft-lotra"]
    if not args.quick:
        libraries += ["efficient-kan", "efficient-kan with scales", "pykan"]

    energies, extractions, spectra = {}, {}, {}
    images = len(makers) - 2  # tasks with accuracies, on which all libraries are tried
    total = args.seeds * (3 * args.steps * (2 + images * len(libraries)) + MORE_STEPS * images * len(libraries))
    bar = tqdm(total=total, unit="step", ncols=100)
    for seed in range(args.seeds):
        for task in (maker(seed) for maker in makers):
            for library in libraries if task.loss is F.cross_entropy else libraries[:1]:
                base, tuned = fine_tune(library, task, seed, args.steps, bar)
                if library == libraries[0]:
                    update = update_spectrum(base, tuned)
                    control = random_update(update)
                    spectra.setdefault(task.name, (update, control))
                    run = {"update": update.energy(RANKS), "random": control.energy(RANKS)}
                    run |= {f"{name}, update": layer.energy(RANKS) for name, layer in update.layers.items()}
                    run |= {f"{name}, random": layer.energy(RANKS) for name, layer in control.layers.items()}
                    run |= {"score of base": score(base, task), "score fine-tuned": score(tuned, task)}
                    energies.setdefault(task.name, []).append(run)
                if task.loss is F.cross_entropy:
                    run = extract(base, tuned, task, MORE_STEPS, bar)
                    extractions.setdefault(f"{task.name}: {library}", []).append(run)
    bar.close()
    results = {
        "settings": {"ranks": RANKS, "seeds": args.seeds, "steps": args.steps, "share": SHARE, "quick": args.quick},
        "energy": {name: summarize(runs) for name, runs in energies.items()},
        "extraction": {name: summarize(runs) for name, runs in extractions.items()},
    }
    (args.output / "low_rank_evidence.json").write_text(json.dumps(results, indent=1) + "\n")
    draw(spectra, results, args.output / "low_rank_evidence.png")
    show(results)


def show(results: dict) -> None:
    console = Console(width=130)
    seeds = results["settings"]["seeds"]
    table = Table(title=f"Energy of the full fine-tuning's update in ranks {RANKS}, %, mean of {seeds} seeds")
    for column in ("task", "update", "random update", "layers"):
        table.add_column(column, justify="left" if column in ("task", "layers") else "right")
    for name, row in results["energy"].items():
        layers = [f"{100 * value['mean']:.0f}" for key, value in row.items() if key.endswith(", update")]
        table.add_row(
            name, f"{100 * row['update']['mean']:.1f}", f"{100 * row['random']['mean']:.1f}", " / ".join(layers)
        )
    console.print(table)
    table = Table(title="Adapters extracted from the fine-tuned models: accuracy % (share of the gain kept)")
    kept = ("without data", "extracted", "trained on")
    for column in ("", "% of parameters", "base", "fine-tuned", *kept):
        table.add_column(column, justify="right" if column else "left")
    for name, row in results["extraction"].items():
        values = [f"{row[key]['mean']:.1f} ({row[f'gain kept, {key}']['mean']:.1%})" for key in kept]
        values = [f"{row[key]['mean']:.1f}" for key in ("base", "fine-tuned")] + values
        table.add_row(name, f"{100 * row['share']['mean']:.1f}", *values)
    console.print(table)


if __name__ == "__main__":
    main()
