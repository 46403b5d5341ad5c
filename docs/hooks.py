# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""What the site has beyond its pages: addresses, formulas, pictures of results, and files from outside of docs/."""

from __future__ import annotations

import html
import re
import sys
from pathlib import Path

from latex2mathml.converter import convert
from mkdocs.structure.files import File


try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib


ROOT = Path(__file__).parents[1]
RESULTS = "examples/studies/results/"
# `../examples/pde.py` in a page leads from its file on GitHub to the file, and is none of the pages of the site
OUTSIDE = re.compile(
    r"\]\((?:\.\./)+((?:examples|tests|peft_lotra|docs/(?:notes|tutorials|recipes)|[A-Z]+[\w.]*|pyproject)[^)\s]*)\)"
)
# pages that are a link on GitHub and the file itself on the site
WHOLE = {
    "changelog.md": "CHANGELOG.md",
}
# 1e-3, 7.2 s in a text, not in a tag: browsers break lines at the hyphen
NUMBER = re.compile(r"\d[\d.,]*(?:e-\d+(?: s\b)?| s\b)(?=[^<>]*<)")
FORMULA = re.compile(r'class="arithmatex">\\([(\[])(.*?)\\[)\]]<', re.DOTALL)


def on_config(config):
    urls = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "urls"
    ]
    config.repo_url = urls["Repository"]
    config.repo_name = urls["Repository"].removeprefix("https://github.com/")
    config.site_url = urls["Documentation"]
    sys.path.append(
        str(ROOT / "docs")
    )  # of the extension `reference_docstrings`
    return config


def on_files(files, config):
    """The pictures of the results are part of the site."""
    for path in sorted((ROOT / RESULTS).rglob("*.png")):
        name = path.relative_to(ROOT / RESULTS).as_posix()
        files.append(
            File.generated(
                config, f"assets/results/{name}", abs_src_path=str(path)
            )
        )
    return files


def on_page_markdown(markdown, page, config, files):
    def in_the_repository(match: re.Match) -> str:
        path = match[1].partition("#")[0]
        if not (ROOT / path).exists():
            raise FileNotFoundError(
                f"{page.file.src_uri} links to {path}, which does not exist"
            )
        return f"]({config.repo_url}/blob/main/{match[1]})"

    source = Path(page.file.abs_src_path)
    if source.with_suffix(".ipynb").is_file():
        markdown = with_notebook(markdown, page.file.src_uri, config.repo_name)
    if page.file.src_uri in WHOLE:
        markdown = (ROOT / WHOLE[page.file.src_uri]).read_text()
    markdown = re.sub(
        rf"\]\(((?:\.\./)+){RESULTS}(\S+\.png)\)", results_of_the_site, markdown
    )
    return OUTSIDE.sub(
        in_the_repository, re.sub(r"\]\(notes/", "](../docs/notes/", markdown)
    )


def with_notebook(markdown: str, uri: str, project: str) -> str:
    """Add links to the notebook of a page below its title."""
    path = uri.removesuffix(".md") + ".ipynb"
    colab = f"https://colab.research.google.com/github/{project}/blob/main/docs/{path}"
    links = f"[Open in Colab]({colab}) · [notebook]({Path(path).name})"
    return re.sub(
        r"^# .*$", rf"\g<0>\n\n{links}", markdown, count=1, flags=re.MULTILINE
    )


def results_of_the_site(match: re.Match) -> str:
    return f"]({'../' * (match[1].count('../') - 1)}assets/results/{match[2]})"


def on_page_content(content, page, config, files):
    """Formulas are MathML: no script, no font. Numbers stay in one line. Pictures lead to themselves, in full size."""

    def formula(match: re.Match) -> str:
        display = "block" if match[1] == "[" else "inline"
        return f'class="arithmatex">{convert(html.unescape(match[2]).strip(), display=display)}<'

    content = FORMULA.sub(formula, content)
    content = NUMBER.sub(r"<nobr>\g<0></nobr>", content)
    return re.sub(
        r'(<img [^>]*src="([^"]*assets/(?:results|pages)/[^"]+)"[^>]*>)',
        r'<a href="\2">\1</a>',
        content,
    )
