# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Links from the docs into the repository, and its address, which pyproject.toml has."""

from __future__ import annotations

import importlib
import os
import re
import sys
import tempfile
from pathlib import Path

from mkdocs.structure.files import File


try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib


ROOT = Path(__file__).parents[1]
RESULTS = "examples/studies/results/"
# `../examples/pde.py` in a page leads from its file on GitHub to the file, and is none of the pages of the site
OUTSIDE = re.compile(r"\]\((?:\.\./)+((?:examples|tests|peft_lotra|docs/notes|[A-Z]+[\w.]*|pyproject)[^)\s]*)\)")
# what nbconvert adds for widgets
WIDGETS = re.compile(
    r"<script>\s*\(function\(\) \{\s*function addWidgetsRenderer.*?</script>"
    r'|<script type="application/vnd\.jupyter\.widget.*?</script>',
    re.DOTALL,
)


def on_config(config):
    urls = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]
    config.repo_url = urls["Repository"]
    config.repo_name = urls["Repository"].removeprefix("https://github.com/")
    config.site_url = urls["Documentation"]
    snippets = config.mdx_configs["pymdownx.snippets"]
    snippets["base_path"] = [str(ROOT / path) for path in snippets["base_path"]]
    sys.path.append(str(ROOT / "docs"))  # of the extension `reference_docstrings`
    os.environ["TQDM_DISABLE"] = "1"  # bars would fill the pages
    sys.path.append(str(ROOT / "tests" / "support"))
    importlib.import_module("hub_server").start_hub("user")  # where the notebooks push to
    os.chdir(tempfile.mkdtemp(prefix="notebooks"))  # what the notebooks write goes there
    return config


def on_files(files, config):
    """The pictures of the results are part of the site."""
    for path in sorted((ROOT / RESULTS).rglob("*.png")):
        name = path.relative_to(ROOT / RESULTS).as_posix()
        files.append(File.generated(config, f"assets/results/{name}", abs_src_path=str(path)))
    return files


def on_page_content(html, page, config, files):
    """Pictures of results, which a page shows small, lead to themselves."""
    return re.sub(r'(<img [^>]*src="([^"]*assets/results/[^"]+)"[^>]*>)', r'<a href="\2">\1</a>', html)


def on_post_page(output, page, config):
    """Notebooks load nothing from elsewhere: their bars are in no page."""
    return WIDGETS.sub("", output)


def on_page_markdown(markdown, page, config, files):
    def in_the_repository(match: re.Match) -> str:
        path = match[1].partition("#")[0]
        if not (ROOT / path).exists():
            raise FileNotFoundError(f"{page.file.src_uri} links to {path}, which does not exist")
        return f"]({config.repo_url}/blob/main/{match[1]})"

    markdown = re.sub(rf"\]\(../{RESULTS}(\S+\.png)\)", r"](assets/results/\1)", markdown)
    return OUTSIDE.sub(in_the_repository, re.sub(r"\]\(notes/", "](../docs/notes/", markdown))
