"""Draw the report of a run: one self-contained page, and the results as tables."""

from clipgraft.job import Job
from clipgraft.settings import ReportJob


def main(job: Job) -> None:
    """One library call."""
    from clipgraft.report.report import report

    with job.outputs() as out:
        job.record(**report(job.settings(ReportJob), job.folders(), out))


if __name__ == "__main__":
    Job.run(main, __doc__)
