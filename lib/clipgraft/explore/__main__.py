"""Try the models of a finished run in the browser: `python -m clipgraft.explore RUN`, or `make explore RUN=demo`."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import tempfile
import time
from pathlib import Path

from clipgraft.config import ConfigError
from clipgraft.explore.finished import FinishedRun
from clipgraft.log import set_up
from clipgraft.orphan import leave_with_parents
from clipgraft.runs import RESULTS

log = logging.getLogger(__name__)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m clipgraft.explore", description=__doc__)
    parser.add_argument("run", nargs="?", help="name of a finished run; by default the only one")
    parser.add_argument("--results", type=Path, default=RESULTS, help="the store")
    parser.add_argument("--port", type=int, help="by default the first free one from 7860 on")
    parser.add_argument(
        "--samples",
        type=int,
        default=5000,
        help="embed at most so many samples where no embeddings are stored (default: %(default)s)",
    )
    given = parser.parse_args()
    set_up("explore")
    leave_with_parents()
    logging.getLogger("httpx").setLevel(
        logging.WARNING
    )  # Gradio asks its own server whether it is there
    try:
        run = FinishedRun.open(given.run or None, given.results)
        if given.samples < 1:
            raise ConfigError(f"--samples {given.samples}: 1 or more are needed to search among")
    except ConfigError as error:
        sys.exit(f"explore: {error}")
    log.info("run %s: models %s; data %s", run.name, ", ".join(run.models), ", ".join(run.indexes))
    with tempfile.TemporaryDirectory(prefix="clipgraft-explore-") as temporary:
        _serve(run, given, Path(temporary))


def _serve(run: FinishedRun, given: argparse.Namespace, temporary: Path) -> None:
    """Serve until Ctrl-C."""
    # Read when Gradio is imported: no statistics, no look for newer versions, and pictures that go when the page does.
    os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_OFFLINE": "1"}
    os.environ["GRADIO_TEMP_DIR"] = str(temporary)
    from clipgraft.explore.explorer import Explorer
    from clipgraft.explore.page import build_page, serve

    threads = len(os.sched_getaffinity(0))
    explorer = Explorer(run, given.results / "explore", given.samples, threads)
    try:
        address = serve(build_page(explorer), given.port)
    except OSError as error:
        sys.exit(f"explore: port {given.port}: {error}. Hint: another --port, or none")
    log.info("open %s   (Ctrl-C ends it)", address)
    try:
        while True:
            time.sleep(3600)
    except KeyboardInterrupt:
        log.info("closed")


if __name__ == "__main__":
    main()
