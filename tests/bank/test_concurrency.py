# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""A bank that threads use and change at once: each row and each saved adapter is a version that was there.

LOTRA_STRESS_ROUNDS=1000 pytest tests/bank/test_concurrency.py
"""

import copy
import itertools
import os
import random
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from helpers import Versions, adapt
from peft import PeftModel, get_peft_model_state_dict

from peft_lotra import AdapterBank
from peft_lotra.kan import KAN


ROUNDS = int(os.environ.get("LOTRA_STRESS_ROUNDS", "40"))
STATES = 12
OTHERS = 300  # adapters that nobody changes: a bank of this size takes a while to save and to compact
ROWS = 200
# so that the layout changes with the adapters that are present
FORMS = [
    {"r": 1},
    {"r": 3},
    {"r": ("full", "full", 1)},
    {"r": ("full", "full", 1), "adapt_residual": False},
    {"r": "full"},
]
STAYING = [f"stays{number}" for number in range(6)]
COMING = [f"comes{number}" for number in range(6)]
NAMES = STAYING + COMING
X = torch.linspace(-0.9, 0.9, 48).view(16, 3)


class Stress:
    """A bank, the versions of its adapters, and their answers by themselves."""

    def __init__(self, folder):
        self.folder = folder
        self.base = KAN([3, 5, 2]).eval()
        self.base_of_saved = copy.deepcopy(self.base)
        self.base_of_exported = copy.deepcopy(self.base)
        self.states = []
        answers = []
        for number in range(STATES):
            model = adapt(copy.deepcopy(self.base), **FORMS[number % len(FORMS)])
            self.states.append(get_peft_model_state_dict(model))
            with torch.no_grad():
                answers.append(model(X))
        self.answers = torch.stack(answers)
        self.bank = AdapterBank(self.base)
        self.versions = Versions()
        self.numbers = itertools.count()  # each version has its own, and one of the states
        for number in range(OTHERS):
            self.bank.add(f"other{number}", self.states[0])
        for name in STAYING:
            self.add(name)
        self.model = self.bank.attach().eval()

    # --- what is checked ---

    def visible(self, names, since):
        """Return the versions of each name that were there at some time between `since` and now."""
        return {name: self.versions.visible(name, since) for name in names}

    def check_answers(self, y, rows, names, visible):
        """Check that all rows of a name have the answers of one version, and leave only such ones in `visible`."""
        for name in set(names):
            indices = [index for index, other in enumerate(names) if other == name]
            expected = self.answers[:, rows[indices]]
            possible = visible[name] - {None}
            visible[name] = {v for v in possible if torch.allclose(y[indices], expected[v % STATES], 1e-4, 1e-5)}
            assert visible[name], f"the rows of {name} are not the answers of one of its versions {possible}"

    def check_saved(self, bank, since):
        """Check the adapters of a file that was written between `since` and now."""
        visible = self.visible(NAMES, since)
        missing = {name for name in NAMES if name not in bank}
        assert all(None in visible[name] for name in missing), f"the file has no {missing}"
        names = [name for name in NAMES if name in bank for _ in X]
        rows = torch.arange(len(names)) % len(X)
        model = bank.attach().eval()
        with torch.no_grad():
            y = model(X[rows], adapter_names=names)
        bank.detach()
        self.check_answers(y, rows, names, visible)

    # --- what the threads do, again and again ---

    def pass_by_name(self):
        names = draw_names()
        rows = torch.randint(len(X), (len(names),))
        since = time.monotonic()
        try:
            with torch.no_grad():
                y = self.model(X[rows], adapter_names=names)
        except ValueError:
            assert any(None in versions for versions in self.visible(names, since).values()), names
            return
        self.check_answers(y, rows, names, self.visible(names, since))

    def pass_by_number(self):
        names = draw_names()
        rows = torch.randint(len(X), (len(names),))
        since = time.monotonic()
        try:
            ids = self.bank.ids(names)
        except ValueError:
            assert any(None in versions for versions in self.visible(names, since).values()), names
            return
        numbered = self.visible(names, since)
        for _ in range(4):  # the numbers stay, whatever is compacted meanwhile
            try:
                with torch.no_grad():
                    y = self.model(X[rows], ids=ids)
            except ValueError:
                assert any(len(versions) > 1 for versions in self.visible(names, since).values()), names
                return
            self.check_answers(y, rows, names, numbered)

    def add(self, name, **options):
        version = next(self.numbers)
        with self.versions.change(name, version):
            self.bank.add(name, self.states[version % STATES], **options)

    def replace(self):
        self.add(random.choice(STAYING), replace=True)

    def come_and_go(self):
        name = random.choice(COMING)
        if name not in self.bank:
            self.add(name)
            return
        with self.versions.change(name, None):
            self.bank.remove(name)

    def compact(self):
        self.bank.compact()

    def save_and_load(self):
        since = time.monotonic()
        self.bank.save(self.folder)
        saved = AdapterBank.load(self.base_of_saved, self.folder)
        self.check_saved(saved, since)

    def export(self):
        name = random.choice(NAMES)
        folder = self.folder / "exported"
        since = time.monotonic()
        try:
            self.bank.export(name, folder)
        except ValueError:
            assert None in self.versions.visible(name, since), name
            return
        visible = self.visible([name], since)
        model = PeftModel.from_pretrained(copy.deepcopy(self.base_of_exported), folder).eval()
        with torch.no_grad():
            y = model(X)
        self.check_answers(y, torch.arange(len(X)), [name] * len(X), visible)


def draw_names():
    """Return the names of a batch; most batches have none that may be missing."""
    missing = random.choices(COMING, k=random.choice([0, 0, 2]))
    return random.choices(STAYING, k=ROWS) + missing


@pytest.fixture
def eager_switches():
    """Let threads interrupt each other as often as they can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def test_threads_that_use_and_change_a_bank_see_versions_that_were_there(tmp_path, eager_switches):
    stress = Stress(tmp_path)
    stop = threading.Event()

    def repeat(action):
        try:
            for _ in range(ROUNDS):
                action()
                if stop.is_set():
                    return
        except BaseException:
            stop.set()
            raise

    actions = [stress.pass_by_name] * 2 + [stress.pass_by_number] * 2
    actions += [stress.replace, stress.come_and_go, stress.compact, stress.save_and_load, stress.export]
    with ThreadPoolExecutor(len(actions)) as threads:
        jobs = [threads.submit(repeat, action) for action in actions]

    for job in jobs:
        job.result()
    stress.save_and_load()  # exactly the last versions
