"""Draw the inverse scaling law of a sweep: one self-contained page, figures and numbers as files."""

from clipgraft.job import Job
from clipgraft.settings import ScalingJob


def main(job: Job) -> None:
    """One library call."""
    from clipgraft.report.scaling import scaling

    with job.outputs() as out:
        job.record(**scaling(job.settings(ScalingJob), job.folders(), out))


if __name__ == "__main__":
    Job.run(main, __doc__)
