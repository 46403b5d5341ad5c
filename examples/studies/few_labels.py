# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Few labels: what to train of a KAN, and of an MLP of equal size, when a new task has 20 to 200 labels.

Shown in docs/when.md.

    python examples/studies/few_labels.py  # 15 minutes on one core, no network; goes on where it was stopped
    python examples/studies/few_labels.py --quick  # a few seconds, for CI: says nothing

A network that reads scikit-learn's digits 0 to 4 learns to read 5 to 9; one that predicts the progression of diabetes
for the younger half of the patients learns that of the older half. Compared are LoTRA from a random start and from
the gradient (`start_from_gradient`), the last layer alone, the spline weights without the residual ones, full
fine-tuning, and of the MLP full fine-tuning and LoRA. The "budget of 10 %" is `LoTRAConfig(budget=0.1)`.

Each method has five learning rates; validation data choose one, by the mean over the seeds, and test data count
nowhere else; "ranks chosen" chooses the ranks of LoTRA in the same way. Rates and seeds of a method train at once.
Writes few_labels.json and .md. The results of more methods (rivals.*) and of `fit_adapter` (chosen.*, unseen.*) are
those of this script at commit d838fd90.
"""

from __future__ import annotations

from study_tools import command_line  # isort: split


import copy
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from itertools import groupby, pairwise

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from problems.pairs import TASKS, Data, Split, unit_of
from study_tools import files, together
from study_tools.tables import table
from torch import Tensor, nn
from tqdm import tqdm

from peft_lotra import LoTRAConfig, create_lotra_optimizer, start_from_gradient
from peft_lotra.kan import KAN


torch.set_num_threads(1)  # additional threads slow down such small matrices
warnings.filterwarnings("ignore", "Adapters have more parameters")  # ranks are the same for all tasks

DEFAULT_RATE = 3e-2  # of the examples in the documentation


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def make_mlp(widths: list[int]) -> nn.Module:
    """An MLP of as many hidden layers as the KAN of these widths, all of one width, and of as many parameters."""

    def make(hidden: int) -> nn.Module:
        sides = [widths[0], *[hidden] * (len(widths) - 2), widths[-1]]
        parts = [part for pair in pairwise(sides) for part in (nn.Linear(*pair), nn.SiLU())]
        return nn.Sequential(*parts[:-1])

    goal = count(KAN(widths))
    with torch.device("meta"):
        hidden = min(range(1, 1000), key=lambda hidden: abs(count(make(hidden)) - goal))
    return make(hidden)


Trained = tuple[nn.Module, torch.optim.Optimizer]
Adam = partial(torch.optim.Adam, fused=True)


def lotra(r: int | tuple[int, ...] | None, start: str, base: nn.Module, split: Split, lr: float) -> Trained:
    config = LoTRAConfig(budget=0.1) if r is None else LoTRAConfig(r=r)
    model = get_peft_model(base, config)
    if start == "gradient":
        start_from_gradient(model, lambda: split.first_loss(model))
    return model, create_lotra_optimizer(model, Adam, lr=lr)


def only(part: str, base: nn.Module, split: Split, lr: float) -> Trained:
    for name, parameter in base.named_parameters():
        parameter.requires_grad_(part.format(last=len(split.widths) - 2) in name)
    return full(base, split, lr)


def lora(base: nn.Module, split: Split, lr: float) -> Trained:
    layers = [name for name, layer in base.named_children() if isinstance(layer, nn.Linear)]
    return full(get_peft_model(base, LoraConfig(r=3, lora_alpha=3, target_modules=layers)), split, lr)


def full(base: nn.Module, split: Split, lr: float) -> Trained:
    return base, Adam([p for p in base.parameters() if p.requires_grad], lr=lr)


Method = Callable[[nn.Module, Split, float], Trained]
RATES = (3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
CHOICES = [(8, 8, 4), (5, 13, 3), (4, 12, 4), (8, 12, 3), (2, 16, 4), (4, 16, 2), (6, 8, 6)]  # at most 10 % of digits
METHODS: dict[str, tuple[Callable, Method, tuple[float, ...]]] = {
    "KAN, full fine-tuning": (KAN, full, RATES),
    "KAN, spline weights": (KAN, partial(only, "spline_weight"), RATES),
    "KAN, last layer": (KAN, partial(only, "layers.{last}."), RATES),
    "LoTRA, random start, r=4": (KAN, partial(lotra, 4, "random"), RATES),
    "LoTRA, gradient start, r=4": (KAN, partial(lotra, 4, "gradient"), RATES),
    **{f"LoTRA, gradient start, r={r}": (KAN, partial(lotra, r, "gradient"), RATES) for r in CHOICES},
    "LoTRA, gradient start, budget of 10 %": (KAN, partial(lotra, None, "gradient"), RATES),
    "MLP, full fine-tuning": (make_mlp, full, (1e-3, *RATES[:4])),
    "MLP, LoRA, r=3": (make_mlp, lora, RATES),
}
OF_CHOICE = ["LoTRA, gradient start, r=4", *(f"LoTRA, gradient start, r={r}" for r in CHOICES)]


def whole(data: Sequence[Data], rows: Sequence[Tensor]) -> Callable[[int], tuple]:
    """What the drawn rows are, for less time: all rows, with how often each is drawn."""
    x, y = (torch.stack(part) for part in zip(*data, strict=True))
    counts = torch.stack([torch.stack([step.bincount(minlength=x.shape[1]) for step in draws]) for draws in rows], 1)
    return lambda step: (x, (y, counts[step]))


def counted(loss: Callable, outputs: Tensor, target: tuple[Tensor, Tensor]) -> Tensor:
    y, counts = target
    return (loss(outputs, y, reduction="none").reshape(len(y), -1).mean(1) * counts).sum() / counts.sum()


def make_bases(make: Callable, splits: dict[int, Split], steps: int) -> dict[int, nn.Module]:
    """The networks that know the old task, by seed."""
    made, rows = {}, []
    for seed, split in splits.items():
        torch.manual_seed(seed)
        made[seed] = make(split.widths)
        rows.append(together.draw(split.old, 2 * steps))
    models, old = list(made.values()), [split.old for split in splits.values()]
    optimizer, split = Adam([{"params": list(model.parameters())} for model in models], lr=5e-3), splits[min(splits)]
    together.train(models, [optimizer], together.batches(old, rows), split.loss, 2 * steps, call=split.start)
    return made


Run = tuple[str, int, str, int, float]  # task, labels, method, seed, lr


def runs(seeds: int, most: int) -> Iterator[Run]:
    """All runs; those of one method follow each other."""
    for task in list(TASKS)[:2]:
        for number in TASKS[task][1][:most]:
            for method, (_, _, rates) in METHODS.items():
                yield from ((task, number, method, seed, lr) for seed in range(seeds) for lr in rates)


def run_all(todo: list[Run], results: dict[str, dict], steps: int, save: Callable[[], None]) -> None:
    """Add the scores of the runs, by method, to those that were found."""
    bases: dict[tuple, dict[int, nn.Module]] = {}
    split_of = cache(lambda task, seed, labels: TASKS[task][0](seed, labels))
    bar = tqdm(total=len(todo), unit="run", ncols=100)
    for (task, labels, method), of_method in groupby(todo, lambda run: run[:3]):
        settings, (make, adapt, _) = [run[3:] for run in of_method], METHODS[method]
        splits = {seed: split_of(task, seed, labels) for seed in dict.fromkeys(seed for seed, _ in settings)}
        made = bases.setdefault((task, make), {})
        missing = {seed: split for seed, split in splits.items() if seed not in made}
        made |= make_bases(make, missing, steps) if missing else {}
        alike: dict[tuple, list[tuple]] = {}  # by the shapes of the parameters
        for seed, lr in settings:
            torch.manual_seed(100 + seed)
            model, optimizer = adapt(copy.deepcopy(made[seed]), splits[seed], lr)
            run = seed, lr, model, optimizer, splits[seed].labeled, together.draw(splits[seed].labeled, steps)
            alike.setdefault(tuple(parameter.shape for parameter in model.parameters()), []).append(run)
        split = splits[min(splits)]
        trained = sorted((run for part in alike.values() for run in part), key=lambda run: run[:2])
        for part in alike.values():
            _, _, models, optimizers, data, rows = zip(*part, strict=True)
            groups = [group for optimizer in optimizers for group in optimizer.param_groups]
            batches, loss = together.batches(data, rows), split.loss
            if labels < 100:
                batches, loss = whole(data, rows), partial(counted, loss)
            together.train(models, [torch.optim.Adam(groups)], batches, loss, steps, call=split.outputs)
        most = max(count(model) for _, _, model, *_ in trained)
        row = results.setdefault(f"{task}, {labels} labels", {}).setdefault(method, {"parameters": most})
        for seed, lr, model, *_ in trained:
            scores = row.setdefault("rates", {}).setdefault(f"{lr:g}", {"validation": {}, "test": {}})
            for part in ("validation", "test"):
                scores[part][str(seed)] = splits[seed].score(model, part)
        save()
        bar.update(len(settings))


def is_done(results: dict[str, dict], run: Run) -> bool:
    task, labels, method, seed, lr = run
    rates = results.get(f"{task}, {labels} labels", {}).get(method, {}).get("rates", {})
    return str(seed) in rates.get(f"{lr:g}", {}).get("test", {})


def mean(row: dict, lr: str, part: str) -> float:
    """Over the seeds; a run that diverged is below all others."""
    return float(np.nan_to_num(np.mean([*row["rates"][lr][part].values()]), nan=-np.inf))


def chosen(row: dict) -> str:
    """The rate with the best mean over the seeds on the validation data."""
    return max(row["rates"], key=lambda lr: mean(row, lr, "validation"))


def chosen_ranks(rows: dict[str, dict]) -> str:
    """The method of `OF_CHOICE` with the best mean on the validation data."""
    return max(OF_CHOICE, key=lambda name: mean(rows[name], chosen(rows[name]), "validation"))


def test_mean(row: dict) -> float:
    return mean(row, chosen(row), "test")


def as_text(results: dict[str, dict]) -> str:
    """The tables in Markdown."""
    parts = []
    for part, rows in results.items():
        lines = []
        for method in METHODS:
            row = rows[method]
            values = {lr: [*scores["test"].values()] for lr, scores in row["rates"].items()}
            lr, default = chosen(row), values.get(f"{DEFAULT_RATE:g}") if "LoTRA" in method else None
            cells = [method, f"{row['parameters']:,}", lr, f"{np.mean(values[lr]):.1f}"]
            cells.append(" ".join(f"{value:.1f}" for value in values[lr]))
            lines.append([*cells, "" if default is None else f"{np.mean(default):.1f}"])
        header = f"| | parameters | lr | {unit_of(part)} | seeds | at lr {DEFAULT_RATE:g} |"
        best = chosen_ranks(rows)
        note = f"Ranks chosen by validation data: {best}, {test_mean(rows[best]):.1f}."
        parts.append(f"### {part}\n\n{table(header, lines)}\n{note}\n")
    return "\n".join(parts)


def main() -> None:
    parser = command_line.Parser(
        __doc__,
        takes="15 minutes on one core",
        writes="few_labels.json and .md; with --quick few_labels_quick.*",
        folder=command_line.RESULTS,
        quick="one seed, five steps, the fewest labels: to see it run",
    )
    parser.add_argument("--seeds", type=int, default=5, help="how many runs are averaged (default: 5)")
    args = parser.parse_args()
    seeds, steps, most = (1, 5, 1) if args.quick else (args.seeds, 300, 4)
    path = files.path_of(args, "few_labels")
    results = files.read(path, args.quick).get("results", {})
    todo = [run for run in runs(seeds, most) if not is_done(results, run)]
    run_all(todo, results, steps, lambda: files.write(path, {"steps": steps, "results": results}))
    files.write_page(path, as_text(results))


if __name__ == "__main__":
    main()
