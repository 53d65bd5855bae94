"""MkDocs hooks: fill the marked places of the pages from the README, the command line and the sources.

<!-- results -->   the table of results in README.md     <!-- commands -->  the help of every verb
<!-- snippet -->   the Python snippet of README.md       <!-- tree -->      the files of the package
The pages of paper/*.md are added to the site; links out of it become plain text.
"""

import ast
import contextlib
import io
import os
import re
from pathlib import Path
from typing import Any
from unittest.mock import patch

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
PAPERS = {"RESULTS.md": "paper/results.md", "LOG.md": "paper/log.md"}
"""File of paper/ -> its page of the site."""


def between(text: str, start: str, end: str) -> str:
    """Return what stands between two markers; a missing one raises ValueError."""
    found = re.search(re.escape(start) + r"(.*?)" + re.escape(end), text, re.DOTALL)
    if not found:
        raise ValueError(f"no {start} ... {end}: a page of the documentation needs what stands between them")
    return found[1].strip()


def results() -> str:
    return inside_site(between((ROOT / "README.md").read_text(), "<!-- results -->", "<!-- /results -->"))


def snippet() -> str:
    code = between((ROOT / "README.md").read_text(), "```python\n", "```")
    return f"```python\n{code}\n```"


def help_of(*words: str) -> str:
    """Return what `worldvla WORDS... --help` prints."""
    from worldvla.cli import main

    out = io.StringIO()
    settings = {"COLUMNS": "84", "NO_COLOR": "1"}
    with patch.dict(os.environ, settings), contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        main([*words, "--help"])
    return re.sub(r"\x1b\[[\d;]*m", "", out.getvalue()).strip()


def verbs() -> list[str]:
    """Return the verbs in the order of `worldvla --help`."""
    return re.findall(r"^  ([a-z][a-z-]+)\s{2,}\S", help_of(), re.MULTILINE)


def commands() -> str:
    parts = []
    for verb in verbs():
        parts.append(f"## {verb}\n\n```text\n{help_of(verb)}\n```\n")
    return "\n".join(parts)


def tree() -> str:
    """Return a table for each folder of the package: file, first sentence of its docstring."""
    rows: dict[str, list[str]] = {}
    for path in sorted((ROOT / "worldvla").rglob("*.py"), key=lambda p: (p.parent, p.name)):
        text = ast.get_docstring(ast.parse(path.read_text())) or ""
        if text:
            sentence = re.split(r"(?<=\.)\s|\n\n", text, maxsplit=1)[0].rstrip(":").replace("\n", " ")
            folder = path.parent.relative_to(ROOT).as_posix() + "/"
            rows.setdefault(folder, []).append(f"| `{path.name}` | {escape(sentence)} |")
    return "\n".join(
        f"## {folder}\n\n| file | what |\n|---|---|\n" + "\n".join(r) + "\n" for folder, r in rows.items()
    )


def escape(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")


def inside_site(text: str) -> str:
    """Return `text` with links to files of the repository as plain text; addresses and anchors stay."""
    return re.sub(r"(?<!!)\[([^\]]+)\]\((?!https?:|#)[^)]*\)", r"\1", text)


FILLED = {"results": results, "snippet": snippet, "commands": commands, "tree": tree}


def on_files(files: Files, config: Any) -> Files:
    for name, page in PAPERS.items():
        text = (ROOT / "paper" / name).read_text()
        files.append(File.generated(config, page, content=inside_site(text)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    for name, fill in FILLED.items():
        marker = f"<!-- {name} -->"
        if marker in markdown:
            markdown = markdown.replace(marker, fill())
    return markdown
