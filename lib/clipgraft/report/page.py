"""The page: one HTML file without scripts, network or other files; numbers of figures ride along as data.

The template stands here and not in a file of its own so that an edit of it changes the fingerprint
of this module, and with it redraws the report.
"""

from __future__ import annotations

from base64 import b64encode
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from clipgraft.report.page_style import CSS
from clipgraft.report.style import themed
from clipgraft.report.tables import to_csv

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
<figure id="{{ drawn.name }}"><b>{{ drawn.title }}</b>
<div class="scroll">{{ drawn.svg | themed | safe }}</div><figcaption>{{ drawn.caption }} Numbers:
<a download="{{ drawn.name }}.csv" href="{{ drawn.rows | csv_url }}">{{ drawn.name }}.csv</a></figcaption></figure>
{%- endmacro %}
{%- macro place(table, column) -%}
{{ 'first' if column in table.group_starts }}{{ ' text' if column in table.text_columns }}{{ ' long' if column in table.long_columns }}
{%- endmacro %}
{%- macro grid(table) %}
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
<td class="{{ place(table, loop.index0) }}{{ ' best' if cell.is_best }}{{ ' mono' if cell.is_code }}"
{%- if cell.shade %} style="background: rgba(0,114,178,{{ cell.shade }})"{% endif %}>
{%- if cell.colour %}<i class="dot" style="background: {{ cell.colour | themed }}"></i>{% endif -%}
{{ cell.text }}</td>
{%- endfor %}</tr>
{%- endfor %}
</table></div>
{%- if table.caption %}
<p class="muted">{{ table.caption }}</p>
{%- endif %}
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
{%- for section in sections %}
<section id="{{ section.id }}">
<h2><span class="number">{{ loop.index }}</span>{{ section.title }}</h2>
{%- if section.text %}
<p>{{ section.text }}</p>
{%- endif %}
{%- for table in section.tables %}
{%- if table.is_folded %}
<details><summary>{{ table.title }}</summary>{{ grid(table) }}</details>
{%- else %}
<h3>{{ table.title }}</h3>{{ grid(table) }}
{%- endif %}
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
        content: `title`, `run`, `subtitle`, `headline`, `tiles`, `sections`.
    """
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, keep_trailing_newline=True
    )
    environment.filters |= {"themed": themed, "csv_url": _csv_url}
    return environment.from_string(TEMPLATE).render(css=Markup(CSS), **content)


def _csv_url(rows: Any) -> str:
    """Rows as a file that stands in its own address, so that it travels with the page."""
    return f"data:text/csv;base64,{b64encode(to_csv(rows).encode()).decode()}"
