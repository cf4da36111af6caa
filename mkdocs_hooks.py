"""Hooks of mkdocs: pages that stand at the top of the repository, and links that leave docs/.

A link to a file of the repository that is no page gets a copy of it in the site; one to a folder becomes text, for a
site has no listing. So the files read well where they lie, and the site has no link that leads nowhere.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).parent
#: A file at the top of the repository: its page.
PAGES = {"README.md": "overview.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
_LINK = re.compile(r"\[((?:[^\[\]]|\[[^\]]*\])*)\]\((?!https?:|#)([^)\s#]+)(#[^)]*)?\)")


def on_files(files: Any, config: Any) -> Any:
    for source, page in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    texts = {file.src_uri: file.content_string for file in files.documentation_pages()}
    for path in sorted({path for page, text in texts.items() for path in _outside(page, text)}):
        files.append(File.generated(config, f"source/{path}", abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    own = page.file.src_uri

    def rewritten(match: re.Match[str]) -> str:
        text, target, anchor = match[1], match[2], match[3] or ""
        path = _in_repository(own, target)
        if path in PAGES:
            return f"[{text}]({PAGES[path]}{anchor})"
        if path.startswith("docs/"):
            return f"[{text}]({path.removeprefix('docs/')}{anchor})"
        return f"[{text}](source/{path})" if (ROOT / path).is_file() and _is_shown(path) else text

    return _LINK.sub(rewritten, markdown)


def _outside(page: str, text: str) -> set[str]:
    paths = {_in_repository(page, match[2]) for match in _LINK.finditer(text)}
    found = {path for path in paths if not path.startswith("docs/") and path not in PAGES}
    return {path for path in found if (ROOT / path).is_file() and _is_shown(path)}


def _is_shown(path: str) -> bool:
    return not path.endswith(".md") and not path.startswith(".")


def _in_repository(page: str, target: str) -> str:
    folder = "" if page in PAGES.values() else "docs"
    return posixpath.normpath(posixpath.join(folder, target))
