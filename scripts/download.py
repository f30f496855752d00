"""Get images and captions as they come: generate, download by URL, or check what is on disk."""

from clipgraft.job import Job
from clipgraft.settings import DownloadJob


def main(job: Job) -> None:
    """One library call."""
    from clipgraft.data.download import download

    source = job.settings(DownloadJob).source
    with job.outputs() as out:
        job.record(**download(source, out, threads=job.threads, work=job.resume))


if __name__ == "__main__":
    Job.run(main, __doc__)
