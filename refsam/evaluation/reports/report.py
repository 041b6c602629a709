"""Reports: the same tables, texts and pictures as one self-contained HTML page and as Markdown."""

import base64
import html
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from refsam.errors import UserError
from refsam.runtime.files import replace_file

_SUFFIXES = {"image/svg+xml": ".svg", "image/jpeg": ".jpg"}
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem;
  color: #1b1f24; background: #fff }
h1, h2 { line-height: 1.2 } h2 { margin-top: 2.5rem; border-bottom: 1px solid #d0d7de }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin: 1rem 0 }
th, td { padding: .25rem .7rem; border-bottom: 1px solid #d0d7de; text-align: right; white-space: nowrap }
th:first-child, td:first-child { text-align: left }
th { background: #f6f8fa }
pre { background: #f6f8fa; padding: .8rem; white-space: pre-wrap; overflow-wrap: anywhere }
figure { margin: 1rem 0 } figcaption { color: #59636e } img { max-width: 100%; height: auto }
.wide { overflow-x: auto } summary { cursor: pointer; color: #0550ae }
"""


@dataclass(frozen=True)
class Text:
    """Paragraphs, or the points of a list."""

    lines: tuple[str, ...]
    listed: bool = False


@dataclass(frozen=True)
class Code:
    """Text that is shown as it is."""

    text: str


@dataclass(frozen=True)
class Table:
    """Cells as text; the first column names the row. `folded` hides it on the page until it is opened."""

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    caption: str = ""
    folded: bool = False

    def markdown(self) -> str:
        """A Markdown table whose columns are aligned, so that it reads well on a terminal, too."""
        cells = [[_cell(cell) for cell in row] for row in (self.header, *self.rows)]
        widths = [max(3, *(len(row[i]) for row in cells)) for i in range(len(self.header))]
        lines = [
            "| " + " | ".join(_aligned(row[i], widths[i], i) for i in range(len(widths))) + " |"
            for row in cells
        ]
        rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
        return "\n".join([lines[0], "| " + " | ".join(rule) + " |", *lines[1:]])


@dataclass(frozen=True)
class Picture:
    """An SVG or JPEG; `name` becomes a file name beside the Markdown."""

    name: str
    media_type: str
    content: bytes
    caption: str

    @property
    def file(self) -> str:
        """File name with the suffix of its type, without characters that paths or links treat specially."""
        plain = "".join(c if c.isalnum() or c in "-_" else "_" for c in self.name)
        return plain + _SUFFIXES[self.media_type]


Block = Text | Code | Table | Picture


@dataclass(frozen=True)
class Section:
    """A title and the parts below it."""

    title: str
    blocks: tuple[Block, ...]


def write_report(folder: Path, title: str, sections: Sequence[Section]) -> tuple[Path, Path]:
    """Write `report.html`, `report.md` and the latter's pictures `report/<name>`; return the two pages.

    Every file appears as a whole. Raises UserError if two pictures have one file name.
    """
    pictures = [b for section in sections for b in section.blocks if isinstance(b, Picture)]
    files = {picture.file: picture.content for picture in pictures}
    if len(files) < len(pictures):
        raise UserError("report: two pictures have the same file name")
    (folder / "report").mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        replace_file(folder / "report" / name, content)
    pages = folder / "report.html", folder / "report.md"
    replace_file(pages[0], as_html(title, sections))
    replace_file(pages[1], as_markdown(title, sections))
    return pages


def as_html(title: str, sections: Sequence[Section]) -> str:
    """One page that needs no network and no other file: style, curves and pictures stand inside it."""
    body = [f"<h1>{html.escape(title)}</h1>"]
    for section in sections:
        body.append(f"<h2>{html.escape(section.title)}</h2>")
        body += [_html_block(block) for block in section.blocks]
    return "\n".join(
        [
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            f'<meta name="viewport" content="width=device-width">\n<title>{html.escape(title)}</title>',
            f"<style>{_STYLE}</style>\n</head>\n<body>",
            *body,
            "</body>\n</html>\n",
        ]
    )


def as_markdown(title: str, sections: Sequence[Section], pictures: str = "report") -> str:
    """The same as Markdown; pictures are linked in the folder `pictures`."""
    parts = [f"# {title}"]
    for section in sections:
        parts.append(f"## {section.title}")
        parts += [part for block in section.blocks for part in _markdown_block(block, pictures)]
    return "\n\n".join(parts) + "\n"


def _html_block(block: Block) -> str:
    match block:
        case Text(lines, listed):
            tag = "li" if listed else "p"
            items = "\n".join(f"<{tag}>{html.escape(line)}</{tag}>" for line in lines)
            return f"<ul>\n{items}\n</ul>" if listed else items
        case Code(text):
            return f"<pre>{html.escape(text)}</pre>"
        case Picture():
            data = base64.b64encode(block.content).decode()
            caption = html.escape(block.caption)
            source = f"data:{block.media_type};base64,{data}"
            image = f'<img alt="{caption}" src="{source}">'
            return f"<figure>{image}<figcaption>{caption}</figcaption></figure>"
        case Table():
            return _html_table(block)


def _html_table(table: Table) -> str:
    rows = [("th", table.header), *(("td", row) for row in table.rows)]
    lines = [
        "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row) + "</tr>"
        for tag, row in rows
    ]
    caption = html.escape(table.caption)
    grid = f'<div class="wide"><table>\n{chr(10).join(lines)}\n</table></div>'
    if table.folded:
        return f"<details><summary>{caption}</summary>{grid}</details>"
    return f"<p>{caption}</p>{grid}" if caption else grid


def _markdown_block(block: Block, pictures: str) -> Iterator[str]:
    match block:
        case Text(lines, listed):
            yield "\n".join(f"- {line}" for line in lines) if listed else "\n\n".join(lines)
        case Code(text):
            yield f"```\n{text}\n```"
        case Picture():
            yield f"![{block.caption}]({pictures}/{block.file})"
            yield f"*{block.caption}*"
        case Table():
            if block.caption:
                yield block.caption
            yield block.markdown()


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _aligned(text: str, width: int, column: int) -> str:
    return text.ljust(width) if column == 0 else text.rjust(width)
