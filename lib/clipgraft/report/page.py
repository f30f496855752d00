"""The page: one HTML file without scripts, network or other files.

The template stands here and not in a file of its own so that an edit of it changes the fingerprint
of this module, and with it redraws the report.
"""

from __future__ import annotations

from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

CSS = """
:root { --ink: #1f2328; --muted: #5b6370; --line: #e5e7eb; --soft: #f6f7f9; --blue: #0072B2;
  --orange: #D55E00; color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1040px; padding: 28px 24px 72px; background: #fff;
  color: var(--ink); font: 15px/1.55 system-ui, "Segoe UI", Helvetica, Arial, "DejaVu Sans", sans-serif; }
h1 { font-size: 28px; line-height: 1.2; margin: 0 0 4px; letter-spacing: -0.01em; }
h2 { font-size: 20px; margin: 52px 0 6px; padding-top: 14px; border-top: 2px solid var(--ink); }
h2 .number { color: var(--muted); font-weight: 400; margin-right: 6px; }
h3 { font-size: 15.5px; margin: 28px 0 6px; }
p { margin: 6px 0 12px; max-width: 84ch; }
p.muted { max-width: 100ch; }
.muted, figcaption { color: var(--muted); font-size: 13.5px; }
nav { margin: 14px 0 20px; font-size: 14px; }
nav a { color: var(--blue); text-decoration: none; margin-right: 18px; }
nav a:hover { text-decoration: underline; }
figure { margin: 22px 0 30px; }
figure > b { display: block; font-size: 15.5px; margin-bottom: 6px; }
figure svg { display: block; max-width: 100%; height: auto; }
figcaption { max-width: 100ch; margin-top: 6px; }
figcaption a { color: var(--blue); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px;
  margin: 18px 0; }
.tile { background: var(--soft); border-radius: 8px; padding: 12px 14px; }
.tile b { display: block; font-size: 23px; line-height: 1.25; letter-spacing: -0.01em; }
.tile span { color: var(--muted); font-size: 13px; line-height: 1.35; display: block; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13.5px; font-variant-numeric: tabular-nums;
  margin: 8px 0; }
th, td { padding: 4px 9px; text-align: right; white-space: nowrap; }
th { font-weight: 500; color: var(--muted); border-bottom: 1px solid var(--line); }
th.group { text-align: center; border-bottom: 0; padding-bottom: 0; color: var(--ink); }
th:first-child, td:first-child, td.text, th.text { text-align: left; }
td { border-bottom: 1px solid var(--line); }
tr.chance td { color: var(--muted); font-style: italic; }
.first { border-left: 1px solid var(--line); }
td.best { font-weight: 700; }
.dot { display: inline-block; width: 10px; height: 10px; border-radius: 3px; margin-right: 7px; }
td.settings { white-space: normal; min-width: 400px; word-break: break-word; text-align: left;
  font: 12px/1.4 ui-monospace, Menlo, Consolas, monospace; color: var(--muted); }
details { margin: 12px 0; }
summary { cursor: pointer; color: var(--blue); }
.sheet { display: grid; grid-template-columns: repeat(auto-fill, minmax(104px, 1fr)); gap: 14px 12px;
  margin: 10px 0 14px; }
.card { font-size: 11.5px; line-height: 1.3; color: var(--muted); overflow-wrap: anywhere; }
.card img { width: 100%; max-width: 118px; }
.card b { display: block; color: var(--ink); font-weight: 500; margin-top: 3px; }
.blank { max-width: 118px; aspect-ratio: 1; border-radius: 4px; background: var(--soft);
  display: grid; place-items: center; text-align: center; padding: 6px; }
img { display: block; border-radius: 4px; aspect-ratio: 1; object-fit: cover; background: var(--soft); }
.cluster { display: grid; grid-template-columns: 170px 1fr; gap: 6px 16px; padding: 10px 0;
  border-bottom: 1px solid var(--line); font-size: 13.5px; align-items: center; }
.strip { display: flex; gap: 6px; flex-wrap: wrap; }
.strip img { width: 70px; }
.words { color: var(--muted); font-size: 12.5px; line-height: 1.35; }
.examples { display: grid; grid-template-columns: repeat(auto-fill, minmax(460px, 1fr));
  gap: 18px 28px; margin: 10px 0; }
.example { display: grid; grid-template-columns: 84px 1fr; gap: 12px; font-size: 13px;
  align-items: start; }
.example img { width: 84px; }
.example ol { margin: 0; padding: 0; list-style: none; line-height: 1.4; }
.example li { padding-left: 20px; position: relative; color: var(--muted); }
.hit { color: var(--blue) !important; font-weight: 600; }
.example li.hit::before { content: "\\2713"; position: absolute; left: 2px; }
.example li.miss::before { content: "\\00d7"; position: absolute; left: 3px; }
.query { font-size: 13.5px; margin-bottom: 5px; }
.found { display: flex; gap: 7px; }
.found div { font-size: 11.5px; text-align: center; color: var(--muted); }
.found img { width: 66px; border: 3px solid transparent; padding: 1px; background: none; }
.found .hit img { border-color: var(--blue); }
.found .wanted { border-right: 1px solid var(--line); padding-right: 9px; margin-right: 2px; }
@media (max-width: 620px) { .cluster, .examples { grid-template-columns: 1fr; } }
@media print { details { display: none; } h2 { break-after: avoid; } figure { break-inside: avoid; } }
"""

