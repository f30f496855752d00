"""Store each image once more, small and in row order, at the size that a training phase needs."""

from clipgraft.job import Job
from clipgraft.settings import ShardJob


def main(job: Job) -> None:
    """One library call."""
    from clipgraft.data.shards import write_shards

    with job.outputs() as out:
        facts = write_shards(job.settings(ShardJob), job.folder("index"), out, threads=job.threads)
        job.record(**facts)


if __name__ == "__main__":
    Job.run(main, __doc__)
