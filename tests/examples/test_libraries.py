# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Studies with accelerate, with Trainer, and with libraries that the tests do without, as they are on PyPI:
pip install -e ".[test,heavy,serve]", then pytest tests/examples."""

import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close


EXAMPLES = Path(__file__).parents[2] / "examples" / "studies"
TWO = ["--multi_gpu", "--num_processes", "2", "--main_process_port", "0"]
FLAGS = ["--epochs", "2", "--gradient-accumulation", "2", "--gradient-checkpointing"]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def launch(tmp_path_factory):
    def run(launcher, *flags):
        folder = tmp_path_factory.mktemp("accelerate")
        script = str(EXAMPLES / "finetune_accelerate.py")
        launch = ["-m", "accelerate.commands.launch", *launcher] if launcher else []
        command = [sys.executable, *launch, script, *flags]
        environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
        root = str(EXAMPLES.parents[1])
        environment["PYTHONPATH"] = os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])
        done = subprocess.run([*command, "--output", str(folder)], capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr[-3000:]
        assert "largest difference of an output 0.0e+00" in done.stdout
        return json.loads((folder / "results.json").read_text()), load_file(folder / "adapter_model.safetensors")

    return run


@pytest.fixture(scope="module")
def alone(launch):
    return launch([], *FLAGS)


@pytest.mark.parametrize("sharded", [False, True], ids=["ddp", "fsdp2"])
def test_two_processes_give_the_losses_of_one(launch, alone, sharded):
    results, adapter = launch(TWO, *FLAGS, *(["--fsdp2"] if sharded else []))

    assert results["processes"] == 2
    assert results["kind"] == ("fully_shard" if sharded else "MULTI_CPU")
    assert len(results["losses"]) == 12
    assert results["losses"][-1] < results["losses"][0]
    assert results["losses"] == pytest.approx(alone[0]["losses"], abs=1e-5)
    # whole tensors, and the same ones
    assert {key: value.shape for key, value in adapter.items()} == {k: v.shape for k, v in alone[1].items()}
    for key, value in adapter.items():
        assert_close(value, alone[1][key], rtol=0, atol=1e-4)


def test_bfloat16_and_compilation(launch, alone):
    results, _ = launch([], *FLAGS[:4], "--bf16", "--compile")

    assert results["losses"] == pytest.approx(alone[0]["losses"], abs=0.05)
    assert results["losses"] != alone[0]["losses"]


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


def test_a_killed_run_continues_as_if_nothing_had_happened(tmp_path):
    example = importlib.import_module("finetune_trainer")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    example.main([*OPTIONS, "--output", str(whole)])

    command = [sys.executable, "-c", KILLED, str(EXAMPLES / "finetune_trainer.py"), *OPTIONS, "--output", str(killed)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr[-3000:]
    place = killed / "seed0" / "LoTRA"
    assert not (place / "result.json").exists()
    assert "checkpoint-30" in {path.name for path in place.glob("checkpoint-*")}
    # as if it had been killed while it wrote the next checkpoint
    (place / "checkpoint-40").mkdir()
    (place / "checkpoint-40" / "trainer_state.json").write_text('{"global_step": 40, "log_hist')

    example.main([*OPTIONS, "--output", str(killed), "--resume"])
    expected, found = (json.loads((path / "results.json").read_text()) for path in (whole, killed))
    assert found[0]["LoTRA"]["losses"] == expected[0]["LoTRA"]["losses"]
    assert len(found[0]["LoTRA"]["losses"]) == 6
    assert found == expected
    for name in ("LoTRA", "full-fine-tuning"):
        for path in sorted((whole / "seed0" / name / "best").glob("*.safetensors")):
            again = load_file(killed / "seed0" / name / "best" / path.name)
            assert all(torch.equal(tensor, again[key]) for key, tensor in load_file(path).items())

    # the adapter, and nothing of the base
    for checkpoint in place.glob("checkpoint-*"):
        assert not (checkpoint / "model.safetensors").exists()
        assert all("lotra_" in key for key in load_file(checkpoint / "adapter_model.safetensors"))


def test_neuralforecast(tmp_path, monkeypatch):
    """The recipe, which .ci/examples leaves out, checks itself."""
    pytest.importorskip("neuralforecast")
    monkeypatch.chdir(tmp_path)

    runpy.run_path(str(EXAMPLES.parents[1] / "docs" / "recipes" / "forecasts.py"))

    assert (tmp_path / "airlines" / "Airline1" / "adapter_model.safetensors").exists()


def test_ray_serve(tmp_path):
    """Each answer is that of the bank, though a replica is killed and an adapter replaced meanwhile."""
    pytest.importorskip("ray")
    script = EXAMPLES.parent / "serve" / "load_test.py"
    subprocess.run([sys.executable, script, "--quick", "--output", tmp_path], check=True)
    results = json.loads((tmp_path / "serve.json").read_text())
    runs = [*results["runs"], results["accident"]]

    assert len(runs) == 5
    assert all(run["requests"] >= 200 and run["wrong"] == 0 for run in runs)
    assert results["accident"]["wrong after the reload"] == 0
