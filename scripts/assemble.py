"""Graft the experts into one CLIP-MoE with fresh routers."""

from clipgraft.job import Job
from clipgraft.settings import AssembleJob


def main(job: Job) -> None:
    """One library call."""
    from clipgraft.graft import assemble

    with job.outputs() as out:
        experts = list(job.folders("expert_").values())
        job.record(**assemble(job.settings(AssembleJob), experts, out))


if __name__ == "__main__":
    Job.run(main, __doc__)
