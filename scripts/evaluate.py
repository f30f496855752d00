"""Measure one model on one task: retrieval, zero-shot classification, or both."""

from clipgraft.job import Job
from clipgraft.settings import EvaluateJob


def main(job: Job) -> None:
    """One library call."""
    from clipgraft.evaluation.evaluate import evaluate

    with job.outputs() as out:
        settings = job.settings(EvaluateJob)
        facts = evaluate(
            settings,
            job.folder("model"),
            job.folder("index"),
            out,
            task_name=settings.task,
            threads=job.threads,
        )
        job.record(**facts)


if __name__ == "__main__":
    Job.run(main, __doc__)
