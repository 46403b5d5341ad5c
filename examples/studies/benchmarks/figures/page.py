# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""The tables of docs/benchmarks.md; docs/tables.py writes them."""

from __future__ import annotations

from collections.abc import Callable
from textwrap import fill

from study_tools.tables import table

from figures.tables import LINEAR, LOSES, OTHER_KANS, find, median, number, ratio, size


def section(results: dict) -> str:
    """The section in Markdown."""
    machine = results["training_step"]["machine"]
    return f"""
Measured side by side on {machine["cpu"]}, {machine["threads"]} threads, torch {machine["versions"]["torch"]}.
[All results](../examples/studies/results/benchmarks/cpu.json) have quartiles too.
`python examples/studies/benchmarks/run.py` repeats the measurement, also on CUDA, where we have not run it.

**A training step** is a forward pass, a backward pass and a step of Adam, for one layer whose input needs a gradient.
LoTRA has ranks (8, 8, 4), and PEFT's LoRA has r=4. The columns with a slash have LoTRA's time divided by the time of
another method. "Frozen" is the forward pass and the input gradient of the base layer, without an adapter.

{steps(results["training_step"]["rows"])}
**Honest read.** An adapter saves time only on wide layers, or where full fine-tuning is slow, as on efficient-kan.
On a small network of our KAN, full fine-tuning is faster.

**A KAN layer** with n inputs and n outputs, forward and backward, in milliseconds:

{layers(results["layers"]["rows"])}
**Honest read.** Our layer is never the fastest. If you choose a KAN for its speed alone, take FastKAN, flashkan or
inkan, or a linear layer with as many parameters.

**Memory** at the peak of a training step, without model and input, in MiB:

{memory(results["memory"]["rows"])}
**Honest read.** On our KAN, an adapter saves memory only at 1,024 units. The large gain on efficient-kan comes from
our kernels more than from LoTRA.

{serving(results)}

**Honest read.** The small file is the gain. To save, load, merge and swap takes longer than with PEFT's LoRA.
"""


def steps(rows: list[dict]) -> str:
    """The step by LoTRA and its ratio to the step by each other method, for the two KANs."""
    kans = list(dict.fromkeys(row["kan"] for row in rows))
    header = "| size |"
    for kan in kans:
        header += f" {kan}: LoTRA ms | / frozen | / full | / PEFT LoRA |"
    lines = []
    for label in dict.fromkeys(map(size, rows)):
        line = [label]
        for kan in kans:
            row = next(row for row in rows if row["kan"] == kan and size(row) == label)
            lotra = median(row, "LoTRA")
            line.append(number(lotra))
            for method, limit in (("frozen base", None), ("full fine-tuning", 1), ("PEFT LoRA", 1)):
                line.append(ratio(lotra, median(row, method), limit))
        lines.append(line)
    return table(header, lines) + left_out(rows, lambda row: f"{row['kan']} {size(row)}")


def left_out(rows: list[dict], label: Callable[[dict], str]) -> str:
    """A paragraph on the reasons why cells were left out, if any."""
    notes = []
    for row in rows:
        for reason in dict.fromkeys(row.get("skipped", {}).values()):
            limits = reason.replace("would take ", "").replace(" in a round of all", " a round")
            notes.append(f"{label(row)} ({limits.replace(', more than', '; the limit is')})")
    return "\n" + fill(f"Left out: {'; '.join(notes)}.", 119) + "\n" if notes else ""


def layers(rows: list[dict]) -> str:
    lines = []
    for row in (row for row in rows if row["grid"] == 5):
        own = median(row, "KANLinear")
        line = [f"{row['width']}, batch {row['batch']}", number(own)]
        for name in OTHER_KANS:
            other = median(row, name)
            line.append(number(other) + (f" {LOSES}" if other is not None and other < own else ""))
        lines.append([*line, number(median(row, LINEAR))])
    return table(f"| n | KANLinear | {' | '.join(OTHER_KANS)} | {LINEAR} |", lines) + left_out(
        rows, lambda row: f"{', '.join(row['skipped'])} at {row['width']}, batch {row['batch']}"
    )


def memory(rows: list[dict]) -> str:
    rows = [row for row in rows if row["what"] == "step"]
    methods = list(dict.fromkeys(row["method"] for row in rows))
    lines = []
    for kan, width, batch in dict.fromkeys((row["kan"], row["width"], row["batch"]) for row in rows):
        cell = {"kan": kan, "width": width, "batch": batch}
        found = {row["method"]: row.get("mib") for row in rows if all(row[key] == cell[key] for key in cell)}
        lotra = found.get("LoTRA")
        lost = {name for name in ("full fine-tuning", "PEFT LoRA") if None not in (lotra, found[name])}
        lost = {name for name in lost if found[name] < lotra}
        values = [number(found[name]) + (f" {LOSES}" if name in lost else "") for name in methods]
        lines.append([f"{kan}, {width} -> {width}, batch {batch}", *values])
    return table(f"| | {' | '.join(methods)} |", lines)


def serving(results: dict) -> str:
    """The table of what it takes to serve an adapter, and a sentence on inference and import."""
    row = find(results, "serving", widths=[256, 256, 256, 256])
    files = row["bytes"]
    lines = [["file, KiB", *(f"{files[method] / 2**10:,.0f}" for method in ("LoTRA", "PEFT LoRA"))]]
    for name, part in (("save", "save"), ("load", "load"), ("merge", "merge"), ("swap the weights", "swap")):
        lotra, lora = median(row, "LoTRA", part), median(row, "PEFT LoRA", part)
        lines.append([f"{name}, ms", f"{number(lotra)}{f' {LOSES}' if lora < lotra else ''}", number(lora)])
    base = median(row, "inference: base")
    forward = {name: ratio(median(row, f"inference: {name}"), base) for name in ("LoTRA, merged", "LoTRA, not merged")}
    imports = results["import_time"]["rows"][0]
    before = sum(median(imports, name) for name in ("torch", "peft"))
    import_time = number(median(imports, "peft_lotra"))
    title = f"**Serving** a [256, 256, 256, 256] KAN of {files['whole model'] / 2**20:.1f} MiB:"
    note = (
        f"Inference takes {forward['LoTRA, merged']} times as long as the base after a merge, and "
        f"{forward['LoTRA, not merged']} times before. `import peft_lotra` adds {import_time} ms "
        f"to the {number(before)} ms of torch and PEFT."
    )
    return f"{title}\n\n{table('| | LoTRA | PEFT LoRA |', lines)}\n{fill(note, 119)}"
