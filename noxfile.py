#!/usr/bin/env -S uv run --script
# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

# /// script
# dependencies = ["nox>=2025.2.9"]
# ///

"""Shortcuts: `nox -s tests`. The others run a script of .ci/, as the workflows do."""

import nox


nox.needs_version = ">=2025.2.9"
nox.options.default_venv_backend = "uv|virtualenv"


@nox.session
def tests(session: nox.Session) -> None:
    """Runs the tests; arguments go to pytest."""
    session.install("-e", ".[test]")
    session.run("python", "-m", "pytest", "-n", "2", *session.posargs)


def run_script(session: nox.Session, name: str) -> None:
    session.install("-e", ".[test,docs]", "build", "twine", "mypy", "sp-repo-review[cli]")
    session.run(f".ci/{name}", external=True, env={"PYTHON": f"{session.bin}/python"})


@nox.session
def lint(session: nox.Session) -> None:
    """Runs the linters and the type checker."""
    run_script(session, "lint")


@nox.session(default=False)
def docs(session: nox.Session) -> None:
    """Builds the site."""
    run_script(session, "docs")


@nox.session(default=False)
def examples(session: nox.Session) -> None:
    """Runs the scripts of examples/."""
    run_script(session, "examples")


@nox.session(default=False)
def package(session: nox.Session) -> None:
    """Builds and checks the package."""
    run_script(session, "package")


if __name__ == "__main__":
    nox.main()
