"""A hook of MkDocs (see mkdocs.yml): pages that live outside docs/, and links that leave it.

The READMEs of the recipes, CONTRIBUTING.md and CHANGELOG.md become pages. A relative link works in the repository and
on the site alike: to a page it stays relative, to any other file it leads to the repository.
"""

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
PAGES = {
    "recipes/bert_mlm/README.md": "recipes/bert_mlm.md",
    "recipes/image_classification/README.md": "recipes/image_classification.md",
    "recipes/text_classification/README.md": "recipes/text_classification.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}
SOURCES = {page: source for source, page in PAGES.items()}
LINK = re.compile(r"\]\((?![a-z]+:|#|/)([^)#\s]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages from outside docs/."""
    for source, page in PAGES.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Points the relative links of a page to where their targets are on the site, or in the repository."""
    source = SOURCES.get(page.file.src_uri, f"docs/{page.file.src_uri}")

    def moved(link: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), link[1]))
        uri = PAGES.get(target, target.removeprefix("docs/") if target.startswith("docs/") else None)
        if uri is not None:
            place = posixpath.relpath(uri, posixpath.dirname(page.file.src_uri) or ".")
        elif (ROOT / target).exists():
            place = f"{config.repo_url}/blob/main/{target}"
        else:
            return link[0]  # MkDocs names it
        return f"]({place}{link[2] or ''})"

    return LINK.sub(moved, markdown)
