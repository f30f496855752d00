"""Measure one model on one task, or several side by side: retrieval, zero-shot classification, probes."""

from clipgraft.job import Job
from clipgraft.settings import EvalsetJob, EvaluateJob


def main(job: Job) -> None:
    """One library call; what it cannot do becomes the result."""
    from clipgraft.evaluation.failure import or_failure

    models = [*job.folders("model").values()] or [job.folder("model")]
    with job.outputs() as out:
        if "evalset" in job.raw_settings:
            from clipgraft.evaluation.evalset.evaluate import evaluate_evalset

            wanted, cache = job.settings(EvalsetJob), job.out.parent / ".classifiers"
            facts = or_failure(
                f"evalset/{wanted.evalset}",
                job.out,
                out,
                lambda: evaluate_evalset(wanted, models, out, cache, threads=job.threads),
            )
        else:
            from clipgraft.evaluation.evaluate import evaluate

            settings, index = job.settings(EvaluateJob), job.folder("index")
            facts = or_failure(
                settings.task,
                job.out,
                out,
                lambda: evaluate(
                    settings,
                    models[0],
                    index,
                    out,
                    task_name=settings.task,
                    beside=models[1:],
                    untrained=settings.untrained,
                    shared=job.out.parent / ".features",
                    threads=job.threads,
                ),
            )
        job.record(**facts)


if __name__ == "__main__":
    Job.run(main, __doc__)
