"""Train one phase of the CLIP model: from scratch, from public weights, or from the phase before."""

from clipgraft.job import Job
from clipgraft.settings import PretrainJob


def main(job: Job) -> None:
    """One library call."""
    from clipgraft.pretrain import pretrain
    from clipgraft.training_state import TrainingState

    with job.outputs() as out:
        facts = pretrain(
            job.settings(PretrainJob),
            job.folder("index"),
            job.folder("shard"),
            job.optional("init"),
            out,
            threads=job.threads,
            state=TrainingState(job.resume, job.tag),
            watched=job.optional("watched"),
            cached=job.folders("reference_"),
        )
        job.record(**facts)


if __name__ == "__main__":
    Job.run(main, __doc__)
