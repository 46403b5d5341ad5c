# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""`examples/studies/finetune_accelerate.py`: one process, two, and a sharded model give the same losses."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file


EXAMPLE = Path(__file__).parents[2] / "examples" / "studies" / "finetune_accelerate.py"
TWO = ["--multi_gpu", "--num_processes", "2", "--main_process_port", "0"]
FLAGS = ["--epochs", "4", "--gradient-accumulation", "2", "--gradient-checkpointing"]


@pytest.fixture(scope="module")
def launch(tmp_path_factory):
    def run(launcher: list[str], *flags: str) -> tuple[dict, dict[str, torch.Tensor]]:
        folder = tmp_path_factory.mktemp("accelerate")
        command = [sys.executable, "-m", "accelerate.commands.launch", *launcher, str(EXAMPLE), *flags]
        environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
        root = str(EXAMPLE.parents[2])
        environment["PYTHONPATH"] = os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])
        done = subprocess.run(
            [*command, "--output", str(folder)], capture_output=True, text=True, timeout=240, env=environment
        )
        assert done.returncode == 0, done.stderr[-3000:]
        if "--bf16" not in command:  # where the trained model answers in bfloat16, and the reloaded one does not
            assert "largest difference of an output 0.0e+00" in done.stdout
        return json.loads((folder / "results.json").read_text()), load_file(folder / "adapter_model.safetensors")

    return run


@pytest.fixture(scope="module")
def alone(launch):
    return launch(["--cpu"], *FLAGS)


@pytest.mark.slow
@pytest.mark.parametrize("sharded", [False, True], ids=["ddp", "fsdp2"])
def test_two_processes_give_the_losses_of_one(launch, alone, sharded):
    results, adapter = launch(TWO, *FLAGS, *(["--fsdp2"] if sharded else []))
    assert results["processes"] == 2 and results["kind"] == ("fully_shard" if sharded else "MULTI_CPU")
    assert len(results["losses"]) == 24 and results["losses"][-1] < results["losses"][0]
    assert results["losses"] == pytest.approx(alone[0]["losses"], abs=1e-5)
    # whole tensors, and the same ones
    assert {key: value.shape for key, value in adapter.items()} == {k: v.shape for k, v in alone[1].items()}
    for key, value in adapter.items():
        torch.testing.assert_close(value, alone[1][key], rtol=0, atol=1e-4)


@pytest.mark.slow
def test_bfloat16_and_compilation(launch, alone):
    results, _ = launch(["--cpu"], *FLAGS[:4], "--bf16", "--compile")
    assert results["losses"] == pytest.approx(alone[0]["losses"], abs=0.05)
    assert results["losses"] != alone[0]["losses"]
