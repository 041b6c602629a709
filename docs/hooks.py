"""Hooks of mkdocs: pages from elsewhere in the repository, links between its files, the kernels' pictures."""

import re
from pathlib import Path
from posixpath import dirname, join, normpath, relpath
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
_OPERATORS = sorted(p.parent.name for p in ROOT.glob("kernels/refsam_kernels/*/README.md"))
# The site's pages whose text is a file elsewhere in the repository.
_ELSEWHERE = {
    "changelog.md": "CHANGELOG.md",
    "contributing.md": "CONTRIBUTING.md",
    "examples.md": "examples/README.md",
    "nano.md": "refsam/weights/nano/README.md",
    **{f"kernels/{name}.md": f"kernels/refsam_kernels/{name}/README.md" for name in _OPERATORS},
}
_PAGE_OF = {source: page for page, source in _ELSEWHERE.items()}
_LINK = re.compile(r"\[([^\]]*)\]\(([^)#\s:]+)(#[^)\s]*)?\)")
_CODE = re.compile(r"(^```.*?^```$)", re.DOTALL | re.MULTILINE)


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that stand elsewhere."""
    for page, source in _ELSEWHERE.items():
        content = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=content))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Turn links between files of the repository into links between pages; show each operator's picture."""
    uri = page.file.src_uri
    parts = _CODE.split(markdown)
    for index in range(0, len(parts), 2):  # code is at the odd places
        parts[index] = _LINK.sub(lambda link: _relink(link, uri, files), parts[index])
    picture = f"images/{Path(uri).with_suffix('.svg')}"
    if files.get_file_from_path(picture):
        title, _, rest = "".join(parts).partition("\n")
        return f"{title}\n\n![What is computed]({relpath(picture, dirname(uri))})\n{rest}"
    return "".join(parts)


def _relink(link: re.Match[str], uri: str, files: Files) -> str:
    """A link as the site has it; the name of the file where that is no page. Wrong links stay, and mkdocs refuses them."""
    text, target, anchor = link[1], link[2], link[3] or ""
    file = normpath(join(dirname(_ELSEWHERE.get(uri, f"docs/{uri}")), target))
    page = _PAGE_OF.get(file, file.removeprefix("docs/"))
    if files.get_file_from_path(page):
        return f"[{text}]({relpath(page, dirname(uri) or '.')}{anchor})"
    return f"{text} (`{file}`)" if (ROOT / file).exists() else link[0]
