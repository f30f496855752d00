"""Compare finished runs on one page: `python -m clipgraft.report RUN RUN ... --page compare.html`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from clipgraft.config import ConfigError
from clipgraft.report.comparison import comparison


def main() -> None:
    """Write the page and say where it is."""
    parser = argparse.ArgumentParser(prog="python -m clipgraft.report", description=__doc__)
    parser.add_argument("runs", nargs="+", help="names under results/runs/, each with its report")
    parser.add_argument("--page", type=Path, default=Path("compare.html"), help="file to write")
    parser.add_argument("--results", type=Path, default=Path("results"), help="the store")
    given = parser.parse_args()
    try:
        page = comparison(given.runs, given.results)
    except ConfigError as error:
        sys.exit(f"compare: {error}")
    given.page.parent.mkdir(parents=True, exist_ok=True)
    given.page.write_text(page, encoding="utf-8")
    print(f"{given.page}: {len(page.encode()) / 2**20:.1f} MB")


if __name__ == "__main__":
    main()
