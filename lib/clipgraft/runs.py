"""Runs: links from a run into the store, for people; its lock; and what in the store no run uses any more."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

from clipgraft.aside import write_json
from clipgraft.compare import LOCK, compare
from clipgraft.config import ConfigError, load_config, read_layers, sweep_points
from clipgraft.integrity import to_the_present
from clipgraft.planning import plan_runs
from clipgraft.provenance import MANIFEST
from clipgraft.settings import STAGES

RESULTS = Path("results")


def link_run(run: str, versions: Mapping[str, str], results: Path = RESULTS) -> None:
    """Make `runs/<run>/<job>` links to the versions of a run, then write its lock.

    Args:
        run: name.
        versions: job name (`pretrain/short`) to folder in the store (`pretrain/1a2b3c4d`).
        results: the store.
    """
    folder = results / "runs" / run
    for path in sorted(folder.rglob("*"), reverse=True):  # old links; what else is there stays
        if path.is_symlink():
            path.unlink()
        elif path.is_dir() and not any(path.iterdir()):  # deepest first: a link may take its place
            path.rmdir()
    for name, target in versions.items():
        link = folder / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(results / target, link.parent))
    to_the_present(results / target for target in versions.values())
    write_json(folder / LOCK, dict(versions))


def unused(planned: Collection[str], results: Path = RESULTS) -> Iterator[Path]:
    """Folders of the store that no run needs, stopped ones too; and what evaluations and `explore` keep, which may always go.

    Args:
        planned: folders in the store of runs that may not be finished, and so have no lock yet.
        results: the store; what locks name is in use.
    """
    yield from sorted((results / "evaluate").glob(".*"))
    yield from results.glob("explore")
    used = set(planned)
    for lock in (results / "runs").glob(f"*/{LOCK}"):
        used |= set(json.loads(lock.read_text()).values())
    for folder in sorted(results.glob("*/*")):
        stage = folder.parent.name
        is_version = stage in STAGES and re.fullmatch("[0-9a-f]{8}", folder.name)
        is_made = is_version or (stage != "runs" and (folder / MANIFEST).exists())
        if is_made and str(folder.relative_to(results)) not in used:
            yield folder


def show(run: str, results: Path = RESULTS) -> str:
    """The results of a run as a table, and where its page is; of a sweep what it shows.

    Raises:
        ConfigError: if there is no such run, or it has no page.
    """
    page = "scaling" if (results / "runs" / run / "scaling").exists() else "report"
    folder = results / "runs" / run / page
    table = folder / "results.txt"
    if not table.exists():
        known = sorted(path.parent.name for path in (results / "runs").glob(f"*/{LOCK}"))
        raise ConfigError(
            f"run {run!r} has no {table}. Hint: one of {', '.join(known) or 'none yet'}"
        )
    return f"\n{table.read_text()}\n{page}: {folder / f'{page}.html'}"


def shown(pages: Mapping[str, str], results: Path = RESULTS) -> Iterator[str]:
    """The tables of runs, as `show` has them; none where the run still links to a page of other settings.

    Args:
        pages: run to the folder of its planned page in the store (`report/1a2b3c4d`).
        results: the store.
    """
    for run, folder in pages.items():
        link = results / "runs" / run / folder.split("/")[0]
        if (link / "results.txt").exists() and link.resolve() == (results / folder).resolve():
            yield show(run, results)


def main() -> None:
    """Command line: `python -m clipgraft.runs link RUN JSON`, `show RUN`, `compare RUN ...` or `unused`."""
    parser = argparse.ArgumentParser(description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    link = verbs.add_parser("link", help="link a run into the store and write its lock")
    link.add_argument("run")
    link.add_argument("versions", type=json.loads)
    lister = verbs.add_parser(
        "unused", help="list folders that no run uses, with their size; nothing is deleted"
    )
    lister.add_argument(
        "--configfile",
        type=Path,
        nargs="+",
        default=[Path("config.yaml")],
        help="of runs that are not finished (default: config.yaml)",
    )
    verbs.add_parser("show", help="print the results of a run").add_argument("run")
    several = verbs.add_parser(
        "compare",
        help="one table of several runs, mean and spread over seeds; as a page: python -m clipgraft.report RUN ...",
    )
    several.add_argument("runs", nargs="+")
    given = parser.parse_args()
    if given.verb == "link":
        link_run(given.run, given.versions)
        return
    if given.verb in ("show", "compare"):
        try:
            print(show(given.run) if given.verb == "show" else compare(given.runs, RESULTS))
        except ConfigError as error:
            sys.exit(f"{given.verb}: {error}")
        return
    try:
        raw = read_layers(*given.configfile)
        plan = plan_runs(load_config(raw), sweep_points(raw))
    except ConfigError as error:
        sys.exit(f"unused: {error}")
    total = 0
    for folder in unused({job.folder for jobs in plan.values() for job in jobs}):
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        total += size
        print(f"{size / 2**20:10,.1f} MB  {folder}")
    print(
        f"{total / 2**20:10,.1f} MB in all, used by no finished run, nor by those of {' '.join(map(str, given.configfile))} "
        "(--configfile: of other runs that are not finished)"
    )


if __name__ == "__main__":
    main()
