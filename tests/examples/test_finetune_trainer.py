# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""`finetune_trainer.py`: checkpoints of the adapter alone, and a resume that continues bit for bit."""

import importlib
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file


EXAMPLE = Path(__file__).parents[2] / "examples" / "studies" / "finetune_trainer.py"
OPTIONS = ["--splits", "1", "--steps", "60", "--every", "10"]

# The example in a process that kills itself, between two steps of the adaptation, as no handler can prevent.
KILLED = """
import os, runpy, signal, sys
from transformers import Trainer, TrainerCallback

class Kill(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if args.output_dir.endswith("LoTRA") and state.global_step == 37:
            os.kill(os.getpid(), signal.SIGKILL)

original = Trainer.__init__

def with_killer(self, *args, **kwargs):
    original(self, *args, **kwargs)
    self.add_callback(Kill())

Trainer.__init__ = with_killer
sys.argv = sys.argv[1:]
sys.path.insert(0, os.path.dirname(sys.argv[0]))  # as where Python runs a script
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.slow
def test_a_killed_run_continues_as_if_nothing_had_happened(tmp_path):
    example = importlib.import_module("finetune_trainer")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    example.main([*OPTIONS, "--output", str(whole)])

    command = [sys.executable, "-c", KILLED, str(EXAMPLE), *OPTIONS, "--output", str(killed)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == -signal.SIGKILL, done.stderr[-3000:]
    place = killed / "seed0" / "LoTRA"
    assert not (place / "result.json").exists()
    assert "checkpoint-30" in {path.name for path in place.glob("checkpoint-*")}
    # as if it had been killed while it wrote the next checkpoint
    (place / "checkpoint-40").mkdir()
    (place / "checkpoint-40" / "trainer_state.json").write_text('{"global_step": 40, "log_hist')

    example.main([*OPTIONS, "--output", str(killed), "--resume"])
    expected, found = (json.loads((path / "results.json").read_text()) for path in (whole, killed))
    assert found[0]["LoTRA"]["losses"] == expected[0]["LoTRA"]["losses"] and len(found[0]["LoTRA"]["losses"]) == 6
    assert found == expected
    for name in ("LoTRA", "full-fine-tuning"):
        for path in sorted((whole / "seed0" / name / "best").glob("*.safetensors")):
            again = load_file(killed / "seed0" / name / "best" / path.name)
            assert all(torch.equal(tensor, again[key]) for key, tensor in load_file(path).items())

    # the adapter, and nothing of the base
    for checkpoint in place.glob("checkpoint-*"):
        assert not (checkpoint / "model.safetensors").exists()
        assert all("lotra_" in key for key in load_file(checkpoint / "adapter_model.safetensors"))
    assert (whole / "finetune_trainer.png").stat().st_size > 20_000
