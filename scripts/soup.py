"""Average the weights of all experts into one dense model."""

from clipgraft.job import Job
from clipgraft.settings import SoupJob


def main(job: Job) -> None:
    """One library call."""
    from clipgraft.soup import soup

    with job.outputs() as out:
        job.settings(SoupJob)
        job.record(**soup(list(job.folders("expert_").values()), out))


if __name__ == "__main__":
    Job.run(main, __doc__)
