# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""All studies but the benchmarks, which need an idle machine, one after the other.

    python examples/studies/run_all.py --quick  # each in its quick form: to see them run
    python examples/studies/run_all.py          # the committed results; again, to go on with what is not done

A study that has ended is in run_all.json, with seconds, commit and machine, and is not repeated at that commit. A
study that fails is named at the end, with exit code 1.
"""

from __future__ import annotations

from study_tools import command_line  # isort: split


import subprocess
import sys
import time
from pathlib import Path

from study_tools import files, machine


# the script, its options, and those of its quick form; a script may come twice, and then is quick once
STUDIES: list[tuple[str, list[str], list[str] | None]] = [
    ("bytes.py", [], []),
    ("many_series.py", [], []),
    ("initialization.py", [], []),
    ("steps.py", [], []),
    ("learning_rates.py", [], []),
    ("learning_rates.py", ["--sweep", "ranks"], None),
    ("extraction.py", [], []),
    ("expressiveness.py", [], []),
    ("slim_functions.py", [], []),
    ("formulas.py", [], []),
    ("slim_images.py", [], []),
    ("convolutions.py", [], []),
    ("parametric/fronts.py", [], []),
    ("parametric/wide.py", [], []),
    ("parametric/coverage.py", [], []),
    ("pde/transfer.py", [], ["--families", "burgers"]),
    ("pde/moving_targets.py", [], []),
    ("pde/ten.py", [], []),
    ("pde/jet_orders.py", [], []),
    ("pde/shapes.py", [], []),
    ("pde/demos.py", [], []),
    ("pde/unknowns.py", [], []),
    ("pde/stalls.py", [], []),
    ("scoreboard.py", ["--seeds", "1", "2", "3", "4", "5"], []),
]
CACHED = ("pde/transfer.py", "pde/moving_targets.py")


def command(script: str, options: list[str], output: Path | None, cache: Path | None) -> list[str]:
    found = [sys.executable, str(command_line.STUDIES / script), *options]
    if output is not None:
        found += ["--output", str(output)]
    return found + (["--cache", str(cache)] if cache is not None and script in CACHED else [])


def main() -> None:
    parser = command_line.Parser(
        __doc__,
        takes="many hours on one core; with --quick five minutes",
        writes="what the studies write, and run_all.json",
        folder=command_line.RESULTS,
        needs="examples,test",
        quick="each study in its quick form",
    )
    args = parser.parse_args()
    path, own = args.output / "run_all.json", args.output != command_line.RESULTS
    done = files.read(path, args.quick)
    failed = []
    for script, options, quick in STUDIES:
        name = " ".join([script, *options])
        if args.quick and quick is None:
            continue
        if done.get(name, {}).get("commit") == machine.commit() != "":
            print(f"{name}: done")
            continue
        given = ["--quick", *(quick or [])] if args.quick else options
        start = time.perf_counter()
        cache = args.output / "cache" if args.quick else None
        code = subprocess.run(command(script, given, args.output if own else None, cache), check=False).returncode
        seconds = time.perf_counter() - start
        print(f"{name}: {'ended' if code == 0 else f'failed, exit code {code}'}, {seconds:.0f} s", flush=True)
        if code:
            failed.append(name)
            continue
        done[name] = {"seconds": round(seconds, 1), "commit": machine.commit(), "machine": machine.describe()}
        files.replace(path, done)
    if failed:
        raise SystemExit(f"{len(failed)} of {len(STUDIES)} failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
