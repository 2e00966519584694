"""Hook of MkDocs: puts pages and files of the repository that lie outside docs/ on the site.

A page lies on the site where it lies in docs/, README.md is index.md, and every other file keeps its path in
the repository. Links in pages are written for GitHub; here, they are rewritten to these places. A link to a
folder of figures leads to its section of the gallery, one to another folder to its README. Other files
outside docs/ are copied if a page links to them.
"""

import posixpath
import re
from pathlib import Path
from urllib.parse import unquote

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]
PAGES = (
    "README.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "SECURITY.md",
    "data/README.md",
    "figures/README.md",
    "notebooks/README.md",
)
LINK = re.compile(r"(\]\()([^)#\s:]+)(#[^)\s]*)?(\))")


def find_site_path(path: str) -> str:
    """Return the place of a file on the site, for a folder of figures with an anchor."""
    if (ROOT / path).is_dir():
        folder, _, run = path.partition("/")
        return f"{folder}/README.md" + (f"#{run.replace('.', '')}" if run else "")
    return "index.md" if path == "README.md" else path.removeprefix("docs/")


def list_targets(path: str) -> list[str]:
    """Return the paths of the repository to which a page links."""
    folder = posixpath.dirname(path)
    text = (ROOT / path).read_text("utf-8")
    return [posixpath.normpath(posixpath.join(folder, unquote(match[2]))) for match in LINK.finditer(text)]


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages outside docs/, and the files outside docs/ that any page links to."""
    added = {find_site_path(path): path for path in PAGES}
    for path in (*PAGES, *(f"docs/{file.src_uri}" for file in files.documentation_pages())):
        for target in list_targets(path):
            if not target.startswith("docs/") and (ROOT / target).is_file():
                added[find_site_path(target)] = target
    for place, path in added.items():
        files.append(File.generated(config, place, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Rewrite the links of a page, which are those of its file in the repository."""
    place = page.file.src_uri
    path = next((path for path in PAGES if find_site_path(path) == place), f"docs/{place}")

    def rewrite_link(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(path), unquote(match[2])))
        new, _, anchor = find_site_path(target).partition("#")
        link = posixpath.relpath(new, posixpath.dirname(place) or ".")
        return f"{match[1]}{link}{match[3] or (f'#{anchor}' if anchor else '')}{match[4]}"

    return LINK.sub(rewrite_link, markdown)
