# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Measuring tools: times of several subjects in turn, the memory that a step needs, and the machine."""

from __future__ import annotations

import gc
import importlib.metadata
import json
import os
import platform
import random
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from study_tools.machine import cpu_model


# A subject has named parts, which are called one after the other and timed one by one. A part whose name starts with
# an underscore is called, but not timed: it resets the subject.
Parts = Mapping[str, Callable[[], object]]

# Subjects that take longer in one round, or are expected to need more memory, are left out.
LIMIT_SECONDS = 10.0
LIMIT_GIB = 6.0

PACKAGES = ("torch", "peft", "peft-lotra", "transformers", "qkan", "inkan", "flashkan", "pykan", "numpy")


def time_parts(parts: Parts, device: torch.device) -> dict[str, float]:
    """The milliseconds of each part; on CUDA those of the device (events), not of the host."""
    if device.type == "cuda":
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(len(parts) + 1)]
        torch.cuda.synchronize(device)
        marks[0].record()
        for mark, part in zip(marks[1:], parts.values(), strict=True):
            part()
            mark.record()
        torch.cuda.synchronize(device)
        spans = [start.elapsed_time(end) for start, end in zip(marks, marks[1:], strict=False)]
    else:
        marks = [time.perf_counter()]
        for part in parts.values():
            part()
            marks.append(time.perf_counter())
        spans = [1e3 * (end - start) for start, end in zip(marks, marks[1:], strict=False)]
    times = {name: span for name, span in zip(parts, spans, strict=True) if not name.startswith("_")}
    return times | {"total": sum(times.values())}


def interleave(
    subjects: Mapping[str, Parts], device: torch.device, seconds: float, rounds: tuple[int, int] = (5, 200)
) -> dict:
    """
    Times subjects side by side: in each round every subject runs once, in a random order, so that other load of the
    machine affects all subjects alike. Two rounds before (compilers, caches) do not count.

    Args:
        subjects: the timed subjects, by name.
        device: the device of the subjects.
        seconds: the approximate time of all rounds; within `rounds`, it determines the number of rounds.
        rounds: the fewest and the most rounds.

    Returns:
        "ms": by subject and part (and "total"), quartiles [q1, median, q3] over the rounds, milliseconds.
        "rounds": the number of rounds.
        "skipped": by subject, the reason why it was left out.
    """
    skipped, first = {}, {}
    for name, parts in subjects.items():
        time_parts(parts, device)
        first[name] = time_parts(parts, device)["total"] / 1e3
        if first[name] > LIMIT_SECONDS:
            skipped[name] = f"takes {first[name]:.0f} s, more than {LIMIT_SECONDS:.0f} s"
    subjects = {name: parts for name, parts in subjects.items() if name not in skipped}
    expected = sum(first[name] for name in subjects)
    count = int(min(max(seconds / max(expected, 1e-9), rounds[0]), rounds[1]))

    samples: dict[str, dict[str, list[float]]] = {name: {} for name in subjects}
    order, shuffle = list(subjects), random.Random(0).shuffle
    gc.collect()
    gc.disable()
    try:
        for _ in range(count):
            shuffle(order)
            for name in order:
                for part, span in time_parts(subjects[name], device).items():
                    samples[name].setdefault(part, []).append(span)
    finally:
        gc.enable()
    times = {name: {part: quartiles(spans) for part, spans in parts.items()} for name, parts in samples.items()}
    return {"ms": times, "rounds": count} | ({"skipped": skipped} if skipped else {})


def quartiles(values: list[float]) -> list[float]:
    """[q1, median, q3], to four digits."""
    cuts = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return [float(f"{cut:.4g}") for cut in cuts]


def peak_memory(step: Callable[[], object], device: torch.device) -> float:
    """
    The peak memory of one call of `step` in MiB, without the memory of the process before.

    On the CPU the peak is that of resident memory, which can be reset on Linux only; elsewhere a step below an earlier
    peak of its process counts as 0. Call the function in a separate process.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass
    before = resident_peak()
    step()
    return (resident_peak() - before) / 2**20


def resident_peak() -> int:
    """The peak memory of this process in bytes."""
    try:
        # not `ru_maxrss`, which for a child process starts at the memory of its parent
        status = Path("/proc/self/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def in_child(command: list[str], threads: int) -> dict:
    """Run Python in a separate process and return its last line, JSON; raises `RuntimeError` if it fails."""
    folder = Path(__file__).resolve().parents[1]
    path = os.pathsep.join([str(folder), str(folder.parents[2]), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": path}
    result = subprocess.run([sys.executable, *command], capture_output=True, text=True, env=environment)
    if result.returncode:
        raise RuntimeError(f"a child process failed with {result.returncode}:\n{result.stderr}")
    return json.loads(result.stdout.strip().splitlines()[-1])


def describe_machine(device: torch.device) -> dict:
    """Processor, memory, versions and settings of the machine, as far as they affect the figures."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "load_before": round(os.getloadavg()[0], 2),
        "date": time.strftime("%Y-%m-%d"),
        "system": platform.system(),
        "python": platform.python_version(),
        "versions": versions,
    }
