"""Planning: which jobs a run consists of, and what each is handed.

`plan_run` is the DAG, top to bottom in pipeline order. A job is known by its version alone, so runs that share a
prefix share jobs without knowing of each other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from clipgraft import settings as cfg
from clipgraft.architectures import (
    check_architecture,
    check_references,
    check_weights,
    image_size_of,
)
from clipgraft.baseline_settings import BaselineSettings
from clipgraft.config import ConfigError, S, local_path, validate
from clipgraft.evalset_tasks import chosen
from clipgraft.local_files import listing
from clipgraft.moe_settings import MoeSettings, RouterSettings
from clipgraft.recipes import AugmentationSettings, PhaseSettings, TrainSettings
from clipgraft.run_settings import RunSettings
from clipgraft.schedule import peak_lr
from clipgraft.sources import MixedSource, Settings
from clipgraft.versions import WATCHED, PlannedJob, seed_for, sources_of

SWEEP = "sweep"  # stands among the runs, and is the key of the config


def plan_runs(
    runs: Mapping[str, RunSettings], points: Mapping[str, Mapping[str, str]]
) -> dict[str, list[PlannedJob]]:
    """All jobs of all runs, by run; under `sweep` the page of the sweep, if there is one.

    Args:
        runs: validated settings by name.
        points: the runs of the sweep, each with its point on every axis (`config.sweep_points`).
    """
    listing.cache_clear()  # once for all runs, anew for every plan
    planned = {name: plan_run(name, run) for name, run in runs.items()}
    if points:
        sweep = {name: (runs[name], planned[name]) for name in points}
        planned[SWEEP] = [_plan_scaling(sweep, points)]
    return planned


def _plan_scaling(
    sweep: Mapping[str, tuple[RunSettings, list[PlannedJob]]],
    points: Mapping[str, Mapping[str, str]],
) -> PlannedJob:
    """The page of a sweep reads the phases of every run, and how they and the base did on one task."""
    first, _ = next(iter(sweep.values()))
    if not first.evaluate.tasks:
        raise ConfigError("a sweep needs a task under evaluate.tasks: its law is about one of them")
    task = first.scaling_task
    inputs: dict[str, PlannedJob] = {}
    for name, (run, jobs) in sweep.items():
        names = [phase.name for phase in run.pretrain]
        wanted = {f"pretrain/{phase}" for phase in names}
        wanted |= {f"evaluate/{model}/{task}" for model in (*names[:-1], "base")}
        inputs |= {f"{name}/{job.name}": job for job in jobs if job.name in wanted}
    runs = [cfg.SweepRun(run=name, point=dict(point)) for name, point in points.items()]
    seed = seed_for(first.seed, "scaling")
    settings = _extend(cfg.ScalingJob, first.scaling, task=task, runs=runs, seed=seed)
    return PlannedJob("scaling", "scaling", settings.model_dump(mode="json"), inputs)


def plan_run(name: str, run: RunSettings) -> list[PlannedJob]:
    """All jobs of a run, inputs before users.

    Args:
        name: the run's name; only the report depends on it.
        run: validated settings.

    Raises:
        ConfigError: if files that it names are not there, cannot be read or do not fit.
    """
    try:
        return _plan_run(name, run)
    except OSError as error:
        raise ConfigError(
            f"{error.filename!r} cannot be read: {error.strerror}. Hint: see to its permissions (`ls -ld`)"
        ) from None


def _plan_run(name: str, run: RunSettings) -> list[PlannedJob]:
    jobs: dict[str, PlannedJob] = {}
    settings: Settings

    def add(job_name: str, settings: Settings, **inputs: PlannedJob | None) -> PlannedJob:
        given = {slot: job for slot, job in inputs.items() if job is not None}
        watch = getattr(settings, "watch", None)
        if watch is not None:
            given[WATCHED] = indexes[run.evaluate.tasks[watch.task].data]
        files = tuple(sources_of(settings, is_start="init" not in given))
        dumped = settings.model_dump(mode="json")
        job = PlannedJob(job_name.split("/")[0], job_name, dumped, given, files)
        known = jobs.setdefault(job_name, job)
        assert known == job, f"two jobs are called {job_name}"
        return known

    indexes: dict[str, PlannedJob] = {}
    # The training set last: it may have to be held against the others.
    for data in sorted(run.download, key=lambda data: data == "train"):
        source, is_train = run.download[data], data == "train"
        limits = {"min_side", "max_aspect_ratio", "max_megapixels"}  # the others are about training
        section = (
            run.index if is_train else cfg.IndexSettings(**run.index.model_dump(include=limits))
        )
        settings = _extend(cfg.IndexJob, section, tokenize=is_train)
        others = {f"not_in_{name}": indexes[name] for name in run.index.not_in if is_train}
        if isinstance(source, MixedSource):
            downloads = {
                f"download_{part}": add(f"download/{data}/{part}", cfg.DownloadJob(source=one))
                for part, one in source.sources.items()
            }
        else:
            downloads = {"download": add(f"download/{data}", cfg.DownloadJob(source=source))}
        indexes[data] = add(f"index/{data}", settings, **downloads, **others)
    index = indexes["train"]

    check_architecture(run)
    check_weights(run.model.pretrained, "model.pretrained")
    phases: list[PlannedJob] = []
    for phase in run.pretrain:
        check_references(phase, run.model, run.index)
        settings = _extend(
            cfg.ShardJob, run.shard, image_size=phase.image_size, oversize=_oversize(run, phase)
        )
        shard = add(f"shard/{phase.name}", settings, index=index)
        seed = seed_for(run.seed, "pretrain", phase.name)
        watch = run.watched(phase.watch)
        settings = _extend(cfg.PretrainJob, phase, model=run.model, seed=seed, watch=watch)
        init = phases[-1] if phases else None
        cached = _plan_references(run, add, phase, index)
        phases.append(
            add(f"pretrain/{phase.name}", settings, init=init, index=index, shard=shard, **cached)
        )
    base = phases[-1]

    models = {phase.name.split("/")[1]: {"model": phase} for phase in phases[:-1]}
    models |= {"base": {"model": base}, **_plan_moe(run, add, base, index=index, shard=shard)}
    for model_name, model in models.items():
        for task, measures in run.evaluate.tasks.items():
            settings = _extend(cfg.EvaluateJob, measures, task=task)
            add(f"evaluate/{model_name}/{task}", settings, **model, index=indexes[measures.data])
    if run.evaluate.evalset is not None:
        folder = run.evaluate.evalset.folder
        for each in chosen(local_path(folder), run.evaluate.evalset.tasks):
            settings = cfg.EvalsetJob(folder=folder, evalset=each.key)
            for model_name, model in models.items():
                add(f"evaluate/{model_name}/evalset/{each.key}", settings, **model)
    for task, measures in run.evaluate.tasks.items():
        if measures.probe or measures.knn:  # what random weights of this architecture already tell
            settings = cfg.EvaluateJob(
                data=measures.data,
                probe=measures.probe,
                knn=measures.knn,
                task=task,
                untrained=seed_for(run.seed, "untrained"),
            )
            add(f"evaluate/untrained/{task}", settings, model=base, index=indexes[measures.data])
    add("report", _extend(cfg.ReportJob, run.report, run=name, seed=run.seed), **jobs)
    return list(jobs.values())


def _plan_references(
    run: RunSettings, add: Callable[..., PlannedJob], phase: PhaseSettings, index: PlannedJob
) -> dict[str, PlannedJob]:
    """The jobs that embed the cached references of a phase, by the name of the input.

    They depend on the reference and the data, and on the phase only in what several crops are drawn with; so phases and
    runs share them. The reference has shards of its own size, which are those of the phase where size and `oversize`
    are equal.
    """
    jobs = {}
    for number, reference in enumerate(phase.references):
        if not reference.cached or not phase.compares_with_references:
            continue
        drawn = _extend(AugmentationSettings, phase) if reference.crops > 1 else None
        size, (smallest, _) = image_size_of(reference), (drawn or AugmentationSettings()).crop_scale
        room = run.shard.oversize or _room(smallest)
        name = f"{phase.name}.reference_{number}"  # a phase cannot be called so
        settings: Settings = _extend(cfg.ShardJob, run.shard, image_size=size, oversize=room)
        shard = add(f"shard/{name}", settings, index=index)
        settings = _extend(cfg.ReferenceJob, reference, image_size=size, augmentation=drawn)
        jobs[f"reference_{number}"] = add(f"embed/{name}", settings, index=index, shard=shard)
    return jobs


def _plan_moe(
    run: RunSettings, add: Callable[..., PlannedJob], base: PlannedJob, **data: PlannedJob
) -> dict[str, dict[str, PlannedJob]]:
    """The jobs that make experts of the base, a MoE of them, and what it is held against; what to evaluate, by name."""
    if run.moe is None:
        return {}
    assert run.finetune_router is not None
    experts = _plan_experts(run, add, base, **data)
    models = {f"expert_{k}": {"model": job} for k, job in enumerate(experts) if k}
    for name, baseline in run.baselines.items():
        models[name] = _plan_baseline(run, add, name, baseline, experts, **data)
    upcycled, moe = _plan_graft(run, add, "moe", run.moe, run.finetune_router, experts, {}, **data)
    return {**models, "upcycled": {"model": upcycled}, "moe": {"model": moe}}


def _plan_experts(
    run: RunSettings, add: Callable[..., PlannedJob], base: PlannedJob, **data: PlannedJob
) -> list[PlannedJob]:
    """The rounds; all experts, the base first."""
    assert run.moe is not None and run.finetune_expert is not None
    tune, seed = run.finetune_expert, seed_for(run.seed, "finetune_expert")
    watch = run.watched(tune.watch)
    experts, labels = [base], None
    for k in range(1, run.moe.num_experts):
        last = experts[-1]
        embed = add(f"embed/{k - 1}", run.embed, model=last, **data)
        numbers = run.cluster.of_round(k)
        clusters = _extend(
            cfg.ClusterJob, run.cluster, **numbers, seed=seed_for(run.seed, "cluster", k)
        )
        labels = add(f"cluster/{k}", clusters, embed=embed, previous=labels)
        settings = _extend(cfg.ExpertJob, tune, batches="homogeneous", seed=seed, watch=watch)
        init = last if tune.init == "previous" else base
        experts.append(add(f"finetune_expert/{k}", settings, init=init, labels=labels, **data))
    return experts


def _plan_graft(
    run: RunSettings,
    add: Callable[..., PlannedJob],
    name: str,
    moe: MoeSettings,
    router: RouterSettings,
    experts: list[PlannedJob],
    copies: dict[str, Any],
    /,
    **data: PlannedJob,
) -> tuple[PlannedJob, PlannedJob]:
    """A MoE as assembled, and after the training of its routers."""
    seed = seed_for(run.seed, "assemble")
    settings = _extend(cfg.AssembleJob, moe, seed=seed, **copies)
    samples = data if moe.router_init == "centroids" else {}
    assembled = add(f"assemble/{name}", settings, **_numbered("expert", experts), **samples)
    seed, watch = seed_for(run.seed, "finetune_router"), run.watched(router.watch)
    training = _extend(cfg.RouterJob, router, seed=seed, watch=watch)
    return assembled, add(f"finetune_router/{name}", training, init=assembled, **data)


def _plan_baseline(
    run: RunSettings,
    add: Callable[..., PlannedJob],
    name: str,
    about: BaselineSettings,
    experts: list[PlannedJob],
    **data: PlannedJob,
) -> dict[str, PlannedJob]:
    """The jobs that make one baseline; what to evaluate, by the name of the input."""
    tune, router, moe = run.finetune_expert, run.finetune_router, run.moe
    assert tune is not None and router is not None and moe is not None
    if about.kind == "ensemble":
        return _numbered("model", experts)
    if about.kind == "soup":
        return {"model": add(f"soup/{name}", cfg.SoupJob(), **_numbered("expert", experts))}
    where, base = f"baselines.{name}: ", experts[0]
    seen = about.samples_seen or _samples_after_base(run)
    optim = {"optim": about.optim.model_dump(mode="json")} if about.optim else {}
    if about.kind == "copies":
        rate = about.lr_experts or router.lr_experts or peak_lr(tune)
        train = "all" if router.train == "all" else "experts"
        more = {"samples_seen": seen, "train": train, "lr_experts": rate, **optim}
        router, copies = _with(router, where, more), {"copies": True, "noise": about.noise}
        return {"model": _plan_graft(run, add, name, moe, router, [base], copies, **data)[1]}
    if about.kind == "two_experts":
        seen -= router.samples_seen
        if seen <= 0:
            raise ConfigError(
                f"{where}samples_seen = {seen + router.samples_seen:,} leaves nothing for its expert: routers see "
                f"{router.samples_seen:,} of them (finetune_router.samples_seen). Hint: more, here or of "
                "finetune_expert.samples_seen"
            )
    blocks = {"image_layers": "all", "text_layers": "all"} if about.kind == "full" else {}
    settings = _extend(
        cfg.ExpertJob,
        _with(
            tune,
            where,
            {
                "samples_seen": seen,
                "stop_ratio": None,
                "batch_order": "shuffled",
                **optim,
                **blocks,
            },
        ),
        batches="ordinary",
        weights="all" if about.kind == "full" else "mlps",
        watch=run.watched(tune.watch),
        seed=seed_for(run.seed, "finetune_expert"),  # as of experts
    )
    tuned = add(f"finetune_expert/{name}", settings, init=base, **data)
    if about.kind != "two_experts":
        return {"model": tuned}
    two = _with(moe, where, {"num_experts": 2, "top_k": min(moe.top_k, 2)})
    return {"model": _plan_graft(run, add, name, two, router, [base, tuned], {}, **data)[1]}


def _samples_after_base(run: RunSettings) -> int:
    """What all experts and the routers see together."""
    assert run.finetune_expert is not None and run.finetune_router is not None and run.moe
    experts = (run.moe.num_experts - 1) * run.finetune_expert.samples_seen
    return experts + run.finetune_router.samples_seen


def _numbered(slot: str, jobs: list[PlannedJob]) -> dict[str, PlannedJob]:
    return {f"{slot}_{k}": job for k, job in enumerate(jobs)}


def _with(section: S, where: str, changes: dict[str, Any]) -> S:
    """A section with changes, checked as if they had been written."""
    return validate(type(section), section.model_dump(mode="json") | changes, where)


def _oversize(run: RunSettings, phase: PhaseSettings) -> float:
    """As given, or so that the smallest crop of those that read the shards of a phase is as large as training wants."""
    users: list[TrainSettings | None] = [phase]
    if run.moe is not None and phase is run.pretrain[-1]:
        users += [run.finetune_expert, run.finetune_router]
    smallest = min(user.crop_scale[0] for user in users if user is not None)
    return run.shard.oversize or _room(smallest)


def _room(smallest: float) -> float:
    """Oversize of the stored image with which a crop that keeps this share of the area is not enlarged."""
    return float(round(smallest**-0.5, 2))


def _extend(job: type[S], section: Settings, /, **more: Any) -> S:
    """The settings of a job: those fields of its section that it has, and what it takes from elsewhere."""
    fields = {key: value for key, value in section if key in job.model_fields}
    return job(**{**fields, **more})
