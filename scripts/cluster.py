"""Cluster the embeddings of one expert and accumulate pseudo labels over the rounds."""

from clipgraft.job import Job
from clipgraft.settings import ClusterJob


def main(job: Job) -> None:
    """One library call."""
    from clipgraft.cluster import cluster

    with job.outputs() as out:
        facts = cluster(
            job.settings(ClusterJob),
            job.folder("embed"),
            job.optional("previous"),
            out,
            threads=job.threads,
        )
        job.record(**facts)


if __name__ == "__main__":
    Job.run(main, __doc__)
