"""Graft the experts into one CLIP-MoE with fresh routers."""

from clipgraft.job import Job
from clipgraft.settings import AssembleJob


def main(job: Job) -> None:
    """One library call."""
    from clipgraft.graft import assemble

    with job.outputs() as out:
        facts = assemble(
            job.settings(AssembleJob),
            list(job.folders("expert_").values()),
            out,
            index=job.optional("index"),
            shard=job.optional("shard"),
            threads=job.threads,
        )
        job.record(**facts)


if __name__ == "__main__":
    Job.run(main, __doc__)
