"""What mkdocs is told beyond mkdocs.yml: the repository's pages outside of docs/, and links to its files.

README.md is the site's first page. A link of any page to a file of the repository becomes one to its page
or, for a file that has none, to a copy of it in the site; one to no file is left, and ends the build. So the
same Markdown is right in a checkout and in the site.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
PAGES = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "benchmarks/README.md": "benchmarks.md",
}
SOURCES = {page: source for source, page in PAGES.items()}
COPIES = "files/"
LINK = re.compile(r"(?<=\]\()([^)\s#]+)(#[^)\s]*)?(?=\))")
FENCE = re.compile(r"^(```|~~~).*?^\1", re.MULTILINE | re.DOTALL)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that lie outside of docs/, and the files that pages link to."""
    for source, page in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text()))
    for file in list(files.documentation_pages()):
        for target in targets(file.src_uri, file.content_string):
            copy = place(target)
            if copy.startswith(COPIES) and files.get_file_from_path(copy) is None:
                files.append(File.generated(config, copy, abs_src_path=str(ROOT / target)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """The page with its links to files of the repository as links of the site."""
    return relink(markdown, page.file.src_uri)


def relink(markdown: str, page: str) -> str:
    """Links of a page of the site, none of them in blocks of code, to where the site has their files."""

    def link(match: re.Match[str]) -> str:
        target = repository_file(page, match[1])
        if target is None:
            return match[0]
        return os.path.relpath(place(target), os.path.dirname(page) or ".") + (match[2] or "")

    parts, end = [], 0
    for block in FENCE.finditer(markdown):
        parts += [LINK.sub(link, markdown[end : block.start()]), block[0]]
        end = block.end()
    return "".join([*parts, LINK.sub(link, markdown[end:])])


def targets(page: str, markdown: str) -> Iterator[str]:
    """Files of the repository that a page links to, by path."""
    for match in LINK.finditer(FENCE.sub("", markdown)):
        target = repository_file(page, match[1])
        if target is not None:
            yield target


def repository_file(page: str, link: str) -> str | None:
    """The path in the repository of what a page of the site links to; None for an address or no file."""
    if ":" in link:
        return None
    folder = os.path.dirname(SOURCES.get(page, f"docs/{page}"))
    path = os.path.normpath(os.path.join(folder, link))
    return path if not path.startswith("..") and (ROOT / path).is_file() else None


def place(path: str) -> str:
    """Where the site has a file of the repository."""
    if path in PAGES:
        return PAGES[path]
    return path.removeprefix("docs/") if path.startswith("docs/") else COPIES + path
