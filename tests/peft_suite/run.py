# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Runs PEFT's own generic tests, of the installed version of PEFT, for LoTRA on KAN layers.

    python tests/peft_suite/run.py [--sdist PEFT_SOURCE_FOLDER] [pytest arguments]

Without `--sdist` the source distribution is downloaded from PyPI. `lotra_for_lora.py` says how the tests are adapted.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import version
from pathlib import Path


HERE = Path(__file__).resolve().parent
FILES = ("test_config.py", "test_custom_models.py", "test_low_level_api.py")


def download(folder):
    options = ["--no-deps", "--no-binary", ":all:", "--no-build-isolation", "--quiet", "--dest", str(folder)]
    requirement = f"peft=={version('peft')}"
    subprocess.run([sys.executable, "-m", "pip", "download", *options, requirement], check=True)
    (archive,) = folder.glob("peft-*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    return folder / archive.name.removesuffix(".tar.gz")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sdist", type=Path, help="folder with the unpacked source distribution of PEFT")
    arguments, pytest_arguments = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        source = arguments.sdist or download(Path(folder))
        tests = Path(folder) / "peft_tests" / "tests"
        shutil.copytree(source / "tests", tests)
        (tests / "__init__.py").touch()  # they import each other relatively
        paths = [str(HERE), str(HERE.parent / "support"), str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")]
        command = [sys.executable, "-m", "pytest", "-p", "lotra_for_lora", "-p", "no:cacheprovider"]
        command += [f"--rootdir={tests.parent}", "-c", os.devnull, *(str(tests / file) for file in FILES)]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"}
        return subprocess.run([*command, *pytest_arguments], env=environment, cwd=tests.parent).returncode


if __name__ == "__main__":
    sys.exit(main())
