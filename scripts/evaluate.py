"""Measure one model on one task: retrieval, zero-shot classification, or both."""

from clipgraft.config import EvaluateJob
from clipgraft.job import Job


def main(job: Job) -> None:
    """One library call."""
    from clipgraft.evaluation.evaluate import evaluate

    with job.outputs() as out:
        facts = evaluate(
            job.settings(EvaluateJob),
            job.folder("model"),
            job.folder("index"),
            out,
            task_name=job.name.rsplit("/", 1)[-1],
            threads=job.threads,
        )
        job.record(**facts)


if __name__ == "__main__":
    Job.run(main, __doc__)
