"""MkDocs hooks: take the pages from the folder of `mkdocs.yml` itself, put every page into the navigation, and every
public name on the API page.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

HERE = Path(__file__).parent
SHOWN = {".md", ".png", ".svg"}


def on_files(files: Files, config: Any) -> Files:
    """Add the pages and figures beside `mkdocs.yml`, and name pages without a place in the navigation."""
    for path in sorted(HERE.rglob("*")):
        name = path.relative_to(HERE).as_posix()
        if path.suffix in SHOWN and not name.startswith("assets/"):
            files.append(File.generated(config, name, abs_src_path=str(path)))
    named = set(_pages(config.nav))
    for file in files.documentation_pages():
        if file.src_uri not in named:
            folder = file.src_uri.rpartition("/")[0] or "topics"
            _section(config.nav, folder.replace("-", " ").capitalize()).append(file.src_uri)
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Append the public names that no section of the API page lists yet."""
    if page.file.src_uri != "api.md":
        return markdown
    tree = ast.parse((HERE.parent / "nullspace_optim" / "__init__.py").read_text(encoding="utf-8"))
    lists = [n.value for n in tree.body if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "__all__"]
    listed = set(re.findall(r"^::: nullspace_optim\.(\w+)$", markdown, re.M))
    others = [name for name in ast.literal_eval(lists[0]) if name not in listed]
    entries = "\n".join(f"::: nullspace_optim.{name}\n" for name in others)
    return f"{markdown}\n\n## Further names\n\n{entries}" if others else markdown


def _pages(entry: Any) -> list[str]:
    """Return every page that a part of the navigation names."""
    if isinstance(entry, str):
        return [entry]
    return [page for part in (entry.values() if isinstance(entry, dict) else entry) for page in _pages(part)]


def _section(nav: list[Any], title: str) -> list[Any]:
    """Return the pages of the section `title`, made before the last entry (the API) where it is missing."""
    for entry in nav:
        if title in entry:
            return entry[title]  # type: ignore[no-any-return]
    nav.insert(len(nav) - 1, {title: []})
    return nav[-2][title]  # type: ignore[no-any-return]
