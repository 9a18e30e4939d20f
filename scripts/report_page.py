"""The report's HTML: one file, no request to anywhere, light and dark, as wide as the screen is."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any

from surgery.errors import MissingDependency


def page(values: Mapping[str, Any]) -> str:
    """Fill the template; everything is escaped.

    Raises:
        MissingDependency: If jinja2 is not installed.
    """
    try:
        from jinja2 import Environment, StrictUndefined
    except ImportError as error:
        raise MissingDependency('a report needs jinja2: pip install "bypass-surgery[report]"') from error
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(TEMPLATE).render(**values)


def data_uri(content: bytes, kind: str = "image/png") -> str:
    """Content as an address that is in the page itself."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


TEMPLATE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{{ title }}</title>
<style>
:root { --ink: #1b1f24; --soft: #57606a; --paper: #ffffff; --line: #d0d7de; --box: #f6f8fa; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e8ea; --soft: #9aa4ae; --paper: #14171a; --line: #343a41; --box: #1d2125; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1060px; padding: 1.2rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; margin: .4rem 0; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .4rem; }
p { margin: .4rem 0; } .soft { color: var(--soft); font-size: .9rem; }
.numbers { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: .7rem; margin: 1rem 0; }
.numbers div { background: var(--box); border: 1px solid var(--line); border-radius: 8px; padding: .6rem .8rem; }
.numbers b { display: block; font-size: 1.3rem; } .numbers span { color: var(--soft); font-size: .85rem; }
picture { display: block; overflow-x: auto; } picture img { width: 100%; min-width: 42rem; height: auto; display: block; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .25rem .7rem; border-bottom: 1px solid var(--line); overflow-wrap: normal; }
th:first-child, td:first-child, td.text { text-align: left; } td.text { min-width: 16rem; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(8.5rem, 1fr)); gap: .7rem; }
.cards figure, .texts figure { margin: 0; background: var(--box); border: 1px solid var(--line); border-radius: 8px;
  padding: .5rem; }
.cards img { width: 100%; image-rendering: pixelated; border-radius: 4px; display: block; margin-bottom: .3rem; }
.texts { display: grid; gap: .6rem; } figcaption { font-size: .82rem; color: var(--soft); }
.token { padding: .08rem .2rem; margin: .08rem 0; border-radius: 3px; display: inline-block; font-size: .93rem; }
.scale { height: .7rem; border-radius: 3px; width: 14rem; max-width: 100%;
  background: linear-gradient(90deg, {{ scale }}); }
.ends { width: 14rem; max-width: 100%; display: flex; justify-content: space-between; }
</style>
</head>
<body>
<h1>{{ title }}</h1>
<p class="soft">{{ subtitle }}</p>
<div class="numbers">
{% for label, value in numbers %}
<div><b>{{ value }}</b><span>{{ label }}</span></div>
{% endfor %}
</div>
{% for note in notes %}
<p class="soft">Note: {{ note }}</p>
{% endfor %}
{% for figure in figures %}
<h2>{{ figure.title }}</h2>
<picture>
<source media="(prefers-color-scheme: dark)" srcset="{{ figure.dark }}">
<img src="{{ figure.light }}" alt="{{ figure.text }}">
</picture>
<p class="soft">{{ figure.text }}</p>
{% endfor %}
{% for group in shown %}
<h2>{{ group.title }}</h2>
<p class="soft">{{ group.text }}</p>
{% if group.scale %}
<div class="scale"></div><div class="ends soft"><span>0 %</span><span>sites run</span><span>100 %</span></div>
{% endif %}
<div class="{{ group.kind }}">
{% for one in group.inputs %}
<figure>
{% if one.image %}<img src="{{ one.image }}" alt="input {{ one.index }}">{% endif %}
{% if one.map %}<img src="{{ one.map }}" alt="share of sites run, patch by patch">{% endif %}
{% for token in one.tokens %}
<span class="token" style="background:{{ token.colour }};color:{{ token.ink }}" title="{{ token.title }}">{{ token.text }}</span>
{% endfor %}
<figcaption>{{ one.caption }}</figcaption>
</figure>
{% endfor %}
</div>
{% endfor %}
{% for table in tables %}
<h2>{{ table.title }}</h2>
{% if table.text %}<p class="soft">{{ table.text }}</p>{% endif %}
<div class="wide"><table>
<thead><tr>{% for name in table.columns %}<th>{{ name }}</th>{% endfor %}</tr></thead>
<tbody>
{% for row in table.rows %}
<tr>{% for cell in row %}<td{% if loop.index0 in table.texts %} class="text"{% endif %}>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}
</tbody></table></div>
{% endfor %}
<p class="soft">{{ footer }}</p>
</body>
</html>
"""
