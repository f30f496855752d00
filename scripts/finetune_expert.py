"""Fine-tune the MLPs of the base on homogeneous batches; or, as a baseline, on ordinary ones."""

from clipgraft.job import Job
from clipgraft.settings import ExpertJob


def main(job: Job) -> None:
    """One library call."""
    from clipgraft.experts import finetune_expert
    from clipgraft.training_state import TrainingState

    with job.outputs() as out:
        facts = finetune_expert(
            job.settings(ExpertJob),
            job.folder("init"),
            job.folder("index"),
            job.folder("shard"),
            job.optional("labels"),
            out,
            threads=job.threads,
            state=TrainingState(job.resume, job.tag),
            watched=job.optional("watched"),
        )
        job.record(**facts)


if __name__ == "__main__":
    Job.run(main, __doc__)
