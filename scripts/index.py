"""Decode every image once, accept or reject it, and tokenize the captions: row i is sample i."""

from clipgraft.job import Job
from clipgraft.settings import IndexJob


def main(job: Job) -> None:
    """One library call."""
    from clipgraft.data.index import build_index

    # One download, or of a mixed data set `download_<source>` of each.
    downloads = job.folders("download") or {"download": job.folder("download")}
    by_source = {name.partition("_")[2]: folder for name, folder in downloads.items()}
    with job.outputs() as out:
        others = job.folders("not_in_")
        facts = build_index(
            job.settings(IndexJob),
            by_source,
            out,
            threads=job.threads,
            not_in={name.removeprefix("not_in_"): folder for name, folder in others.items()},
        )
        job.record(**facts)


if __name__ == "__main__":
    Job.run(main, __doc__)
