"""Decode every image once, accept or reject it, and tokenize the captions: row i is sample i."""

from clipgraft.job import Job
from clipgraft.settings import IndexJob


def main(job: Job) -> None:
    """One library call."""
    from clipgraft.data.index import build_index

    with job.outputs() as out:
        facts = build_index(
            job.settings(IndexJob), job.folder("download"), out, threads=job.threads
        )
        job.record(**facts)


if __name__ == "__main__":
    Job.run(main, __doc__)
