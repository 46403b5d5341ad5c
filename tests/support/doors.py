# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""The ways by which files of adapters come in, tried with files that damage or malice has made."""

from __future__ import annotations

import argparse
import ast
import copy
import io
import json
import os
import random
import re
import resource
import shutil
import tempfile
import time
import traceback
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from hostile import CLEAR, TooSlow, X, differences, state_of, time_limit
from peft import PeftModel
from subjects import (
    ALPHA,
    SUBJECTS,
    WEIGHTS,
    Files,
    base_output,
    expected_output,
    read_tensors,
    sound_files,
    with_adapter,
)
from torch import Tensor
from typer.main import get_command

from peft_lotra import hotswap_adapter, write_model_card


HUNG = 5.0  # seconds, see `time_limit`
PLANTED = "pwned"  # the function that hostile strings call


class Case(NamedTuple):
    kinds: list[str]  # of damage, in words
    files: Files
    expected: Tensor | None  # the output of an adapter that is accepted; `None` if it is to be read from the files
    subject: str = "plain"  # the model, of `SUBJECTS`


def put(files: Files, folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name, content in files.items():
        path = folder / name
        if content == "/":
            path.mkdir()
        elif content == "|":
            os.mkfifo(path)
        elif isinstance(content, str):
            path.symlink_to(content)
        else:
            path.write_bytes(content)


# -- the doors ------------------------------------------------------------------------------------------------------


@cache
def _command() -> Any:
    from peft_lotra.cli import app

    return get_command(app)


class Doors:
    """Sends folders through all doors; the models that it uses are kept until one has changed."""

    def __init__(self, subject: str) -> None:
        self.subject = subject
        self.live_config = {"alpha": ALPHA, **SUBJECTS[subject].config}
        self.bare = self.live = None
        # copies cost less than models that are made anew
        self.sound = SUBJECTS[subject].make(), with_adapter(subject, 11, "existing")
        with torch.no_grad():
            self.live_output = self.sound[1](X)

    def models(self) -> None:
        if self.bare is None:
            self.bare = copy.deepcopy(self.sound[0])
            self.bare_state = state_of(self.bare)
        if self.live is None:
            self.live = copy.deepcopy(self.sound[1])
            self.live_state = state_of(self.live)

    def load(self, folder: Path) -> Tensor:
        bare, self.bare = self.bare, None
        return PeftModel.from_pretrained(bare, folder).eval()(X)

    def load_beside(self, folder: Path) -> Tensor:
        live, self.live = self.live, None
        live.load_adapter(folder, "other")
        assert torch.equal(live(X), self.live_output), "a loaded adapter changed another one"
        live.set_adapter("other")
        return live(X)

    def load_over(self, folder: Path) -> Tensor:
        live, self.live = self.live, None
        live.load_adapter(folder, "existing")
        with live.disable_adapter():
            assert torch.equal(live(X), base_output(self.subject).to(X)), "the base was changed"
        return live(X)

    def hotswap(self, folder: Path) -> Tensor:
        live, self.live = self.live, None
        hotswap_adapter(live, folder, "existing")
        return live(X)

    def inspect(self, folder: Path, *flags: str) -> None:
        printed = io.StringIO()
        with redirect_stdout(printed), redirect_stderr(printed), suppress(SystemExit):
            _command()(["inspect", str(folder), *flags], prog_name="peft-lotra")
        text = printed.getvalue()
        strange = {letter for letter in text if not letter.isprintable() and letter != "\n"}
        assert not strange, f"printed {strange}"
        raw = re.search(r"^error: ([A-Z]\w+(?:Error|Exception|Iteration|Exit)): ", text, re.MULTILINE)
        assert not raw, f"raw {text[:200]}"
        if re.search("^error: ", text, re.MULTILINE):
            raise ValueError(text)
        if flags:
            json.loads(printed.getvalue())

    def inspect_json(self, folder: Path) -> None:
        self.inspect(folder, "--json")

    def card(self, folder: Path) -> None:
        write_model_card(None, folder)
        text = (folder / "README.md").read_text(encoding="utf-8")
        assert len(text) < 2_000_000, f"the card has {len(text)} characters"
        _, front, body = re.split(r"^---$", text, maxsplit=2, flags=re.MULTILINE)
        assert isinstance(yaml.safe_load(front), dict)
        blocks = re.findall(r"^```python\n(.*?)^```$", body, re.DOTALL | re.MULTILINE)
        assert blocks, "the card has no code"
        for block in blocks:
            calls = [node.func for node in ast.walk(ast.parse(block)) if isinstance(node, ast.Call)]
            names = {getattr(call, "attr", getattr(call, "id", "")) for call in calls}
            assert PLANTED not in names, f"the card calls a function of the file: {block}"
        (folder / "README.md").unlink()

    DOORS = ("load", "load_beside", "load_over", "hotswap", "inspect", "inspect_json", "card")

    def try_door(self, name: str, folder: Path, case: Case) -> tuple[str, str, float]:
        """Returns how it ended, what is wrong (empty if nothing is), and the seconds of the processor."""
        self.models()
        bare, live = self.bare, self.live
        started = time.process_time()
        wrong = ""
        try:
            with time_limit(HUNG), torch.no_grad():
                y = getattr(self, name)(folder)
            seconds = time.process_time() - started
            ended = "accepted"
        except TooSlow:
            seconds, ended, wrong = time.process_time() - started, "hung", f"hung for {HUNG} s"
        except AssertionError as error:
            seconds, ended, wrong = time.process_time() - started, "accepted", str(error)[:300]
        except BaseException as error:
            seconds = time.process_time() - started
            ended, wrong = self._judge(error)
            for model, state, kind in ((bare, self.bare_state, "bare"), (live, self.live_state, "live")):
                if changed := differences(state, state_of(model)):
                    wrong = f"{wrong}; {type(error).__name__} changed the {kind} model: {changed[:3]}"
                    setattr(self, kind, None)
                else:
                    setattr(self, kind, model)
        else:
            wrong = "" if y is None else self._compare(y, case, self.live_config if name == "load_over" else None)
        return ended, wrong, seconds

    def _compare(self, y: Tensor, case: Case, config: dict[str, Any] | None) -> str:
        """How an output differs from what the files say, by their config or by that of an adapter there."""
        try:
            expected = (
                expected_output(self.subject, case.files, config) if config or case.expected is None else case.expected
            )
        except Exception as error:  # not of the package
            return f"accepted, but of no output that can be computed from the files: {error!r:.150}"
        size = expected.abs().max().clamp(min=0.1)
        error = ((y.double() - expected).abs().max() / size).item()
        if not y.isfinite().all():  # beyond, float32 overflows, between two of the steps too
            values = read_tensors(case.files[WEIGHTS]).values()
            largest = max([size, *(tensor.abs().max().double() for tensor in values if tensor.numel())])
            return f"another output, {y.flatten()[:4]}" if largest < 1e15 else ""
        return f"another output, off by {error:.1e}" if not error < 1e-4 and size < 1e30 else ""

    def _judge(self, error: BaseException) -> tuple[str, str]:
        if isinstance(error, CLEAR):
            return "refused", ""
        frames = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
        own = f"{Path(__import__('peft_lotra').__file__).parent}{os.sep}"
        in_peft = f"{os.sep}peft{os.sep}" in frames[-1]
        if not any(name.startswith(own) for name in frames) or in_peft and not isinstance(error, MemoryError):
            return f"refused by PEFT ({type(error).__name__})", ""
        where = traceback.extract_tb(error.__traceback__)[-1]
        at = f"{Path(where.filename).name}:{where.lineno}"
        return "raw", f"raw {type(error).__name__} at {at}: {str(error)[:150]}"


def run(
    count: int,
    generate: Callable[[random.Random], Case],
    seed: int = 0,
    only: int | None = None,
    limit: float = 1.0,
) -> dict[str, Any]:
    """Sends `count` generated folders through all doors.

    Returns:
        The report: how each door ended, how each kind of damage did, what is wrong, the longest time, in seconds of
        the processor, and the growth of the peak memory of the process.
    """
    warnings.simplefilter("ignore")
    ended, by_kind = defaultdict(Counter), defaultdict(Counter)
    wrong, slowest, refused = [], dict.fromkeys(Doors.DOORS, 0.0), 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary, "adapter")
        by_subject = {subject: Doors(subject) for subject in SUBJECTS}
        for subject, doors in by_subject.items():  # imports what is imported late, fills caches
            put(sound_files(subject, 0), folder)
            for name in Doors.DOORS:
                how, problem, _ = doors.try_door(name, folder, Case([], sound_files(subject, 0), None, subject))
                assert (how, problem) == ("accepted", ""), (subject, name, how, problem)
        memory = _peak()
        for index in range(count) if only is None else [only]:
            case = generate(random.Random(f"{seed} {index}"))
            put(case.files, folder)
            doors, results = by_subject[case.subject], {}
            for name in Doors.DOORS:
                results[name], problem, seconds = doors.try_door(name, folder, case)
                for _ in range(2):
                    if seconds > limit:  # the machine may have had other things to do
                        seconds = min(seconds, doors.try_door(name, folder, case)[2])
                if seconds > limit and name != "load_over":  # whose reading is PEFT's alone
                    problem += f"; took {seconds:.2f} s"
                ended[name][results[name]] += 1
                slowest[name] = max(slowest[name], seconds)
                if problem:
                    wrong.append({"index": index, "door": name, "kinds": case.kinds, "what": problem})
                    print(f"{index}, {name}, {'; '.join(case.kinds)[:200]}: {problem}", flush=True)
            for kind in case.kinds:
                by_kind[f"{case.subject}, {kind.partition(':')[0]}"][results["load"]] += 1
            refused += results["load"] != "accepted"
            if index % 500 == 499:
                print(f"{index + 1:,} cases, {len(wrong)} wrong", flush=True)
    return {
        "cases": count if only is None else 1,
        "seed": seed,
        "doors": {name: dict(counts.most_common()) for name, counts in ended.items()},
        "wrong": wrong,
        "slowest, seconds": {name: round(seconds, 3) for name, seconds in slowest.items()},
        "growth of the peak memory, MiB": round(_peak() - memory, 1),
        "refused by loading": refused,
        "kinds, by loading": {kind: dict(counts) for kind, counts in sorted(by_kind.items())},
    }


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


@contextmanager
def memory_limit(mebibytes: int) -> Iterator[None]:
    """Lets this process have at most as many MiB more than it has: what asks for more raises a MemoryError."""
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (now + (mebibytes << 20), before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def main(description: str, generate: Callable[[random.Random], Case], limit: float = 1.0) -> None:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="the index of one case, to look at")
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    run(1, generate)  # what the libraries map on their first call is not of a file
    with memory_limit(1024):
        report = run(arguments.count, generate, arguments.seed, arguments.only, limit)
    arguments.output.write_text(json.dumps(report, indent=2) + "\n")
    for name, counts in report["doors"].items():
        print(f"{name:14} {report['slowest, seconds'][name]:7.3f} s at most   {counts}")
    print(
        f"{report['cases']:,} cases, {len(report['wrong'])} wrong; peak memory grew by "
        f"{report['growth of the peak memory, MiB']} MiB"
    )
