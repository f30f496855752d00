"""Train the routers of the assembled CLIP-MoE; its experts or all of it, where that is asked for."""

from clipgraft.job import Job
from clipgraft.settings import RouterJob


def main(job: Job) -> None:
    """One library call."""
    from clipgraft.router import finetune_router
    from clipgraft.training_state import TrainingState

    with job.outputs() as out:
        facts = finetune_router(
            job.settings(RouterJob),
            job.folder("init"),
            job.folder("index"),
            job.folder("shard"),
            out,
            threads=job.threads,
            state=TrainingState(job.resume, job.tag),
            watched=job.optional("watched"),
        )
        job.record(**facts)


if __name__ == "__main__":
    Job.run(main, __doc__)
