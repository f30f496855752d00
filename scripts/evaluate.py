"""Measure one model on one task, or several side by side: retrieval, zero-shot classification, probes."""

from clipgraft.job import Job
from clipgraft.settings import EvaluateJob


def main(job: Job) -> None:
    """One library call."""
    from clipgraft.evaluation.evaluate import evaluate

    with job.outputs() as out:
        settings = job.settings(EvaluateJob)
        model, *beside = job.folders("model").values() or [job.folder("model")]
        facts = evaluate(
            settings,
            model,
            job.folder("index"),
            out,
            task_name=settings.task,
            beside=beside,
            untrained=settings.untrained,
            threads=job.threads,
        )
        job.record(**facts)


if __name__ == "__main__":
    Job.run(main, __doc__)
