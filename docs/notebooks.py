# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""The notebooks of docs/tutorials, from the pages that docs/render.py made.

python docs/notebooks.py            # writes them
python docs/notebooks.py --check    # are they those of the pages?

A notebook has the words, the code, the outputs and the pictures of its page, a badge that opens it in Colab, and a cell
that installs the package from the repository of pyproject.toml.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import io
import json
import os
import re
import sys
import tomllib
from pathlib import Path
from typing import Any

from PIL import Image


ROOT = Path(__file__).resolve().parents[1]
TUTORIALS = ROOT / "docs" / "tutorials"
# what a notebook needs beside the package
ONNX = ["onnx", "onnxscript", "onnxruntime"]
REQUIREMENTS = {"adapt": [], "pykan": ["pykan", "pandas", *ONNX], "pde": []}
WIDTH = 1000  # of a picture, in pixels

COMMENT = re.compile(r"<!--.*?-->\n*", re.DOTALL)
BLOCK = re.compile(
    r"^```python\n(?P<code>.*?)^```$"
    r"|^(?P<fence>`{3,})output\n(?P<text>.*?)^(?P=fence)$"
    r"|^!\[[^\n]*\]\((?P<picture>\.\./assets/pages/[^\n]*)\)$",
    re.DOTALL | re.MULTILINE,
)
LINK = re.compile(r"\]\((?!https?:|#)([^)\s#]+)")


def project_settings() -> dict[str, Any]:
    """Return the content of pyproject.toml."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    return tomllib.loads(text)


def repository() -> str:
    """Return the address of the repository."""
    return project_settings()["project"]["urls"]["Repository"]


def is_published() -> bool:
    """Return whether this address exists."""
    return project_settings()["tool"]["peft-lotra"]["published"]


def markdown_cell(text: str) -> dict[str, Any]:
    return {"cell_type": "markdown", "metadata": {}, "source": text}


def code_cell(code: str) -> dict[str, Any]:
    return {
        "cell_type": "code",
        "execution_count": None,
        "metadata": {},
        "outputs": [],
        "source": code,
    }


def text_output(text: str) -> dict[str, Any]:
    return {"name": "stdout", "output_type": "stream", "text": text}


def picture_output(path: Path) -> dict[str, Any]:
    """Return a smaller copy of a picture, and the digest of the original."""
    content = path.read_bytes()
    image = Image.open(io.BytesIO(content)).convert("RGB")
    if image.width > WIDTH:
        height = round(image.height * WIDTH / image.width)
        image = image.resize((WIDTH, height), Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    image.quantize(48).save(stream, "png", optimize=True)
    return {
        "data": {"image/png": base64.b64encode(stream.getvalue()).decode()},
        "metadata": {"original_sha256": hashlib.sha256(content).hexdigest()},
        "output_type": "display_data",
    }


def with_absolute_links(text: str) -> str:
    """Return Markdown whose links lead to the repository."""

    def link(match: re.Match) -> str:
        path = (TUTORIALS / match[1]).resolve().relative_to(ROOT)
        return f"]({repository()}/blob/main/{path.as_posix()}"

    return LINK.sub(link, text)


def first_cells(name: str) -> list[dict[str, Any]]:
    """Return the badge, and the cell that installs the package."""
    address = repository()
    project = address.removeprefix("https://github.com/")
    badge = "https://colab.research.google.com/assets/colab-badge.svg"
    notebook = f"{project}/blob/main/docs/tutorials/{name}.ipynb"
    colab = f"https://colab.research.google.com/github/{notebook}"
    package = f'"peft-lotra[examples] @ git+{address}"'
    packages = " ".join([package, *REQUIREMENTS[name]])
    words = f"[![Open in Colab]({badge})]({colab})"
    if not is_published():
        words += (
            "\n\nThe badge, the next cell and the links work once the repository is public. Until then, open this "
            f'notebook in a clone, and run `pip install "PATH/TO/THE/CLONE[examples]" {" ".join(REQUIREMENTS[name])}'
        ).rstrip() + "` instead of the next cell."
    return [
        markdown_cell(words),
        code_cell(f"%pip install -q {packages}"),
    ]


def make_notebook(page: Path) -> dict[str, Any]:
    """Return the notebook of a page."""
    text = COMMENT.sub("", page.read_text(encoding="utf-8"))
    cells = first_cells(page.stem)
    end = 0
    for block in BLOCK.finditer(text):
        words = text[end : block.start()].strip()
        end = block.end()
        if words:
            cells.append(markdown_cell(with_absolute_links(words)))
        if block["code"] is not None:
            cells.append(code_cell(block["code"].rstrip("\n")))
        elif block["text"] is not None:
            cells[-1]["outputs"].append(text_output(block["text"]))
        else:
            picture = page.parent / block["picture"]
            cells[-1]["outputs"].append(picture_output(picture))
    cells.append(markdown_cell(with_absolute_links(text[end:].strip())))

    count = 0
    for index, cell in enumerate(cells):
        cell["id"] = f"cell-{index}"
        if cell["cell_type"] == "code" and index > 1:  # not the installation
            count += 1
            cell["execution_count"] = count
    kernel = {"display_name": "Python 3", "language": "python"}
    return {
        "cells": cells,
        "metadata": {
            "kernelspec": {**kernel, "name": "python3"},
            "language_info": {"name": "python"},
        },
        "nbformat": 4,
        "nbformat_minor": 5,
    }


def without_pictures(notebook: dict[str, Any]) -> dict[str, Any]:
    """Return a notebook without the bytes of its pictures, which depend on the version of Pillow."""
    copy = json.loads(json.dumps(notebook))
    for cell in copy["cells"]:
        for output in cell.get("outputs", []):
            if "image/png" in output.get("data", {}):
                output["data"]["image/png"] = ""
    return copy


def stale() -> dict[Path, dict[str, Any]]:
    """Return the notebooks that are missing or are not those of their pages."""
    notebooks = {}
    for name in REQUIREMENTS:
        path = TUTORIALS / f"{name}.ipynb"
        new = make_notebook(path.with_suffix(".md"))
        old = {"cells": []}
        if path.is_file():
            old = json.loads(path.read_text(encoding="utf-8"))
        if without_pictures(old) != without_pictures(new):
            notebooks[path] = new
    return notebooks


def main() -> None:
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS, description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--check", action="store_true")
    is_check = parser.parse_args().check
    notebooks = stale()
    names = [os.path.relpath(path, ROOT) for path in notebooks]
    if is_check and names:
        listed = "\n".join(names)
        sys.exit(f"Not current, run `python docs/notebooks.py`:\n{listed}")
    for path, notebook in notebooks.items():
        text = json.dumps(
            notebook, indent=1, ensure_ascii=False, sort_keys=True
        )
        path.write_text(text + "\n", encoding="utf-8")
    print("\n".join(names) or "all notebooks are current")


if __name__ == "__main__":
    main()
