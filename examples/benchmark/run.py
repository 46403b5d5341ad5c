# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""A benchmark of transfer: what to train of a KAN when a new task has 20 to 1,000 labels.

    python examples/benchmark/run.py  # two hours on two cores, no network; goes on where it was stopped
    python examples/benchmark/run.py --method mine.py  # a method of your own, compared with the results of the others
    python examples/benchmark/run.py --quick  # a few seconds, for CI: says nothing

`mine.py` has a function `adapt(base, x, y, loss) -> model`. `base` is a trained KAN, and `model` maps x to outputs. If
the file has `RATES`, a tuple of learning rates, `adapt` takes `lr` too.

Each case, a pair of tasks (pairs.py) and a number of labels, has ten seeds, each of which draws a split and trains a
base. Methods (methods.py) see the labeled rows alone. Where a method has learning rates, validation data choose one
for all seeds; for full fine-tuning the table also has the best one by test data. Shown in docs/when.md. Writes
results.json and results.md.
"""

from __future__ import annotations

import sys
from pathlib import Path


sys.path.append(str(Path(__file__).parents[1] / "studies"))
from study_tools import command_line  # isort: split


import copy
import importlib.util
import inspect
import os
import time
import warnings
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Any, NamedTuple

import torch
from methods import METHODS, Method, count, make_mlp, train
from pairs import NEW, Maker, known_with_mnist
from peft import PeftModel, get_peft_model_state_dict
from scores import ON_PATH, Results, as_text
from study_tools import files
from torch import nn
from tqdm import tqdm

from peft_lotra.kan import KAN


FOLDER = Path(__file__).parent
BASE_STEPS = 600


class Job(NamedTuple):
    """Methods to run on a pair with some labels and a seed; `file` is a method of the user."""

    title: str
    make: Maker
    labels: int
    seed: int
    methods: list[str]
    file: Path | None


Scores = dict[str, dict[str, dict[str, float]]]  # of methods, of rates: validation, test, bytes, seconds


def run_job(job: Job) -> Scores:
    """Train the bases of a pair and seed, then adapt them by each method."""
    torch.set_num_threads(1)  # more threads slow down networks this small
    warnings.filterwarnings("ignore")
    all_methods = find_methods(job.file)
    methods = {name: all_methods[name] for name in job.methods}
    pair = job.make(job.seed, job.labels)
    x, y = pair.labeled
    bases: dict[str, nn.Module] = {}
    for kind in sorted({method.network for method in methods.values()}):
        torch.manual_seed(job.seed)
        base: nn.Module = KAN(pair.widths)
        if kind == "mlp":
            base = make_mlp(pair.widths, count(base))
        optimizer = torch.optim.Adam(base.parameters(), lr=5e-3, fused=True)
        bases[kind] = train(base, *pair.old, pair.loss, optimizer, BASE_STEPS)

    scores: Scores = {}
    for name, method in methods.items():
        accepted = inspect.signature(method.adapt).parameters
        for lr in method.rates or (0.0,):
            options: dict[str, Any] = {"lr": lr} if method.rates else {}
            if "blocked" in accepted:
                options["blocked"] = pair.blocked
            torch.manual_seed(100 + job.seed)
            base = copy.deepcopy(bases[method.network])
            begin = time.process_time()
            model = method.adapt(base, x, y, pair.loss, **options)
            seconds = time.process_time() - begin
            model.eval()
            scores.setdefault(name, {})[f"{lr:g}"] = {
                "validation": round(pair.score(model, "validation"), 2),
                "test": round(pair.score(model, "test"), 2),
                "bytes": count_bytes(model, bases[method.network]),
                "seconds": round(seconds, 2),
            }
    return scores


def count_bytes(model: nn.Module, base: nn.Module) -> int:
    """Return the bytes of what is saved for a task: an adapter, or the parameters that differ from the base."""
    if isinstance(model, PeftModel):
        return sum(tensor.nbytes for tensor in get_peft_model_state_dict(model).values())
    former = list(base.parameters())
    changed = [one for one in model.parameters() if not any(torch.equal(one, other) for other in former)]
    return sum(tensor.nbytes for tensor in changed)


def find_methods(path: Path | None) -> dict[str, Method]:
    """Return all methods, with that of a file of the user."""
    if path is None:
        return METHODS
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None or not path.is_file():
        raise SystemExit(f"run.py: error: --method {path}: no Python file there")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not callable(getattr(module, "adapt", None)):
        raise SystemExit(f"run.py: error: --method {path}: it must have a function `adapt(base, x, y, loss) -> model`")
    return {
        **METHODS,
        path.stem: Method(module.adapt, tuple(getattr(module, "RATES", ()))),
    }


def add(results: Results, job: Job, scores: Scores) -> None:
    """Add the scores of a job to the results."""
    for name, by_rate in scores.items():
        row = results.setdefault(job.title, {}).setdefault(name, {"rates": {}, "seconds": {}})
        for lr, score in by_rate.items():
            row["bytes"] = score["bytes"]
            row["seconds"][str(job.seed)] = score["seconds"]
            row["rates"].setdefault(lr, {})[str(job.seed)] = [
                score["validation"],
                score["test"],
            ]


def is_done(results: Results, job: Job, name: str) -> bool:
    row = results.get(job.title, {}).get(name, {"seconds": {}})
    return str(job.seed) in row["seconds"]


def main() -> None:
    parser = command_line.Parser(
        __doc__,
        takes="two hours on two cores",
        writes="results.json and .md; with --quick results_quick.*",
        folder=FOLDER,
        needs="examples,heavy",
        quick="one seed, one pair: to see it run",
    )
    parser.add_argument(
        "--method",
        type=Path,
        help="a Python file with `adapt(base, x, y, loss) -> model`",
    )
    parser.add_argument(
        "--pairs",
        nargs="+",
        help="beginnings of the names of pairs (default: all)",
    )
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument(
        "--seeds",
        type=int,
        default=10,
        help="how many runs are averaged (default: 10)",
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=os.cpu_count(),
        help="processes (default: one for each core)",
    )
    parser.add_argument(
        "--data-dir",
        type=Path,
        help="folder with 10,000 images of MNIST, for one more pair",
    )
    args = parser.parse_args()
    find_methods(args.method)  # an error comes before anything runs
    own = [args.method.stem] if args.method else []
    methods = list(dict.fromkeys(["full", ON_PATH, *args.methods, *own]))  # the rivals are always there
    pairs = {**known_with_mnist(args.data_dir), **NEW}
    if args.quick:
        args.seeds, args.pairs = 1, args.pairs or ["wine"]

    path = files.path_of(args, "results")
    results: Results = files.read(path, args.quick).get("results", {})
    jobs = []
    for seed in range(args.seeds):
        for name, (make, all_labels) in pairs.items():
            if args.pairs and not name.startswith(tuple(args.pairs)):
                continue
            for labels in all_labels:
                job = Job(
                    f"{name}, {labels}",
                    make,
                    labels,
                    seed,
                    methods,
                    args.method,
                )
                missing = [method for method in methods if not is_done(results, job, method)]
                if missing:
                    jobs.append(job._replace(methods=missing))

    with (
        ProcessPoolExecutor(args.workers) as pool,
        tqdm(total=len(jobs), unit="run", ncols=100) as bar,
    ):
        futures = {pool.submit(run_job, job): job for job in jobs}
        for future in as_completed(futures):
            add(results, futures[future], future.result())
            files.write(path, {"results": results}, indent=None)
            bar.update()
    files.write_page(
        path, as_text(results, [name for name in (*METHODS, *own) if name in next(iter(results.values()))])
    )


if __name__ == "__main__":
    main()