TEMPLATE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}: {{ run }}</title>
<style>{{ css }}</style>
</head>
<body>
{%- macro figure(drawn) %}
{%- if drawn %}
<figure id="{{ drawn.name }}"><b>{{ drawn.title }}</b>
{{ drawn.svg | safe }}<figcaption>{{ drawn.caption }} Numbers:
<a href="figures/{{ drawn.name }}.csv">figures/{{ drawn.name }}.csv</a></figcaption></figure>
{%- endif %}
{%- endmacro %}
{%- macro place(table, column) -%}
{{ 'first' if column in table.group_starts }}{{ ' text' if column in table.text_columns }}
{%- endmacro %}
{%- macro strip(pictures) %}
<div class="strip">
{%- for p in pictures %}<img src="{{ p.url }}" alt="{{ p.caption }}" title="{{ p.caption }}">{% endfor -%}
</div>
{%- endmacro %}
<header>
<h1>{{ title }}: {{ run }}</h1>
<div class="muted">{{ subtitle }}</div>
<nav>
{%- for section in sections %}<a href="#{{ section.id }}">{{ section.title }}</a>{% endfor -%}
</nav>
</header>
{%- if headline %}
<p>{{ headline }}</p>
{%- endif %}
<div class="tiles">
{%- for tile in tiles %}
<div class="tile"><b>{{ tile.value }}</b><span>{{ tile.text }}</span></div>
{%- endfor %}
</div>
<details><summary>What was run: {{ jobs | length }} jobs, their versions, costs and settings</summary>
<p class="muted">{{ provenance }}</p>
<div class="scroll"><table>
<tr><th>job</th><th class="text">version</th><th>seconds</th><th>memory, MB</th><th>samples seen</th>
<th class="text">settings</th></tr>
{%- for job in jobs %}
<tr><td>{{ job.name }}</td><td class="text">{{ job.version }}</td><td>{{ job.seconds }}</td>
<td>{{ job.memory }}</td><td>{{ job.samples_seen }}</td><td class="settings">{{ job.settings }}</td></tr>
{%- endfor %}
</table></div></details>
{%- for section in sections %}
<section id="{{ section.id }}">
<h2><span class="number">{{ loop.index }}</span>{{ section.title }}</h2>
{%- if section.text %}
<p>{{ section.text }}</p>
{%- endif %}
{%- for table in section.tables %}
<h3>{{ table.title }}</h3>
<div class="scroll"><table>
{%- if table.groups %}
<tr>
{%- for name, span in table.groups %}
<th class="group{{ ' first' if not loop.first }}" colspan="{{ span }}">{{ name }}</th>
{%- endfor %}</tr>
{%- endif %}
<tr>
{%- for cell in table.head %}
<th class="{{ place(table, loop.index0) }}">{{ cell }}</th>
{%- endfor %}</tr>
{%- for row in table.rows %}
<tr{% if loop.first and table.first_is_chance %} class="chance"{% endif %}>
{%- for cell in row %}
<td class="{{ place(table, loop.index0) }}{{ ' best' if cell.is_best }}"
{%- if cell.shade %} style="background: rgba(0,114,178,{{ cell.shade }})"{% endif %}>
{%- if cell.colour %}<i class="dot" style="background: {{ cell.colour }}"></i>{% endif -%}
{{ cell.text }}</td>
{%- endfor %}</tr>
{%- endfor %}
</table></div>
<p class="muted">{{ table.caption }}</p>
{%- endfor %}
{%- if section.sheet %}
<h3>{{ section.sheet_title }}</h3>
<div class="sheet">
{%- for p in section.sheet %}
<div class="card"><img src="{{ p.url }}" alt="sample {{ p.row }}">{{ p.caption }}</div>
{%- endfor %}
</div>
<p class="muted">{{ section.sheet_caption }}</p>
{%- endif %}
{%- for drawn in section.figures %}{{ figure(drawn) }}{% endfor %}
{%- if section.rejects %}
<h3>Examples of what the training set leaves out</h3>
<div class="sheet" id="rejects">
{%- for r in section.rejects %}
<div class="card" title="{{ r.detail }}">
{%- if r.url %}<img src="{{ r.url }}" alt="rejected {{ r.uid }}">
{%- else %}<div class="blank">no picture</div>{% endif -%}
<b>{{ r.reason }}</b>{{ r.uid }}: {{ r.detail | truncate(90) }}</div>
{%- endfor %}
</div>
<p class="muted">Some of each reason, as far as they can be decoded. Bad: pictures that should have been kept;
the limits stand under <code>index</code> in the config.</p>
{%- endif %}
{%- for round in section.rounds %}
<h3>Round {{ round.name }}: pictures nearest to each {{ round.side }} centroid</h3>
{%- if round.caption %}
<p class="muted">{{ round.caption }}</p>
{%- endif %}
{%- for cluster in round.sheets %}
<div class="cluster"><div><b>{{ round.side }} cluster {{ cluster.number }}</b>
<div class="words">{{ "{:,}".format(cluster.size) }} samples, {{ "%.0f" % (100 * cluster.share) }} %<br>
{%- for word, share in cluster.words %}{{ word }} {{ "%.0f" % (100 * share) }} %{{ ", " if not loop.last }}
{%- endfor %}</div></div>{{ strip(cluster.pictures) }}</div>
{%- endfor %}
{%- endfor %}
{%- if section.examples %}
<h3>{{ section.examples.title }}</h3>
<p class="muted">{{ section.examples.caption }}</p>
<h3>Image to text</h3>
<div class="examples">
{%- for e in section.examples.image_to_text %}
<div class="example"><img src="{{ e.picture.url }}" alt="sample {{ e.row }}"><ol>
{%- for t in e.top %}<li class="{{ 'hit' if t.hit else 'miss' }}">{{ t.text }}</li>{% endfor -%}
</ol></div>
{%- endfor %}
</div>
<h3>Text to image</h3>
<div class="examples">
{%- for e in section.examples.text_to_image %}
<div><div class="query">{{ e.text }}</div><div class="found">
{%- for p in e.wanted %}<div class="wanted"><img src="{{ p.url }}" alt="{{ p.caption }}">asked for</div>{% endfor %}
{%- for t in e.top %}<div class="{{ 'hit' if t.hit else 'miss' }}"><img src="{{ t.picture.url }}"
 alt="{{ t.picture.caption }}" title="{{ t.picture.caption }}">{{ "&#10003;" | safe if t.hit }}</div>
{%- endfor %}</div></div>
{%- endfor %}
</div>
{%- endif %}
</section>
{%- endfor %}
</body>
</html>
"""


def render(content: dict[str, Any]) -> str:
    """Fill the template; everything that is not markup of ours is escaped.

    Args:
        content: `title`, `run`, `subtitle`, `headline`, `tiles`, `provenance`, `jobs`, `sections`.
    """
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, keep_trailing_newline=True
    )
    return environment.from_string(TEMPLATE).render(css=Markup(CSS), **content)
