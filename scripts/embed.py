"""Embed the training set with one model: an expert of this workflow, or a reference from outside of it."""

from clipgraft.job import Job
from clipgraft.settings import EmbedSettings, ReferenceJob


def main(job: Job) -> None:
    """One library call; a job that has a part only leaves its outputs to the one that gathers."""
    from clipgraft import dist
    from clipgraft.embed import embed, embed_reference

    with job.part() if dist.part() else job.outputs() as out:
        index, shard = job.folder("index"), job.folder("shard")
        options = {"threads": job.threads, "resume": job.resume, "tag": job.tag}
        if "model" in job.raw_settings:
            facts = embed_reference(job.settings(ReferenceJob), index, shard, out, **options)
        else:
            settings, model = job.settings(EmbedSettings), job.folder("model")
            facts = embed(settings, model, index, shard, out, **options)
        job.record(**facts)


if __name__ == "__main__":
    Job.run(main, __doc__)
