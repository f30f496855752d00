# Helpers of the rules: the plan of all runs, and functions that look a job up by its version.
#
# JOBS    (stage, version) -> PlannedJob, over all runs; runs that share a prefix share jobs
# RUNS    run name -> its jobs; `sweep` -> the page of the sweep
# CODE    stage -> fingerprint of the code its script reaches

import json
from shlex import quote

from snakemake.exceptions import WorkflowError

from clipgraft.config import ConfigError, load_config, sweep_points
from clipgraft.planning import SWEEP, plan_runs
from clipgraft.runs import show
from clipgraft.settings import STAGES
from clipgraft.versions import fingerprint

try:
    SETTINGS = load_config(config)
    POINTS = sweep_points(config)
    RUNS = plan_runs(SETTINGS, POINTS)
except ConfigError as error:
    raise WorkflowError(f"config: {error}") from None
JOBS = {(job.stage, job.version): job for jobs in RUNS.values() for job in jobs}
WISHES = {
    (job.stage, job.version): SETTINGS.get(
        run, next(iter(SETTINGS.values()))
    ).resources_of(job.stage)
    for run, jobs in reversed(RUNS.items())
    for job in jobs
}
CODE = {stage: fingerprint(ROOT / "scripts" / f"{stage}.py") for stage in STAGES}
PYTHON = quote(sys.executable)
LAUNCH = f"{PYTHON} -m clipgraft.launch"
SCRIPTS = quote(str(ROOT / "scripts"))


wildcard_constraints:
    version="[0-9a-f]{8}",
    run="[A-Za-z0-9_-]+",


def planned(stage, wildcards):
    try:
        return JOBS[stage, wildcards.version]
    except KeyError:
        raise WorkflowError(
            f"no run of this config has {stage}/{wildcards.version}. Hint: results/runs/<run>/versions.json lists them"
        ) from None


def manifests(stage):
    """The manifests of the jobs whose outputs this one reads, by input name."""
    return lambda wildcards: {
        name: f"results/{job.folder}/manifest.json"
        for name, job in planned(stage, wildcards).inputs.items()
    }


def manifest_list(stage):
    return lambda wildcards: list(manifests(stage)(wildcards).values())


def arguments(stage):
    """`--input name=manifest` for every input."""
    return lambda wildcards: " ".join(
        f"--input {name}={path}" for name, path in manifests(stage)(wildcards).items()
    )


def settings(stage):
    return lambda wildcards: json.dumps(
        planned(stage, wildcards).settings, sort_keys=True
    )


def name(stage):
    """What log lines begin with. A resource of the rules, since a changed name must re-run nothing."""
    return lambda wildcards: planned(stage, wildcards).name


def batch_size(stage):
    """The global batch, which processes share evenly; 0 where there is none."""
    return lambda wildcards: planned(stage, wildcards).settings.get("batch_size", 0)


def sources(stage):
    """Names and sizes of the files that a job reads, of ours or of the user."""
    return lambda wildcards: list(planned(stage, wildcards).sources)


def url_downloads():
    """Manifests of the downloads that have something to fetch again."""
    return [
        f"results/{job.folder}/manifest.json"
        for job in JOBS.values()
        if job.stage == "download" and job.settings["source"]["kind"] == "urls"
    ]


def wish(stage, key):
    """One of the resources that the config gives a stage."""
    return lambda wildcards: getattr(WISHES[stage, wildcards.version], key)


def gres(stage):
    """Devices per node, for SLURM."""

    def per_node(wildcards):
        wished = WISHES[stage, wildcards.version]
        return f"gpu:{max(1, wished.gpu // wished.nodes)}" if wished.gpu else ""

    return per_node


def run_page(wildcards):
    """Manifest of the page, which reads all others."""
    return [
        f"results/{job.folder}/manifest.json"
        for job in RUNS[wildcards.run]
        if job.stage in ("report", "scaling")
    ]


def run_versions(wildcards):
    return json.dumps({job.name: job.folder for job in RUNS[wildcards.run]})


def show_results():
    """Print the tables of all runs, if their pages were among what was asked for; of a sweep its own."""
    for run in (run for run in RUNS if run not in POINTS):
        page = "scaling" if run == SWEEP else "report"
        if Path(f"results/runs/{run}/{page}/results.txt").exists():
            print(show(run), file=sys.stderr)
