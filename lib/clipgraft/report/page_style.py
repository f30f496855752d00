"""The style sheet of the page: light and dark, from a phone to a wide screen, and on paper.

Colours of figures that follow the page have the names of `style.THEMED`.
"""

CSS = """
:root { --ink: #1f2328; --muted: #5b6370; --line: #e5e7eb; --edge: #9ca3af; --rail: #d1d5db; --soft: #f6f7f9;
  --page: #fff; --blue: #0072b2; --base: #333; --violet: #5d4e9e; --brown: #6e4b2a; color-scheme: light; }
@media screen and (prefers-color-scheme: dark) {
  :root { --ink: #e6e8eb; --muted: #a3adba; --line: #2f3540; --edge: #6b7480; --rail: #4a5260; --soft: #1f242c;
    --page: #14171c; --blue: #6cb6ff; --base: #f2f2f2; --violet: #9d8fe0; --brown: #b98d66; color-scheme: dark; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1040px; padding: 28px 24px 72px; background: var(--page);
  color: var(--ink); font: 15px/1.55 system-ui, "Segoe UI", Helvetica, Arial, "DejaVu Sans", sans-serif; }
h1 { font-size: 28px; line-height: 1.2; margin: 0 0 4px; letter-spacing: -0.01em; overflow-wrap: anywhere; }
h2 { font-size: 20px; margin: 52px 0 6px; padding-top: 14px; border-top: 2px solid var(--ink); }
h2 .number { color: var(--muted); font-weight: 400; margin-right: 6px; }
h3 { font-size: 15.5px; margin: 28px 0 6px; }
p { margin: 6px 0 12px; max-width: 84ch; overflow-wrap: anywhere; }
p.muted { max-width: 100ch; }
a { color: var(--blue); }
.muted, figcaption { color: var(--muted); font-size: 13.5px; }
nav { margin: 14px 0 20px; font-size: 14px; line-height: 1.9; }
nav a { text-decoration: none; margin-right: 18px; display: inline-block; }
nav a:hover { text-decoration: underline; }
figure { margin: 22px 0 30px; }
figure > b { display: block; font-size: 15.5px; margin-bottom: 6px; }
figure svg { display: block; max-width: 100%; height: auto; }
figcaption { max-width: 100ch; margin-top: 6px; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px;
  margin: 18px 0; }
.tile { background: var(--soft); border-radius: 8px; padding: 12px 14px; }
.tile b { display: block; font-size: 23px; line-height: 1.25; letter-spacing: -0.01em; }
.tile span { color: var(--muted); font-size: 13px; line-height: 1.35; display: block; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums;
  margin: 8px 0; }
th, td { padding: 4px 6px; text-align: right; }
th { font-weight: 500; color: var(--muted); border-bottom: 1px solid var(--line); vertical-align: bottom; line-height: 1.3; }
th.group { text-align: center; border-bottom: 0; padding-bottom: 0; color: var(--ink); }
th:first-child, td:first-child, td.text, th.text { text-align: left; }
td { border-bottom: 1px solid var(--line); vertical-align: top; white-space: nowrap; }
/* What a line is about stays in sight while the rest of a wide table scrolls. */
td:first-child, th:first-child:not(.group) { position: sticky; left: 0; background: var(--page); }
tr.chance td { color: var(--muted); font-style: italic; }
.first { border-left: 1px solid var(--line); }
td.best { font-weight: 700; }
td.long { white-space: normal; min-width: 320px; overflow-wrap: anywhere; }
.dot { display: inline-block; width: 10px; height: 10px; border-radius: 3px; margin-right: 7px; }
.mono { font: 12px/1.4 ui-monospace, Menlo, Consolas, monospace; color: var(--muted); }
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
.words { color: var(--muted); font-size: 12.5px; line-height: 1.35; overflow-wrap: anywhere; }
.examples { display: grid; grid-template-columns: repeat(auto-fill, minmax(460px, 1fr));
  gap: 18px 28px; margin: 10px 0; }
.example { display: grid; grid-template-columns: 84px 1fr; gap: 12px; font-size: 13px;
  align-items: start; overflow-wrap: anywhere; }
.example img { width: 84px; }
.example ol { margin: 0; padding: 0; list-style: none; line-height: 1.4; }
.example li { padding-left: 20px; position: relative; color: var(--muted); }
.hit { color: var(--blue) !important; font-weight: 600; }
.example li.hit::before { content: "\\2713"; position: absolute; left: 2px; }
.example li.miss::before { content: "\\00d7"; position: absolute; left: 3px; }
.query { font-size: 13.5px; margin-bottom: 5px; overflow-wrap: anywhere; }
.found { display: flex; gap: 7px; flex-wrap: wrap; }
.found div { font-size: 11.5px; text-align: center; color: var(--muted); }
.found img { width: 66px; border: 3px solid transparent; padding: 1px; background: none; }
.found .hit img { border-color: var(--blue); }
.found .wanted { border-right: 1px solid var(--line); padding-right: 9px; margin-right: 2px; }
/* On a phone wide figures and tables scroll by themselves, at a size that can be read, and the page never does. */
@media (max-width: 620px) {
  body { padding: 18px 14px 56px; }
  h1 { font-size: 23px; }
  .tiles { grid-template-columns: 1fr 1fr; }
  .sheet { grid-template-columns: repeat(auto-fill, minmax(92px, 1fr)); }
  .cluster, .examples { grid-template-columns: minmax(0, 1fr); }
  figure svg { max-width: 760px; }
  td.long { min-width: 240px; }
  td:first-child { white-space: normal; overflow-wrap: anywhere; min-width: 8em; }
}
@media print { details { display: none; } h2 { break-after: avoid; } figure { break-inside: avoid; } }
"""
