# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""What the site has beyond its pages: addresses, formulas, pictures of results, and files from outside of docs/.

Until the repository is public ([tool.peft-lotra] in pyproject.toml), no link leads to it: a file of the repository is
text, and its path a tooltip.
"""

from __future__ import annotations

import html
import re
import struct
import sys
import tomllib
from pathlib import Path

from latex2mathml.converter import convert
from mkdocs.structure.files import File


ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PUBLISHED = PROJECT["tool"]["peft-lotra"]["published"]
RESULTS = "examples/studies/results/"
# `../examples/pde.py` in a page leads from its file on GitHub to the file, and is none of the pages of the site
OUTSIDE = re.compile(
    r"\[((?:[^][]|\[[^][]*\])*)\]\((?:\.\./)+((?:examples|tests|peft_lotra|docs/(?:notes|tutorials|recipes)|[A-Z]+[\w.]*|pyproject)[^)\s]*)\)"
)
# pages that are a link on GitHub and the file itself on the site
WHOLE = {
    "changelog.md": "CHANGELOG.md",
}
UNIT = r" (?:%|▲|s\b|ms\b|h\b|kB\b|MB\b|GB\b|KiB\b|MiB\b|GiB\b)"
# 1e-3, 7.2 s, 80 %, (8, 8, 4), 8 × 8, 0.4 ± 0.1, (3-D): browsers would break lines inside
NUMBER = re.compile(
    rf"\d[\d.,]*(?:e-\d+)?(?:{UNIT})+|[+-]?\d[\d.]* ± \d[\d.]*|\d[\d.,]*e-\d+"
    r"|\(\d+(?:, (?:\d+|full)){1,3}\)|\[\d+(?:, \d+){1,4}\]|\d+ -&gt; \d+"
    r"|\d[\d.]*(?: × \d[\d.]*)+|\(\d-D\)"
)
# the unit of a column stays with the last word of its heading
HEADING_UNIT = re.compile(r"\w+ (?:s|ms|%)(?=</th>)")
FORMULA = re.compile(r'class="arithmatex">\\([(\[])(.*?)\\[)\]]<', re.DOTALL)
TAG = re.compile(r"<[^>]*>")
BLOCK = re.compile(
    r"(<pre>(?:<span></span>)?<code>)(.*?)(</code></pre>)", re.DOTALL
)
# before a dot, and after an opening bracket
CODE_BREAK = re.compile(r'(?=<span class="o">\.</span>)|(?<=[(\[]</span>)(?=<)')
# the full name of an object in the reference
NAME = re.compile(
    r'(<span class="doc doc-object-name[^"]*">)([^<]*)(?=</span>)'
)
INLINE = re.compile(r"<code>([^<]*)</code>(?!</pre>)")
CELL = re.compile(r"<t[dh][ >].*?</t[dh]>", re.DOTALL)
HEADING_ROW = re.compile(
    r"<tr>\s*<td[^>]*>(<strong>.*?</strong>)</td>((?:\s*<td[^>]*></td>)+)\s*</tr>"
)
IMAGE = re.compile(
    r'<img ([^>]*src="([^"]*assets/((?:results|pages)/[^"]+))"[^>]*)>'
)
# an option of a command, which would break after its two hyphens
OPTION = re.compile(r"(?<![\w-])--[a-z][\w-]*")
# of code in a sentence: a longer one may break
LONGEST_UNBROKEN = 34
# of code in a table
LONGEST_UNBROKEN_IN_CELL = 12
# of the pages, by their addresses, and the sections of the site: for llms.txt
FIRST_SENTENCES: dict[str, str] = {}
NAVIGATION: list = []
# a phone shows this many pixels of a picture; a wider one scrolls, at this many pixels an inch
PHONE, PIXELS_PER_INCH = 358, 62


def on_config(config):
    urls = PROJECT["project"]["urls"]
    if PUBLISHED:
        config.repo_url = urls["Repository"]
        config.repo_name = config.repo_url.removeprefix("https://github.com/")
    config.site_url = urls["Documentation"]
    sys.path.append(
        str(ROOT / "docs")
    )  # of the extension `reference_docstrings`
    return config


def on_files(files, config):
    """The pictures of the results are part of the site."""
    pictures = [
        *(ROOT / RESULTS).rglob("*.png"),
        *(ROOT / RESULTS).rglob("*.gif"),
    ]
    for path in sorted(pictures):
        name = path.relative_to(ROOT / RESULTS).as_posix()
        files.append(
            File.generated(
                config, f"assets/results/{name}", abs_src_path=str(path)
            )
        )
    return files


def on_page_markdown(markdown, page, config, files):
    def in_the_repository(match: re.Match) -> str:
        path = match[2].partition("#")[0]
        if not (ROOT / path).exists():
            raise FileNotFoundError(
                f"{page.file.src_uri} links to {path}, which does not exist"
            )
        if PUBLISHED:
            return f"[{match[1]}]({config.repo_url}/blob/main/{match[2]})"
        title = f"{path} in the repository"
        return f'<span class="in-repository" title="{title}">{match[1]}</span>'

    source = Path(page.file.abs_src_path)
    if source.with_suffix(".ipynb").is_file():
        markdown = with_notebook(markdown, page.file.src_uri, config.repo_name)
    if page.file.src_uri in WHOLE:
        markdown = (ROOT / WHOLE[page.file.src_uri]).read_text()
    markdown = re.sub(
        rf"\]\(((?:\.\./)+){RESULTS}(\S+\.(?:png|gif))\)",
        results_of_the_site,
        markdown,
    )
    markdown = OUTSIDE.sub(
        in_the_repository, re.sub(r"\]\(notes/", "](../docs/notes/", markdown)
    )
    FIRST_SENTENCES[page.url] = first_sentence(markdown)
    return markdown


def first_sentence(markdown: str) -> str:
    """The first sentence of a page, as plain text."""
    for block in markdown.split("\n\n"):
        is_text = re.match(r"[A-Z`*\[]", block)
        if is_text and not block.startswith(("[notebook]", "[Open in Colab]")):
            text = re.sub(r"\[([^]]*)\]\([^)]*\)|<[^>]*>", r"\1", block)
            text = re.split(r"(?<=[.:])\s", " ".join(text.split()))[0]
            return text.replace("**", "").rstrip(":.") + "."
    return ""


def on_nav(nav, config, files):
    NAVIGATION[:] = nav.items


def on_post_build(config):
    """Write llms.txt: the pages with their first sentences, for language models (llmstxt.org)."""
    lines = [f"# {config.site_name}", "", f"> {config.site_description}"]
    for item in NAVIGATION:
        if item.children or item is NAVIGATION[0]:
            lines += ["", f"## {item.title}", ""]
        for page in item.children or [item]:
            address = config.site_url + page.url if PUBLISHED else page.url
            sentence = FIRST_SENTENCES.get(page.url, "")
            lines.append(
                f"- [{page.title}]({address or './'}): {sentence}".rstrip(": ")
            )
    Path(config.site_dir, "llms.txt").write_text("\n".join(lines) + "\n")


def with_notebook(markdown: str, uri: str, project: str) -> str:
    """Add links to the notebook of a page below its title."""
    path = uri.removesuffix(".md") + ".ipynb"
    links = f"[notebook]({Path(path).name})"
    if PUBLISHED:
        colab = f"https://colab.research.google.com/github/{project}/blob/main/docs/{path}"
        links = f"[Open in Colab]({colab}) · {links}"
    return re.sub(
        r"^# .*$", rf"\g<0>\n\n{links}", markdown, count=1, flags=re.MULTILINE
    )


def results_of_the_site(match: re.Match) -> str:
    return f"]({'../' * (match[1].count('../') - 1)}assets/results/{match[2]})"


def on_page_content(content, page, config, files):
    """Formulas are MathML: no script, no font. Lines break where a reader expects it. Pictures lead to themselves."""

    def formula(match: re.Match) -> str:
        display = "block" if match[1] == "[" else "inline"
        return f'class="arithmatex">{convert(html.unescape(match[2]).strip(), display=display)}<'

    content = FORMULA.sub(formula, content)
    content = in_text(content, unbroken_numbers)
    content = HEADING_UNIT.sub(r"<nobr>\g<0></nobr>", content)
    content = CELL.sub(breakable_names, content)
    content = INLINE.sub(unbroken_code, content)
    content = HEADING_ROW.sub(spanning_row, content)
    content = NAME.sub(lambda name: name[1] + breakable(name[2]), content)
    content = BLOCK.sub(indented_lines, content)
    return IMAGE.sub(linked_picture, content)


def in_text(content: str, change) -> str:
    """Change the text outside of tags, code, and formulas."""
    skipped = re.compile(
        r"(<(pre|code|math|script|style)\b.*?</\2>|<[^>]*>)", re.DOTALL
    )
    parts = []
    end = 0
    for match in skipped.finditer(content):
        parts += [change(content[end : match.start()]), match[0]]
        end = match.end()
    return "".join([*parts, change(content[end:])])


def unbroken_numbers(text: str) -> str:
    return NUMBER.sub(r"<nobr>\g<0></nobr>", text)


def unbroken_code(match: re.Match) -> str:
    """Code in a sentence stays in one line if it is short. A long name breaks after its dots and brackets."""
    if len(html.unescape(match[1])) > LONGEST_UNBROKEN:
        return f"<code>{breakable(match[1])}</code>"
    return f'<code class="unbroken">{match[1]}</code>'


def breakable(name: str) -> str:
    return re.sub(r"((?<!\.)_|[(=/]|\.(?!\d))(?=\w)", r"\1<wbr>", name)


def breakable_names(match: re.Match) -> str:
    """Names in a table break after their underscores, dots and brackets, not before a comma. Short ones do not break."""

    def breakable_name(code: re.Match) -> str:
        if len(html.unescape(code[1])) <= LONGEST_UNBROKEN_IN_CELL:
            return f'<nobr><code class="short">{code[1]}</code>{code[2]}</nobr>'
        return f"<nobr><code>{breakable(code[1])}</code>{code[2]}</nobr>"

    return re.sub(r"<code>([^<]*)</code>([,.;:]?)", breakable_name, match[0])


def spanning_row(match: re.Match) -> str:
    """A row with a heading and no values is one cell."""
    columns = 1 + match[2].count("<td")
    return f'<tr><td colspan="{columns}">{match[1]}</td></tr>'


def indented_lines(match: re.Match) -> str:
    """Mark the lines of code, so that on a phone the rest of a long line is indented (extra.css)."""
    lines = []
    for line in match[2].removesuffix("\n").split("\n"):
        text = html.unescape(TAG.sub("", line))
        indent = len(text) - len(text.lstrip())
        line = CODE_BREAK.sub("<wbr>", line)
        line = OPTION.sub(r"<nobr>\g<0></nobr>", line)
        lines.append(
            f'<span class="line" style="--indent: {indent}ch">{line}\n</span>'
        )
    return match[1] + "".join(lines) + match[3]


def linked_picture(match: re.Match) -> str:
    """A picture in its size leads to its file. A wide one scrolls on a phone, where its labels stay legible.

    A picture NAME_dark beside it takes its place in the dark scheme.
    """
    folder = {"results": ROOT / RESULTS, "pages": ROOT / "docs/assets/pages"}
    kind, _, name = match[3].partition("/")
    path = folder[kind] / name
    dark = path.with_stem(f"{path.stem}_dark")
    if not path.stem.endswith("_dark") and dark.exists():
        other = match[0].replace(path.name, dark.name)
        pictures = picture_of(match, path), picture_of(IMAGE.match(other), dark)
        return (
            f'<span class="only-light">{pictures[0]}</span>'
            f'<span class="only-dark">{pictures[1]}</span>'
        )
    return picture_of(match, path)


def picture_of(match: re.Match, path: Path) -> str:
    if path.suffix == ".gif":
        return match[0]
    width, height, inches = size_of_png(path)
    image = f'<img {match[1]} width="{width}" height="{height}">'
    shown = round(inches * PIXELS_PER_INCH)
    if shown <= PHONE * 1.15:
        return f'<a href="{match[2]}">{image}</a>'
    return f'<a class="wide" style="--shown: {shown}px" href="{match[2]}">{image}</a>'


def size_of_png(path: Path) -> tuple[int, int, float]:
    """Width and height in pixels, and the width in inches."""
    data = path.read_bytes()
    width, height = struct.unpack(">II", data[16:24])
    start = data.index(b"pHYs") + 4
    per_meter = struct.unpack(">I", data[start : start + 4])[0]
    return width, height, width / per_meter / 0.0254
