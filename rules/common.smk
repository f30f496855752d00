# Helpers of the rules: the plan of all runs, and functions that look a job up by its version.
#
# JOBS    (stage, version) -> PlannedJob, over all runs; runs that share a prefix share jobs
# RUNS    run name -> its jobs; `sweep` -> the page of the sweep
# CODE    stage -> fingerprint of the code its script reaches

import functools
import json
from shlex import quote

from snakemake.exceptions import WorkflowError
from snakemake.settings.types import DeploymentMethod

from clipgraft.config import (
    ConfigError,
    load_config,
    merge,
    read_layers,
    sweep_points,
    with_nulls,
)
from clipgraft.crosschecks import unequal_steps
from clipgraft.planning import SWEEP, plan_runs
from clipgraft.runs import shown
from clipgraft.settings import STAGES
from clipgraft.versions import (
    MEMORY,
    MIN_SUCCESS,
    WATCHED,
    deciding,
    fingerprint,
    num_failures,
)

try:
    # As Snakemake would merge them, but that sources and reductions of another kind replace what was there.
    CONFIG = merge(
        read_layers(*(workflow.overwrite_configfiles or workflow.configfiles)),
        with_nulls(workflow.config_settings.config),
    )
    SETTINGS = load_config(CONFIG)
    POINTS = sweep_points(CONFIG)
    RUNS = plan_runs(SETTINGS, POINTS)
except ConfigError as error:
    raise WorkflowError(f"config: {error}") from None
# Of runs that share a job, the first one says how it fits into memory, when it fails and what it wishes for.
JOBS = {
    (job.stage, job.version): job for jobs in reversed(RUNS.values()) for job in jobs
}
for run, jobs in RUNS.items() if workflow.is_main_process else ():
    for job in jobs:
        first, given = (
            {**settings, **settings.get("source", {})}
            for settings in (JOBS[job.stage, job.version].settings, job.settings)
        )
        keys = (*MEMORY, MIN_SUCCESS)
        if others := [key for key in keys if first.get(key) != given.get(key)]:
            logger.warning(
                f"{job.name} of run {run} is that of a run before it, which says how it is made: "
                f"{', '.join(f'{key} = {json.dumps(first[key])}' for key in others)}. Hint: the same in both"
            )
for run, settings_of in SETTINGS.items() if workflow.is_main_process else ():
    if message := unequal_steps(settings_of):
        logger.warning(f"run {run}: {message}")
WISHES = {
    (job.stage, job.version): SETTINGS.get(
        run, next(iter(SETTINGS.values()))
    ).resources_of(job.stage)
    for run, jobs in reversed(RUNS.items())
    for job in jobs
}
SITE = next(iter(SETTINGS.values())).slurm
CODE = {stage: fingerprint(ROOT / "scripts" / f"{stage}.py") for stage in STAGES}
IN_IMAGE = DeploymentMethod.APPTAINER in workflow.deployment_settings.deployment_method
PYTHON = "python3" if IN_IMAGE else quote(sys.executable)
LAUNCH = f"{PYTHON} -m clipgraft.launch --seconds-to-save {SITE.seconds_to_save}"
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


def decides(stage, wildcards):
    """Settings and inputs of a job that results depend on."""
    job = planned(stage, wildcards)
    return deciding(job.settings, job.inputs)


def manifests(stage):
    """The manifests of the jobs whose outputs this one reads, by input name."""
    return lambda wildcards: {
        name: f"results/{job.folder}/manifest.json"
        for name, job in decides(stage, wildcards)[1].items()
    }


@functools.cache
def warn_once(message):
    logger.warning(message)


def watched(stage):
    """The samples that a training is watched on: they must be there before it, and are no reason to train again."""

    def beside(wildcards):
        job = planned(stage, wildcards)
        aside = job.inputs.keys() - decides(stage, wildcards)[1].keys()
        paths = {
            name: f"results/{job.inputs[name].folder}/manifest.json" for name in aside
        }
        if Path(f"results/{job.folder}/manifest.json").exists():
            for path in paths.values():
                if not Path(path).exists():
                    warn_once(
                        f"{job.name} is there and {path} is not: trained again in this call, it would not be watched. "
                        f"Hint: snakemake --cores all {path}, then this"
                    )
            paths = {name: path for name, path in paths.items() if Path(path).exists()}
        return {name: ancient(path) for name, path in paths.items()}

    return beside


