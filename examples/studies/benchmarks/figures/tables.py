# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Markdown tables of the results that `run.py` writes."""

from __future__ import annotations

from collections.abc import Callable, Sequence


LOSES = "▲"
LINEAR = "nn.Linear(8n, n)"
OTHER_KANS = ("inkan", "flashkan", "FastKAN-like", "efficient-kan", "pykan")


def table(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """A Markdown table, the first `left` columns aligned to the left."""
    rule = ["---"] * left + ["--:"] * (len(header) - left)
    return "\n".join("| " + " | ".join(line) + " |" for line in (header, rule, *rows)) + "\n"


def median(row: dict, subject: str, part: str = "total") -> float | None:
    """A median in milliseconds; None if the subject was not measured."""
    return row["ms"].get(subject, {}).get(part, [None] * 3)[1]


def number(value: float | None) -> str:
    """The number with three digits and without an exponent."""
    if value is None:
        return "-"
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def spread(row: dict, subject: str, part: str = "total") -> str:
    """Median and quartiles."""
    times = row["ms"].get(subject, {}).get(part)
    return "-" if times is None else f"{number(times[1])} ({number(times[0])} to {number(times[2])})"


def ratio(first: float | None, second: float | None, loses_above: float | None = None) -> str:
    """The ratio first / second, marked if it is above `loses_above`."""
    if first is None or second is None:
        return "-"
    mark = f" {LOSES}" if loses_above is not None and first / second > loses_above else ""
    return f"{first / second:.2f}{mark}"


def size(row: dict) -> str:
    """The size of a training step's cell."""
    widths = row["widths"]
    name = f"{widths[0]} -> {widths[1]}" if len(widths) == 2 else str(widths)
    return f"{name}, batch {row['batch']}" + (", 2nd derivatives" if "Laplacian" in row["loss"] else "")


def find(results: dict, figure: str, **settings: object) -> dict | None:
    """The first row of a figure with these settings."""
    rows = results.get(figure, {"rows": []})["rows"]
    return next((row for row in rows if all(row.get(key) == value for key, value in settings.items())), None)


def machine_line(figure: dict) -> str:
    """The machine and the versions of a figure in one sentence."""
    machine = figure["machine"]
    where = machine["cpu"] if machine["device"] == "CPU" else f"{machine['device']} ({machine['cpu']})"
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    return (
        f"{where}, {machine['threads']} threads of {machine['cores']} cores, {machine['memory_gib']:.0f} GiB, "
        f"load before {machine['load_before']}, {machine['system']}, Python {machine['python']}, {versions}; "
        f"{machine['date']}."
    )


def _skipped(rows: list[dict], label: Callable[[dict], str]) -> str:
    notes = [
        f"* Left out at {label(row)}: {', '.join(names)}, which {reason}."
        for row in rows
        for reason, names in _by_reason(row.get("skipped", {})).items()
    ]
    return "\n".join(notes) + "\n" if notes else ""


def _by_reason(skipped: dict[str, str]) -> dict[str, list[str]]:
    return {reason: [name for name in skipped if skipped[name] == reason] for reason in skipped.values()}


def training_step(rows: list[dict]) -> str:
    methods = ("frozen base", "LoTRA", "full fine-tuning", "PEFT LoRA")
    header = ("KAN", "size", *methods, "LoTRA / frozen", "LoTRA / full", "LoTRA / PEFT LoRA", "parameters")
    lines = []
    for row in rows:
        lotra = median(row, "LoTRA")
        ratios = [
            ratio(lotra, median(row, method), limit)
            for method, limit in zip(("frozen base", *methods[2:]), (None, 1, 1), strict=True)
        ]
        counts = ", ".join(f"{count:,}" for count in row.get("trainable", {}).values() if count)
        lines.append((row["kan"], size(row), *(spread(row, method) for method in methods), *ratios, counts))
    parts = [
        (
            row["kan"],
            size(row),
            *(spread(row, method, part) for method in methods[1:] for part in ("gradients", "optimizer")),
        )
        for row in rows
    ]
    part_header = [f"{method}: {part}" for method in methods[1:] for part in ("gradients", "optimizer")]
    return (
        "Milliseconds, median (quartiles), of a step: zero_grad, forward, loss, backward to the parameters and the "
        "input, and Adam. The frozen base has its forward pass and the gradient of the input alone. LoTRA's ranks are "
        "(8, 8, 4), PEFT's LoRA has r=4 on `spline_weight` by `target_parameters`. Parameters: of LoTRA, full "
        f"fine-tuning and PEFT's LoRA. {LOSES}: LoTRA is slower.\n\n"
        + table(header, lines, 2)
        + "\nThe two parts of the step:\n\n"
        + table(("KAN", "size", *part_header), parts, 2)
        + "\n"
        + _skipped(rows, lambda row: f"{row['kan']}, {size(row)}")
    )


def layers(rows: list[dict]) -> str:
    names = ("KANLinear", *OTHER_KANS, LINEAR)
    text = (
        "Milliseconds, median (quartiles). Each layer as it comes: inkan and flashkan compile their basis, the others "
        f"but KANLinear nothing. {LOSES}: KANLinear is slower than that KAN layer.\n"
    )
    for part, title in (("total", "Forward and backward"), ("forward", "Forward, with the graph for backward")):
        lines = [
            (
                f"{row['width']}, batch {row['batch']}",
                *(_mark(row, name, part) for name in names),
                ratio(median(row, "KANLinear", part), median(row, LINEAR, part)),
            )
            for row in rows
        ]
        text += f"\n{title}:\n\n" + table(("n", *names, f"KANLinear / {LINEAR}"), lines)
    return text + "\n" + _skipped(rows, lambda row: f"n = {row['width']}, batch {row['batch']}")


def _mark(row: dict, name: str, part: str) -> str:
    own, other = median(row, "KANLinear", part), median(row, name, part)
    return spread(row, name, part) + (f" {LOSES}" if name in OTHER_KANS and other and other < own else "")


def memory(rows: list[dict]) -> str:
    header = ("what", "size", "MiB")
    lines = [
        (
            f"{row['kan']}, {row['method']}" if row["what"] == "step" else f"layer: {row['layer']}",
            f"{row['width']} -> {row['width']}, batch {row['batch']}",
            f"{row['mib']:.0f}" if "mib" in row else f"left out, {next(iter(row['skipped'].values()))}",
        )
        for row in rows
    ]
    return (
        "The peak of a training step, or of a layer's forward and backward, beyond model and inputs; gradients and "
        "the optimizer's state are part of it. Each in a process of its own, resident memory on the CPU, allocated "
        "memory on CUDA.\n\n" + table(header, lines, 2)
    )


def growth(rows: list[dict]) -> str:
    text = (
        "Milliseconds, median (quartiles). Width and batch: a training step of one layer of the own KAN. Grid: "
        "forward and backward of a layer. Adapters: inference with that many on one base.\n"
    )
    for series in dict.fromkeys(row["series"] for row in rows):
        mine = [row for row in rows if row["series"] == series]
        names = list(dict.fromkeys(name for row in mine for name in row["ms"]))
        held = ", ".join(f"{key} {mine[0][key]}" for key in ("width", "batch") if key != series)
        lines = [(str(row["value"]), *(spread(row, name) for name in names)) for row in mine]
        text += f"\n{series.capitalize()} ({held}):\n\n" + table((series, *names), lines)
        text += "\n" + _skipped(mine, lambda row: f"{row['series']} {row['value']}")
    return text


def serving(rows: list[dict]) -> str:
    parts = ("save", "load", "merge", "unmerge", "merge and unload", "swap")
    text = "Milliseconds, median (quartiles), on the own KAN; the whole model is saved and loaded by safetensors.\n"
    for row in rows:
        names = list(row["bytes"])
        lines = [(name, *(spread(row, name, part) for part in parts), f"{row['bytes'][name]:,}") for name in names]
        text += f"\n{row['widths']}:\n\n" + table(("", *parts, "bytes of the file"), lines)
        base = median(row, "inference: base")
        models = [name for name in row["ms"] if name.startswith("inference: ")]
        lines = [(name, spread(row, name), ratio(median(row, name), base)) for name in models]
        text += "\n" + table((f"batch {row['batch']}", "ms", "/ base"), lines)
    return text


def import_time(rows: list[dict]) -> str:
    (row,) = rows
    lines = [(name, spread(row, name)) for name in row["ms"]]
    return "Milliseconds, each on top of the one before, in fresh processes.\n\n" + table(("import", "ms"), lines)


TABLES = {
    "training_step": ("Training step", training_step),
    "layers": ("KAN layers", layers),
    "memory": ("Peak memory", memory),
    "growth": ("Growth", growth),
    "serving": ("Serving", serving),
    "import_time": ("Import time", import_time),
}


def report(results: dict) -> str:
    """All tables, with the machine that each figure was measured on."""
    text = "# Measured by `python examples/studies/benchmarks/run.py`\n"
    for name, (title, make) in TABLES.items():
        if name in results:
            figure = results[name]
            text += f"\n## {title}\n\n{machine_line(figure)}\n\n{make(figure['rows']).rstrip()}\n"
    return text
