"""HTML of a page that stands alone: no file, script or font from elsewhere.

What is given as text is escaped; what is given as HTML comes from these functions.
"""

import base64
import io
from collections.abc import Sequence
from html import escape

from PIL import Image

_STYLE = """
:root { color-scheme: light dark; --ink: #1c2430; --dim: #5b6675; --paper: #ffffff;
  --card: #f5f7fa; --line: #d9dfe7; --tint: #cfe4fb; --accent: #1565c0; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6eaf0; --dim: #9aa6b5; --paper: #14181f;
  --card: #1d232c; --line: #343d4a; --tint: #1f4468; --accent: #7ab8ff; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
main { max-width: 76rem; margin: 0 auto; padding: 2rem 1.25rem 4rem; }
h1 { font-size: 1.7rem; margin: 0; } h2 { font-size: 1.2rem; margin: 2.5rem 0 .75rem; }
p { margin: .3rem 0 .8rem; } .dim, figcaption { color: var(--dim); }
a { color: var(--accent); }
.tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(8.5rem, 1fr)); gap: .6rem;
  margin: 1.25rem 0 0; }
.tiles div { background: var(--card); border: 1px solid var(--line); border-radius: 8px;
  padding: .6rem .8rem; }
.tiles dt { color: var(--dim); font-size: .82rem; }
.tiles dd { margin: 0; font-size: 1.35rem; font-weight: 600; font-variant-numeric: tabular-nums; }
.scroll { overflow-x: auto; border: 1px solid var(--line); border-radius: 8px; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .65rem; text-align: right; border-bottom: 1px solid var(--line);
  white-space: nowrap; }
th { white-space: normal; vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0;
  background: var(--paper); }
thead th, tfoot td:first-child { background: var(--card) !important; }
thead th[aria-sort] { color: var(--accent); }
thead button { all: unset; cursor: pointer; font-weight: 600; }
thead button:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
tfoot td { font-weight: 600; background: var(--card); border-bottom: 0; }
td.share { background: linear-gradient(to right, var(--tint) var(--x), transparent var(--x)); }
figure { margin: 0 0 1.25rem; } figcaption { font-size: .9rem; margin-bottom: .35rem; }
img { max-width: 100%; height: auto; border-radius: 6px; background: #ffffff; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(24rem, 100%), 1fr));
  gap: 1rem; }
.three { display: grid; grid-template-columns: repeat(3, 1fr); gap: .5rem; }
.three img { width: 100%; }
details { border: 1px solid var(--line); border-radius: 8px; margin-bottom: .6rem; }
summary { cursor: pointer; padding: .5rem .8rem; font-weight: 600; }
details td { white-space: normal; overflow-wrap: anywhere; text-align: left; }
@media print { main { max-width: none; padding: 0; } .scroll { overflow: visible; }
  figure, tr, .tiles div { break-inside: avoid; } table { font-size: .75rem; } }
"""

_SORT = """
for (const table of document.querySelectorAll("table.sortable"))
  table.tHead.addEventListener("click", event => {
    const head = event.target.closest("th");
    if (!head) return;
    const down = head.getAttribute("aria-sort") !== "descending", column = head.cellIndex;
    for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const key = row => row.cells[column].dataset.value ?? "";
    const order = (a, b) => column === 0 ? b.localeCompare(a) : Number(b) - Number(a);
    const rows = [...table.tBodies[0].rows];
    const empty = row => key(row) === "";
    rows.sort((a, b) => empty(a) - empty(b) || (down ? 1 : -1) * order(key(a), key(b)));
    table.tBodies[0].append(...rows);
  });
"""


