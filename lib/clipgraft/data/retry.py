"""Retry: fetch again what failed in finished downloads of URL tables, and only that.

`python -m clipgraft.data.retry FOLDER` (a folder of `results/download/`) lays what was had aside as the work of a
stopped download; `scripts/download.py FOLDER/manifest.json --out FOLDER` then goes on with it. `snakemake retry`
does both for all downloads of the config; what stands on them is run again afterwards.
"""

from __future__ import annotations

import argparse
import logging
import shutil
from pathlib import Path

from clipgraft import log as logging_setup
from clipgraft.config import ConfigError
from clipgraft.data.fetch import lay_aside
from clipgraft.data.outcomes import OUTCOMES, failures, read_outcomes, requested_of
from clipgraft.job import RESUME
from clipgraft.provenance import check_outputs, read_manifest

log = logging.getLogger(__name__)


def prepare_retry(folder: Path) -> int:
    """Make the next download into `folder` fetch only what failed.

    Args:
        folder: outputs of a finished download of a URL table.

    Returns:
        How many images failed, those that were never tried among them.

    Raises:
        ConfigError: if the folder is no finished download of URLs.
    """
    check_outputs(folder, read_manifest(folder))
    path = folder / OUTCOMES
    requested = requested_of(path)
    if not requested:
        raise ConfigError(
            f"{folder} is no download of URLs. Hint: only a source of kind `urls` has what can be "
            "fetched again"
        )
    work = folder / RESUME
    if (work / requested).is_dir():
        log.info("going on with a retry that was stopped")
    else:
        shutil.rmtree(work, ignore_errors=True)
        lay_aside(folder, work / requested)
    outcomes = read_outcomes(path)
    num_failed = failures(outcomes).total()
    log.info("%s: %s of %s images failed", folder, f"{num_failed:,}", f"{len(outcomes):,}")
    return num_failed


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="outputs of a finished download")
    given = parser.parse_args()
    logging_setup.set_up("retry")
    try:
        prepare_retry(given.folder)
    except ConfigError as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
