# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Low-rank evidence: full fine-tuning changes the coefficient tensors of KANs by updates of low tensor rank.

Shown in docs/comparison.md and docs/paper.md.

    python examples/studies/low_rank_evidence.py  # about two minutes on one core, no network
    python examples/studies/low_rank_evidence.py --data-dir PATH/TO/mnist  # one more task: digits to MNIST at 8x8

On each task a KAN is trained, and then all of its parameters are fine-tuned on changed data. The script prints the
share of the energy (squared norm) that tensor ranks (4, 4, 4) keep, of the update and of a random update of its size.
Then an adapter of a fifth of the parameters is extracted from the fine-tuned model, for KANs of three libraries, from
the coefficients alone and with the inputs of the fine-tuning. The adapter is tested at once and after 50 more steps.
The folder of --data-dir holds images-idx3-ubyte.gz and labels-idx1-ubyte.gz. Writes low_rank_evidence.json and .md.
"""

from __future__ import annotations

from study_tools import command_line  # isort: split


import copy
import warnings
from pathlib import Path

import numpy as np
import torch
from study_tools import files
from study_tools.tables import table
from study_tools.tasks import Task, build, diabetes, digits_to_mnist, function_family, rotated_digits, score, train
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

from peft_lotra.compress.extract import extract_lotra
from peft_lotra.compress.spectra import Spectrum, spectrum_of, update_spectrum


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


def largest_layer(update: Spectrum, control: Spectrum) -> dict:
    """The singular values of the largest layer's update by mode, as shares of its norm, and the control's."""
    name = max(update.layers, key=lambda key: np.prod(update.layers[key].shape))
    values = {}
    for key, spectrum in (("update", update), ("random", control)):
        layer = spectrum.layers[name]
        values[key] = [[round(float(v / layer.norm), 5) for v in mode] for mode in layer.singular_values]
    return {"layer": name, "shape": list(update.layers[name].shape), **values}


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
        writes="low_rank_evidence.json and .md",
        folder=command_line.RESULTS,
        needs="test",
        quick="one seed, 60 steps, our own KAN only: to see it run",
    )
    parser.add_argument("--seeds", type=int, default=5, help="how many runs are averaged (default: 5)")
    parser.add_argument("--steps", type=int, default=300, help="steps of each fine-tuning (default: 300)")
    parser.add_argument("--data-dir", type=Path, help="folder with 10,000 images of MNIST, for one more task")
    args = parser.parse_args()
    if args.quick:
        args.seeds, args.steps = 1, 60

    path = files.path_of(args, "low_rank_evidence")
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
                    spectra.setdefault(task.name, largest_layer(update, control))
                    run = {"update": update.energy(RANKS), "random": control.energy(RANKS)}
                    run |= {f"{name}, update": layer.energy(RANKS) for name, layer in update.layers.items()}
                    run |= {f"{name}, random": layer.energy(RANKS) for name, layer in control.layers.items()}
                    run |= {"score of base": score(base, task), "score fine-tuned": score(tuned, task)}
                    energies.setdefault(task.name, []).append(run)
                if task.loss is F.cross_entropy:
                    run = extract(base, tuned, task, MORE_STEPS, bar)
                    extractions.setdefault(f"{task.name}: {library}", []).append(run)
    bar.close()
    settings = {"ranks": RANKS, "seeds": args.seeds, "steps": args.steps, "share": SHARE, "quick": args.quick}
    results = {
        "settings": settings,
        "energy": {name: summarize(runs) for name, runs in energies.items()},
        "extraction": {name: summarize(runs) for name, runs in extractions.items()},
        "spectra": spectra,
    }
    files.write(path, results)
    files.write_page(path, as_text(results))


def as_text(results: dict) -> str:
    lines = []
    for name, row in results["energy"].items():
        layers = " / ".join(f"{100 * value['mean']:.0f}" for key, value in row.items() if key.endswith(", update"))
        lines.append([name, f"{100 * row['update']['mean']:.1f}", f"{100 * row['random']['mean']:.1f}", layers])
    header = f"| energy in ranks {RANKS}, % | of the update | of a random update | layers of the update |"
    text = table(header, lines)

    kept = ("without data", "extracted", "trained on")
    lines = []
    for name, row in results["extraction"].items():
        values = [f"{row[key]['mean']:.1f}" for key in ("base", "fine-tuned")]
        values += [f"{row[key]['mean']:.1f} ({row[f'gain kept, {key}']['mean']:.1%})" for key in kept]
        lines.append([name, f"{100 * row['share']['mean']:.1f}", *values])
    header = "| accuracy % (share of the gain kept) | % of parameters | base | fine-tuned "
    header += "| from the coefficients | with inputs | with inputs, 50 more steps |"
    return f"{text}\n{table(header, lines)}"


if __name__ == "__main__":
    main()
