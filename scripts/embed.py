"""Embed the training set with one model."""

from clipgraft.job import Job
from clipgraft.settings import EmbedSettings


def main(job: Job) -> None:
    """One library call."""
    from clipgraft.embed import embed

    with job.outputs() as out:
        settings = job.settings(EmbedSettings)
        job.record(
            **embed(settings, job.folder("model"), job.folder("index"), job.folder("shard"), out)
        )


if __name__ == "__main__":
    Job.run(main, __doc__)