def document(title: str, about: str, sections: Sequence[str]) -> str:
    """A whole page of sections in HTML."""
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{_STYLE}</style>
</head>
<body>
<main>
<h1>{escape(title)}</h1>
<p class="dim">{escape(about)}</p>
{"".join(sections)}
</main>
<script>{_SORT}</script>
</body>
</html>
"""


def section(name: str, title: str, body: str) -> str:
    """A part of the page with an anchor."""
    return f'<section id="{escape(name)}">\n<h2>{escape(title)}</h2>\n{body}\n</section>\n'


def tiles(figures: dict[str, float | None]) -> str:
    """Figures to be read at a glance."""
    parts = (
        f'<div><dt>{escape(name)}</dt><dd data-value="{_value(x)}">{number(x)}</dd></div>\n'
        for name, x in figures.items()
    )
    return f'<dl class="tiles">\n{"".join(parts)}</dl>'


def sortable(
    head: Sequence[str], rows: Sequence[Sequence], foot: Sequence, titles: Sequence[str]
) -> str:
    """A table of a name and figures a row, which a click on a column's head sorts.

    Args:
        head: names of the columns.
        rows: of each a name, then numbers or None; those from 0 to 1 get a bar.
        foot: the last row.
        titles: what the columns mean.
    """
    heads = "".join(
        f'<th scope="col" title="{escape(title)}">'
        f'<button type="button">{escape(name)}</button></th>'
        for name, title in zip(head, titles)
    )
    body = "".join(f"<tr>{_cells(row)}</tr>\n" for row in rows)
    return (
        f'<div class="scroll"><table class="sortable">\n<thead><tr>{heads}</tr></thead>\n'
        f"<tbody>\n{body}</tbody>\n<tfoot><tr>{_cells(foot)}</tr></tfoot>\n</table></div>"
    )


def settings(title: str, values: dict, opened: bool = False) -> str:
    """Nested settings by name, folded."""
    rows = "".join(
        f"<tr><td>{escape(name)}</td><td>{escape(str(x))}</td></tr>\n"
        for name, x in _flat(values).items()
    )
    state = " open" if opened else ""
    return (
        f"<details{state}><summary>{escape(title)}</summary>"
        f"<table><tbody>\n{rows}</tbody></table></details>\n"
    )


def figure(caption: str, *pictures: str) -> str:
    """Pictures, as `picture` and `drawing` give them, under a caption in HTML."""
    body = "".join(pictures)
    if len(pictures) > 1:
        body = f'<div class="three">{body}</div>'
    return f"<figure><figcaption>{caption}</figcaption>{body}</figure>\n"


def picture(image: Image.Image, name: str, longest: int = 640) -> str:
    """A picture inside the page; one with a longer side is made smaller."""
    image = image.convert("RGB")
    image.thumbnail((longest, longest))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=88)
    return _embedded(buffer.getvalue(), "jpeg", name)


def drawing(png: bytes, name: str) -> str:
    """A PNG inside the page."""
    return _embedded(png, "png", name)


def number(x) -> str:
    """A figure as it is shown; a dash for None."""
    if x is None:
        return "–"
    return str(x) if isinstance(x, int) else f"{x:.3f}"


def _embedded(data: bytes, kind: str, name: str) -> str:
    code = base64.b64encode(data).decode("ascii")
    return f'<img src="data:image/{kind};base64,{code}" alt="{escape(name)}">'


def _cells(row: Sequence) -> str:
    name, *figures = row
    cells = [f'<td data-value="{escape(str(name))}">{escape(str(name))}</td>']
    for x in figures:
        bar = isinstance(x, float) and 0 <= x <= 1
        style = f' class="share" style="--x:{100 * x:.1f}%"' if bar else ""
        cells.append(f'<td data-value="{_value(x)}"{style}>{number(x)}</td>')
    return "".join(cells)


def _value(x) -> str:
    return "" if x is None else repr(x)


def _flat(values: dict, before: str = "") -> dict[str, object]:
    out = {}
    for name, x in values.items():
        if isinstance(x, dict) and x:
            out |= _flat(x, f"{before}{name}.")
        else:
            out[f"{before}{name}"] = x
    return out
