"""The page that reports are: titles, charts and tables in, one self-contained HTML document out."""

from __future__ import annotations

import html
from collections.abc import Sequence

from gpt4moe.drawing.figure import Chart

STYLE = """\
:root { color-scheme: light dark; --ink: #1c2430; --quiet: #5d6b7e; --page: #f6f7f9; --card: #fff; --edge: #dde2ea }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e3e8ef; --quiet: #94a3b8; --page: #10151c; --card: #182029; --edge: #2b3644 } }
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 1080px; padding: 20px 16px 48px; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif }
h1 { font-size: 24px; margin: 8px 0 16px; overflow-wrap: anywhere } h2 { font-size: 18px; margin: 32px 0 8px }
h3 { font-size: 15px; margin: 0 0 6px } p, figcaption { color: var(--quiet); font-size: 13px; margin: 6px 0 0 }
.tiles, .charts { display: grid; gap: 12px }
.tiles { grid-template-columns: repeat(auto-fit, minmax(148px, 1fr)) }
.charts { grid-template-columns: repeat(2, minmax(0, 1fr)); margin-top: 12px }
.tiles div, figure, .scroll > table, pre { background: var(--card); border: 1px solid var(--edge); border-radius: 8px }
.tiles div { padding: 10px 14px } .tiles b { display: block; font-size: 19px; font-variant-numeric: tabular-nums }
.tiles span { color: var(--quiet); font-size: 12px }
figure { margin: 0; padding: 14px; min-width: 0 } figure.wide { grid-column: 1 / -1 }
figure svg { display: block; width: 100%; height: auto; color: var(--ink) }
.scroll { overflow-x: auto }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; white-space: nowrap }
th, td { padding: 7px 14px; text-align: right; border-bottom: 1px solid var(--edge) }
th:first-child, td:first-child { text-align: left } th { font-size: 13px; color: var(--quiet); font-weight: 600 }
tbody tr:last-child td { border-bottom: 0 }
pre { padding: 12px 14px; overflow-x: auto; font: 12.5px/1.5 ui-monospace, Menlo, Consolas, monospace; margin: 8px 0 }
pre.sample { white-space: pre-wrap; overflow-wrap: anywhere }
.vocabulary { white-space: normal } .vocabulary td:last-child { text-align: left; line-height: 2 }
.token { white-space: nowrap; margin-right: 14px; color: var(--quiet); font-size: 12px }
.token code { color: var(--ink); background: var(--page); border: 1px solid var(--edge); border-radius: 4px }
a { color: inherit } details { margin-top: 16px } summary { cursor: pointer; font-weight: 600 }
@media (max-width: 720px) { .charts { grid-template-columns: minmax(0, 1fr) } .wide svg { min-width: 640px } }
"""


def page(title: str, parts: Sequence[str], *, style: str = "", script: str = "") -> str:
    """The whole document: `title` as text, `parts` as HTML one under the other, more CSS and a script of its own."""
    name, run = html.escape(title), f"<script>{script}</script>" if script else ""
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    body = "\n".join(part for part in parts if part)
    return (
        f'<!doctype html>\n<html lang="en"><head>{head}\n'
        f"<title>{name}</title><style>\n{STYLE}{style}</style></head><body>\n"
        f"<h1>{name}</h1>\n{body}\n{run}</body></html>\n"
    )


def tiles(shown: dict[str, str | None]) -> str:
    """Numbers in a row, each over its name; those that are None are left out."""
    return "".join(
        f"<div><b>{value}</b><span>{name}</span></div>" for name, value in shown.items() if value is not None
    )


def charts(shown: Sequence[Chart]) -> str:
    """Charts in the page's grid."""
    return f'<div class="charts">{"".join(map(_chart, shown))}</div>'


def _chart(chart: Chart) -> str:
    caption = f"<figcaption>{html.escape(chart.caption)}</figcaption>"
    return (
        f'<figure class="{"wide" if chart.wide else "half"}"><h3>{html.escape(chart.title)}</h3>'
        f'<div class="scroll">{chart.svg}</div>{chart.foot}{caption}</figure>'
    )


def details(title: str, text: str | None) -> str:
    """Text to open, as it stands; nothing where there is none."""
    return f"<details><summary>{title}</summary><pre>{html.escape(text)}</pre></details>" if text else ""
