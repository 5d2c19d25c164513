"""Hook of mkdocs.yml: makes README.md the first page, moves links and generates the reference.

Links in the pages are those of the forge. On the site docs/ is the root, README.md is index.md, and other files keep
their path. Files that a page links to (results, examples, tests) are copied; links to folders become plain text.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\]|!\[[^\]]*\]\([^)]*\))*)\]\((?!\w+:|#)([^)#\s]+)(#[^)\s]*)?\)")


def site_path(path: str) -> str:
    """The path on the site of a file of the repository."""
    return "index.md" if path == "README.md" else path.removeprefix("docs/")


def targets(page: str, text: str) -> list[str]:
    """The files and folders of the repository that a page links to, relative to the root."""
    return [target_of(page, match[3]) for match in LINK.finditer(text)]


def target_of(page: str, link: str) -> str:
    return os.path.normpath(os.path.join(os.path.dirname(page), link))


def moved_links(page: str, text: str) -> str:
    """The text of a page of the repository with its links as the site needs them."""

    def moved(match: re.Match[str]) -> str:
        target = target_of(page, match[3])
        words = LINK.sub(moved, match[2])
        if (ROOT / target).is_dir():
            return words
        link = os.path.relpath(site_path(target), os.path.dirname(site_path(page)) or ".")
        return f"{match[1]}[{words}]({link}{match[4] or ''})"

    return LINK.sub(moved, text)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages outside docs/, the files that pages link to, and the reference."""
    pages = {file.src_uri: f"docs/{file.src_uri}" for file in files.documentation_pages()}
    for path in sorted(ROOT.glob("*.md")):
        pages[site_path(path.name)] = path.name
        files.append(File.generated(config, site_path(path.name), content=path.read_text(encoding="utf-8")))
    linked = {target for page in pages.values() for target in targets(page, (ROOT / page).read_text(encoding="utf-8"))}
    for target in sorted(linked - set(pages.values())):
        if (ROOT / target).is_file() and files.get_file_from_path(site_path(target)) is None:
            files.append(File.generated(config, site_path(target), abs_src_path=str(ROOT / target)))
    files.append(File.generated(config, "reference/python.md", content=python_reference()))
    files.append(File.generated(config, "reference/commands.md", content=command_reference()))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    uri = page.file.src_uri
    if uri.startswith("reference/"):
        return markdown
    outside = ROOT / ("README.md" if uri == "index.md" else uri)
    return moved_links(outside.name if outside.is_file() else f"docs/{uri}", markdown)


def python_reference() -> str:
    """A page with every public name of the package, which mkdocstrings fills from the docstrings."""
    import timm_convnextv2

    names = [name for name in timm_convnextv2.__all__ if not name.startswith("_")]
    return "\n\n".join(["# Python", *(f"::: timm_convnextv2.{name}" for name in names)]) + "\n"


def command_reference() -> str:
    """A page with the help of every command."""
    from timm_convnextv2.commands.table import COMMANDS

    parts = ["# Commands"]
    for name, command in COMMANDS.items():
        words, summary = [sys.executable, "-m", "timm_convnextv2", *name.split(), "--help-all"], command.summary
        done = subprocess.run(words, capture_output=True, text=True, check=True, env=os.environ | {"COLUMNS": "100"})
        parts.append(f"## {name}\n\n{summary[0].upper()}{summary[1:]}.\n\n```text\n{done.stdout.rstrip()}\n```")
    return "\n\n".join(parts) + "\n"