def watch(stage):
    """How a training fits into memory, is compiled and is watched. These words depend on the input, so a change re-runs nothing."""

    def words(wildcards, input):
        given = planned(stage, wildcards).settings
        chosen = {key: given[key] for key in MEMORY if given[key] != MEMORY[key]}
        said = [f"--set {key}={json.dumps(value)}" for key, value in chosen.items()]
        if WATCHED in input.keys() and WATCHED not in decides(stage, wildcards)[1]:
            how = json.dumps(given["watch"], sort_keys=True)
            said += [f"--set {quote(f'watch={how}')}"]
            said += [f"--input {WATCHED}={input[WATCHED]}"]
        return " ".join(said)

    return words


def min_success(wildcards, input):
    """When a download fails. The word depends on the input, so a change re-runs nothing."""
    given = planned("download", wildcards).settings["source"]
    if given == decides("download", wildcards)[0]["source"]:
        return ""
    return f"--set source.{MIN_SUCCESS}={given[MIN_SUCCESS]}"


def stage_manifests(stage):
    """Of all jobs of a stage."""
    return [
        f"results/{job.folder}/manifest.json"
        for job in JOBS.values()
        if job.stage == stage
    ]


def manifest_list(stage):
    return lambda wildcards: list(manifests(stage)(wildcards).values())


def arguments(stage):
    """`--input name=manifest` for every input."""
    return lambda wildcards: " ".join(
        f"--input {name}={path}" for name, path in manifests(stage)(wildcards).items()
    )


def settings(stage):
    return lambda wildcards: json.dumps(decides(stage, wildcards)[0], sort_keys=True)


def name(stage):
    """What log lines begin with. A resource of the rules, since a changed name must re-run nothing."""
    return lambda wildcards: planned(stage, wildcards).name


def run_of(stage, wildcards):
    """Name of the run that a page is of."""
    return planned(stage, wildcards).settings["run"]


def batch_size(stage):
    """Samples of the global batch that processes take at a time and share evenly; 0 where there is none."""

    def at_a_time(wildcards):
        settings = planned(stage, wildcards).settings
        return settings.get("batch_size", 0) // settings.get("accumulate", 1)

    return at_a_time


def sources(stage):
    """Names, sizes and hashes of the files that a job reads, of ours or of the user."""
    return lambda wildcards: list(planned(stage, wildcards).sources)


def failures(stage):
    """How often a job's task has failed. Each failure changes this, so that the next call tries again."""
    return lambda wildcards: num_failures(Path(f"results/{stage}/{wildcards.version}"))


def url_downloads(wildcards):
    """Manifests of the downloads that have something to fetch again."""
    found = [
        f"results/{job.folder}/manifest.json"
        for job in JOBS.values()
        if job.stage == "download" and job.settings["source"]["kind"] == "urls"
    ]
    if not found:
        warn_once(
            "there is nothing to fetch again: no source of this config is of kind `urls`. Hint: of another config, "
            "--configfile FILE -- before retry"
        )
    return found


def wish(stage, key):
    """One of the resources that the config gives a stage."""
    return lambda wildcards: getattr(WISHES[stage, wildcards.version], key)


def embed_parts(wildcards):
    """What says that the jobs which share an embedding are done; the job that gathers fills what they left out."""
    num = WISHES["embed", wildcards.version].jobs
    folder = f"results/embed/{wildcards.version}"
    return [f"{folder}/.part-{k}-of-{num}" for k in range(num)] if num > 1 else []


def slurm(stage, key):
    """How SLURM is asked for the devices of a job (`SlurmSettings`). Resources alone, so a site re-runs nothing."""
    return lambda wildcards: getattr(SITE, key)(WISHES[stage, wildcards.version])


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
    """Print the tables of all runs whose planned pages are there and linked; of a sweep its own."""
    pages = {
        run: job.folder
        for run, jobs in RUNS.items()
        for job in jobs
        if run not in POINTS and job.stage in ("report", "scaling")
    }
    for table in shown(pages):
        print(table, file=sys.stderr)
