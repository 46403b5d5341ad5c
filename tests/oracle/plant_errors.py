# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Plant one error after another in a copy of the package, and report which ones the oracle finds.

`planted.json` lists the errors: each is one changed line. Those of the source "review" were chosen by hand. The others
are drawn from all changes of signs, indices, factors, terms and arguments in lines that compute, evenly by area.

    python tests/oracle/plant_errors.py              plant all errors, and record what finds them
    python tests/oracle/plant_errors.py 3 17         plant these alone
    python tests/oracle/plant_errors.py --draw 59    replace the drawn errors by those of another seed

It writes the list and the table of CONTRIBUTING.md. An error whose line is gone is reported, and another one is drawn.
"""

import argparse
import ast
import json
import multiprocessing
import os
import random
import re
import shutil
import sys
import tempfile
from collections import Counter
from pathlib import Path

import pytest
import scipy.interpolate  # noqa: F401 (before processes are forked, which share them)
import torch  # noqa: F401


ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "peft_lotra"
LIST = Path(__file__).with_name("planted.json")
PAGE = ROOT / "CONTRIBUTING.md"
PER_AREA = 6
# Files that compute outputs, coefficients or gradients, by area. Random starts have no reference.
AREAS = {
    "kan": "basis formula input_map layer network product refinement row_updates slim_kan update_product",
    "tuner": "by_row gradients grids hotswap jets layer model weighted",
    "bank": "bank layer reading snapshot storage",
    "layers": "coefficients derivatives formula layout",
    "derivatives": "api bases chain_rule layer_jet layers norms splines stages torch_fallback",
    "least_squares": "forgetting jacobian levenberg_marquardt normal_equations problem",
}
# The cases that run first, since they are likely to find an error of an area.
FIRST = {
    "kan": "product or refined or 17 or network or size or silu",
    "tuner": "hotswap or weighted or (merge and own) or (mixed and conv) or sample or 17",
    "bank": "bank or 17",
    "layers": "forward or compiled or coefficients",
    "derivatives": "jets or derivatives or step",
    "least_squares": "step",
}
SKIPPED_FUNCTIONS = re.compile("_?(check|refuse|warn|reset_parameters)|(extra)?_?_repr")
# functions of names and types, or whose arguments may be exchanged
SKIPPED_CALLS = re.compile("isinstance|[gsh][ea][tsx]*attr|zip|range|max|min|promote_types|.*Error|warn|cast|partial")


# --- the drawn errors ---


def changes(path):
    """Yield the changes of one line of a file."""
    text = path.read_text()
    lines = text.splitlines()
    for statement in _statements(ast.parse(text)):
        for node in ast.walk(statement):
            if getattr(node, "end_lineno", None) != getattr(node, "lineno", None):
                continue
            for kind, new in _changed(node):
                line = lines[node.lineno - 1].encode()
                changed = line[: node.col_offset] + new.encode() + line[node.end_col_offset :]
                old = line.decode()
                number = lines[: node.lineno - 1].count(old)
                yield {"kind": kind, "old": old.strip(), "new": changed.decode().strip(), "number": number}


def _statements(node, in_function=False):
    """Yield the statements of functions that compute: no messages, checks, and defaults."""
    for field in ("body", "orelse", "finalbody", "handlers"):
        block = getattr(node, field, [])
        if any(isinstance(child, ast.Raise) for child in block):
            continue
        for child in block:
            if isinstance(child, ast.FunctionDef):
                if not SKIPPED_FUNCTIONS.match(child.name):
                    yield from _statements(child, True)
            elif in_function and isinstance(child, (ast.Assign, ast.AugAssign, ast.Return, ast.Expr)):
                is_docstring = isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant)
                if not is_docstring and not any(isinstance(part, ast.JoinedStr) for part in ast.walk(child)):
                    yield child
            else:
                yield from _statements(child, in_function)


def _changed(node):
    """Yield the kinds of errors at a node, and its text with the error."""
    if isinstance(node, ast.AugAssign) and not isinstance(node.value, ast.List):
        operators = {ast.Add: ("sign", "-="), ast.Sub: ("sign", "+="), ast.Mult: ("factor", "/=")}
        if type(node.op) in operators:
            kind, operator = operators[type(node.op)]
            yield kind, f"{ast.unparse(node.target)} {operator} {ast.unparse(node.value)}"
    elif isinstance(node, ast.BinOp):
        left, right = ast.unparse(node.left), ast.unparse(node.right)
        if any(mark in left + right for mark in "'\"["):  # texts and lists
            return
        operators = {ast.Add: ("sign", "-"), ast.Sub: ("sign", "+"), ast.Mult: ("factor", "/")}
        if type(node.op) in operators:
            kind, operator = operators[type(node.op)]
            yield kind, f"({left}) {operator} ({right})"
            dropped = "factor" if kind == "factor" else "term"
            yield dropped, f"({left})"
            yield dropped, f"({right})"
        elif isinstance(node.op, ast.Div):
            yield "factor", f"({left})"
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        yield "sign", ast.unparse(node.operand)
    elif isinstance(node, ast.Constant) and type(node.value) is int:
        yield "index", str(node.value + 1)
    elif isinstance(node, ast.Constant) and type(node.value) is float:
        yield "factor", str(node.value * 2)
    elif isinstance(node, ast.Call):
        name = ast.unparse(node.func).rpartition(".")[2]
        has_stars = any(isinstance(argument, ast.Starred) for argument in node.args)
        if len(node.args) < 2 or has_stars or SKIPPED_CALLS.fullmatch(name):
            return
        first, second, *others = node.args
        # arguments of different kinds would raise at once
        if type(first) is type(second) and ast.dump(first) != ast.dump(second):
            arguments = [second, first, *others, *node.keywords]
            texts = ", ".join(map(ast.unparse, arguments))
            yield "swap", f"{ast.unparse(node.func)}({texts})"


def drawn(area, seed):
    """Yield errors of an area in the order of a seed: first a kind of errors is drawn, then a line."""
    by_kind = {}
    for name in AREAS[area].split():
        path = PACKAGE / area / f"{name}.py"
        for change in changes(path):
            file = str(path.relative_to(PACKAGE))
            by_kind.setdefault(change["kind"], []).append({"file": file, **change})
    generator = random.Random(f"{seed} {area}")
    while any(by_kind.values()):
        kind = generator.choice(sorted(by_kind))
        if by_kind[kind]:
            yield by_kind[kind].pop(generator.randrange(len(by_kind[kind])))


def add_drawn(errors, area, seed, count):
    """Add drawn errors, at most one for each line."""
    lines = {(error["file"], error["old"], error["number"]) for error in errors}
    for error in drawn(area, seed):
        line = (error["file"], error["old"], error["number"])
        if count and line not in lines:
            lines.add(line)
            count -= 1
            errors.append({**error, "source": f"seed {seed}", "found": ""})


# --- planting ---


def plant(error, package):
    """Change the line in a copy of the package; return whether it was there."""
    path = package / error["file"]
    lines = path.read_text().splitlines(keepends=True)
    places = [number for number, line in enumerate(lines) if line.strip() == error["old"]]
    if error["number"] >= len(places):
        return False
    place = places[error["number"]]
    lines[place] = lines[place].replace(error["old"], error["new"])
    path.write_text("".join(lines))
    return True


def run_oracle(error, limit):
    """Run the oracle on a copy of the package that has the error.

    Returns:
        The first case that is red; "" if none is; "gone" if the package has no such line.
    """
    with tempfile.TemporaryDirectory() as folder:
        package = Path(folder, "peft_lotra")
        shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns("__pycache__"))
        if error is not None and not plant(error, package):
            return "gone"
        first = FIRST[error["file"].partition("/")[0]] if error else ""
        selections = [["-k", first], ["-k", f"not ({first})"]] if first else [[]]
        for selection in selections:
            red = _run_pytest(folder, selection, limit)
            if red:
                return red
    return ""


def _run_pytest(folder, options, limit):
    """Run cases on the package in a folder; return the first that is red, "" if none is.

    The process is a fork of this one, which has imported the libraries already.
    """
    output = Path(folder, "output")
    process = multiprocessing.get_context("fork").Process(target=_pytest, args=(folder, output, options))
    process.start()
    process.join(limit)
    if process.is_alive():
        process.kill()
        return "time limit"
    if not process.exitcode:
        return ""
    case = re.search(r"^(?:FAILED|ERROR) (?:.*::)?(.+?)(?: - .*)?$", output.read_text(), re.MULTILINE)
    return case.group(1) if case else f"exit status {process.exitcode}"


def _pytest(folder, output, options):
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.chdir(folder)
    sys.path[:0] = [folder, str(ROOT / "tests/support")]
    arguments = ["-x", "-q", "--tb=no", "-p", "no:cacheprovider", "--rootdir", str(ROOT)]
    status = pytest.main([*arguments, "-c", str(ROOT / "pyproject.toml"), str(LIST.parent), *options])
    os._exit(int(status))


def table(errors):
    """Return the numbers of errors by area as a Markdown table, and those that are not found with the reasons."""
    columns = ("planted", "found", "equivalent", "missed")
    rows = [f"| area | {' | '.join(columns)} |", "|---|--:|--:|--:|--:|"]
    counts = {area: Counter() for area in (*AREAS, "all")}
    remarks = []
    for error in errors:
        if error["found"] == "gone":
            continue
        verdict = "found" if error["found"] else "equivalent" if "equivalent" in error else "missed"
        for area in (error["file"].partition("/")[0], "all"):
            counts[area].update(["planted", verdict])
        if verdict != "found":
            reason = error.get(verdict, "not looked at")
            remarks.append(f"- {verdict}: `{error['old']}` becomes `{error['new']}` in `{error['file']}`: {reason}")
    for area, numbers in counts.items():
        rows.append(f"| {area} | {' | '.join(str(numbers[column]) for column in columns)} |")
    return "\n".join([*rows, "", *remarks])


def write(errors):
    """Write the list, and its table into the page."""
    LIST.write_text(json.dumps(errors, indent=1) + "\n")
    before, mark, rest = PAGE.read_text().partition("<!-- planted errors -->\n")
    _, end, after = rest.partition("<!-- end of planted errors -->")
    PAGE.write_text(f"{before}{mark}{table(errors)}\n{end}{after}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("numbers", nargs="*", type=int)
    parser.add_argument("--draw", type=int, metavar="SEED")
    parser.add_argument("--limit", type=float, default=300, help="seconds for each error")
    arguments = parser.parse_args()

    errors = json.loads(LIST.read_text())
    if arguments.draw is not None:
        errors = [error for error in errors if error["source"] == "review"]
        for area in AREAS:
            add_drawn(errors, area, arguments.draw, PER_AREA)
        write(errors)
        return
    if red := run_oracle(None, arguments.limit):
        sys.exit(f"The oracle is red without an error: {red}")
    for number, error in enumerate(errors):  # which grows
        if arguments.numbers and number not in arguments.numbers:
            continue
        error["found"] = run_oracle(error, arguments.limit)
        print(f"{number:3} {error['file']}: {error['new']}: {error['found'] or 'NOT FOUND'}", flush=True)
        if error["found"] == "gone" and "replaced" not in error:
            error["replaced"] = True
            add_drawn(errors, error["file"].partition("/")[0], len(errors), 1)
        write(errors)


if __name__ == "__main__":
    main()
