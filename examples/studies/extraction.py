# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""How much of a full fine-tuning an adapter keeps that `extract_lotra` makes of it, for KANs of three libraries.

Shown in docs/training.md.

    python examples/studies/extraction.py  # about two minutes on one core, no network
    python examples/studies/extraction.py --data-dir PATH/TO/mnist  # one more task: digits to MNIST at 8x8

A KAN reads digits, and all of its parameters are fine-tuned on shifted ones. An adapter with a fifth of the parameters
is extracted, from the coefficients alone and with the inputs of the fine-tuning. It is tested at once, and after 50
more steps. The folder of --data-dir holds images-idx3-ubyte.gz and labels-idx1-ubyte.gz. Writes extraction.json and
.md.
"""

from __future__ import annotations

from study_tools import command_line  # isort: split


import copy
import warnings
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import torch
from study_tools import files
from study_tools.tables import table
from study_tools.tasks import Task, build, digits_to_mnist, rotated_digits, score, train
from tqdm import tqdm

from peft_lotra import extract_lotra, find_kan_layers


torch.set_num_threads(1)  # additional threads slow down such small matrices

LIBRARIES = ("peft-lotra", "efficient-kan", "efficient-kan with scales", "pykan")
SHARE = 0.2  # the parameters of an extracted adapter, as a share of the coefficients
MORE_STEPS, MORE_LR = 50, 3e-4  # the training of an extracted adapter
KEPT = {
    "without data": "from the coefficients",
    "extracted": "with inputs",
    "trained on": "with inputs, 50 more steps",
}


def run(library: str, task: Task, seed: int, steps: int, bar: tqdm) -> dict[str, float]:
    """The scores of the base, the fine-tuned model, and the adapters, and the share of the gain that each keeps."""
    torch.manual_seed(seed)
    bar.set_description(f"{task.name}, {library}")
    base = train(build(library, task.widths), task, task.before, 2 * steps, 5e-3, bar)
    tuned = train(copy.deepcopy(base), task, task.after, steps, 1e-2, bar)
    coefficients = sum(np.prod(layer.shape) for layer in find_kan_layers(base))
    scores = {"base": score(base, task), "fine-tuned": score(tuned, task)}
    for key, inputs in (("without data", None), ("extracted", task.after[0])):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the parameters for symbolic functions of pykan are not used here
            model = extract_lotra(copy.deepcopy(base), tuned, budget=int(SHARE * coefficients), inputs=inputs)
        scores[key] = score(model, task)
    scores["share"] = model.extraction_report.parameters / coefficients
    train(model, task, task.after, MORE_STEPS, MORE_LR, bar)
    scores["trained on"] = score(model, task)
    gain = scores["fine-tuned"] - scores["base"]
    return scores | {f"gain kept, {key}": (scores[key] - scores["base"]) / gain for key in KEPT}


def as_text(results: dict[str, dict]) -> str:
    """The means over the seeds."""
    lines = []
    for name, row in results.items():
        mean = {key: values["mean"] for key, values in row.items()}
        cells = [f"{mean[key]:.1f}" for key in ("base", "fine-tuned")]
        cells += [f"{mean[key]:.1f} ({mean[f'gain kept, {key}']:.1%})" for key in KEPT]
        lines.append([name, f"{100 * mean['share']:.1f}", *cells])
    header = "| accuracy % (share of the gain kept) | % of parameters | base | fine-tuned "
    header += f"| {' | '.join(KEPT.values())} |"
    return table(header, lines)


def main() -> None:
    parser = command_line.Parser(
        __doc__,
        takes="two minutes on one core",
        writes="extraction.json and .md",
        folder=command_line.RESULTS,
        needs="test",
        quick="one seed, 60 steps, our own KAN only: to see it run",
    )
    parser.add_argument("--seeds", type=int, default=5, help="how many runs are averaged (default: 5)")
    parser.add_argument("--data-dir", type=Path, help="folder with 10,000 images of MNIST, for one more task")
    args = parser.parse_args()
    seeds, steps, libraries = (1, 60, LIBRARIES[:1]) if args.quick else (args.seeds, 300, LIBRARIES)
    makers = [rotated_digits]
    if args.data_dir is not None:
        makers.append(partial(digits_to_mnist, folder=args.data_dir))

    runs: dict[str, list[dict[str, float]]] = {}
    with tqdm(unit="step", ncols=100) as bar:
        for seed, make, library in product(range(seeds), makers, libraries):
            task = make(seed)
            runs.setdefault(f"{task.name}: {library}", []).append(run(library, task, seed, steps, bar))
    results = {}
    for name, each in runs.items():
        columns = {key: [float(found[key]) for found in each] for key in each[0]}
        results[name] = {key: {"mean": float(np.mean(values)), "seeds": values} for key, values in columns.items()}
    path = files.path_of(args, "extraction")
    files.write(path, {"steps": steps, "results": results})
    files.write_page(path, as_text(results))


if __name__ == "__main__":
    main()
