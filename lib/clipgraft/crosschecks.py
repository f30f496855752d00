"""What sections of a run's settings must agree on, found before anything runs.

Each check is of one thing that two sections say, and is worded as the user wrote it: the keys of both, what they are,
and a value that would do.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, get_args

from clipgraft.evaluation_settings import RobustnessSettings
from clipgraft.loss_settings import changed
from clipgraft.misfits import (
    position_kind,
    position_misfit,
    start_misfit,
    stretch_misfit,
    tower_misfit,
    vocabulary_misfit,
)
from clipgraft.model_settings import is_file_name
from clipgraft.reductions import num_kept
from clipgraft.sources import Attribute, MixedSource, ShapesSource, TarSource
from clipgraft.spelling import hint

if TYPE_CHECKING:
    from clipgraft.run_settings import RunSettings
    from clipgraft.settings import IndexSettings


def check(run: RunSettings) -> None:
    """Hold the sections of a run against each other.

    Raises:
        ValueError: names the first keys that do not fit, and a value that would.
    """
    _data(run)
    for stage, wish in run.resources.items():
        wish.check(stage)
    _sections(run)
    _names(run)
    _tasks(run)
    _scaling(run)
    _vocabulary(run)
    _crops(run)
    if run.model.config is not None:  # of named architectures, planning knows
        check_model(run, run.model.config)
    _starts(run)
    _rounds(run)
    _batches(run)
    _source_weights(run)
    _watches(run)
    _parallel(run)


def unequal_steps(run: RunSettings) -> str:
    """What is to be said of baselines that see as many samples in another number of steps; empty if none does."""
    expert, router = run.finetune_expert, run.finetune_router
    if run.moe is None or expert is None or router is None:
        return ""
    names = [
        f"baselines.{name}"
        for name, about in run.baselines.items()
        if about.kind in ("mlp", "full", "copies") and about.samples_seen is None
    ]
    if not names or expert.batch_size == router.batch_size:
        return ""
    return (
        f"finetune_expert.batch_size = {expert.batch_size}, finetune_router.batch_size = {router.batch_size}: "
        f"{', '.join(names)} with as many samples as experts and routers in another number of steps. "
        "Hint: one batch_size for both"
    )


def _data(run: RunSettings) -> None:
    if "train" not in run.download:
        raise ValueError(
            f"download has no `train` (it has {', '.join(run.download)}). Hint: name the training set `train`"
        )
    for name in run.index.not_in:
        if name not in run.download or name == "train":
            others = [other for other in run.download if other != "train"]
            raise ValueError(
                f"index.not_in: {name!r} is no evaluation set under download{hint(name, others)}"
            )
    for name, task in run.evaluate.tasks.items():
        if task.data not in run.download:
            raise ValueError(
                f"evaluate.tasks.{name}.data = {task.data!r} is not under download "
                f"({', '.join(run.download)}){hint(task.data, run.download)}"
            )


def _sections(run: RunSettings) -> None:
    for name in ("finetune_expert", "finetune_router"):
        if run.moe and name not in run.tuned:
            raise ValueError(
                f"missing key `{name}`. Hint: with `moe: null` the run stops at the base"
            )


def _names(run: RunSettings) -> None:
    """Phases, baselines and the models of every run are evaluated side by side, by name."""
    phases = [phase.name for phase in run.pretrain]
    if len(set(phases)) < len(phases):
        raise ValueError(f"pretrain: phase names must differ, got {phases}")
    experts = [f"expert_{k}" for k in range(run.moe.num_experts if run.moe else 0)]
    names = ["base", "untrained", *experts, "upcycled", "moe", *phases[:-1], *run.baselines]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"{', '.join(twice)}: a phase or baseline has the name of another model")
    for name in (*phases, *run.baselines):
        if name.startswith("expert_"):
            where = "pretrain" if name in phases else "baselines"
            raise ValueError(
                f"{where}: {name!r}: the names of experts begin with `expert_`. Hint: another name"
            )


def _tasks(run: RunSettings) -> None:
    if "evalset" in run.evaluate.tasks:
        raise ValueError(
            "evaluate.tasks.evalset: the results of evaluate.evalset have this name. Hint: another name"
        )
    for name, task in run.evaluate.tasks.items():
        source = run.download[task.data]
        for key, label in task.labels_of:
            if isinstance(source, ShapesSource) and label not in get_args(Attribute):
                raise ValueError(
                    f"evaluate.tasks.{name}.{key}: label {label!r} is none of shapes"
                    f"{hint(label, get_args(Attribute))}"
                )
        for measure in task.zero_shot:
            where = f"evaluate.tasks.{name}.zero_shot: label {measure.label!r}"
            if isinstance(source, ShapesSource) and measure.label not in get_args(Attribute):
                raise ValueError(
                    f"{where} is none of shapes{hint(measure.label, get_args(Attribute))}"
                )
            if isinstance(source, TarSource) and measure.label == "class" and not source.classes:
                raise ValueError(
                    f"{where} needs names. Hint: download.{task.data}.classes: a file with one per line"
                )
            if not measure.templates and measure.label not in get_args(Attribute):
                raise ValueError(
                    f"{where} has no templates, and only those of the built-in data set are known. "
                    "Hint: templates: ['a photo of a {c}']"
                )
            for template in measure.templates:
                if "{c}" not in template:
                    raise ValueError(f"{where}: template {template!r} has no {{c}}")
        if task.robustness is not None:
            _robustness(run, f"evaluate.tasks.{name}.robustness", task.robustness)


def _robustness(run: RunSettings, where: str, robustness: RobustnessSettings) -> None:
    length = run.pretrain[-1].text_length
    if max(robustness.text, default=0) >= length:
        raise ValueError(
            f"{where}.text = {robustness.text}: texts of the base have {length} tokens "
            f"(pretrain.{run.pretrain[-1].name}.text_length). Hint: fewer"
        )


def _scaling(run: RunSettings) -> None:
    if not run.evaluate.tasks:
        return
    tasks, name, label = run.evaluate.tasks, run.scaling.task, run.scaling.label
    if name is not None and name not in tasks:
        raise ValueError(f"scaling.task = {name!r} is no task of evaluate.tasks{hint(name, tasks)}")
    labels = [measure.label for measure in tasks[run.scaling_task].zero_shot]
    if label is not None and label not in labels:
        raise ValueError(
            f"scaling.label = {label!r} is no zero_shot label of evaluate.tasks.{run.scaling_task}"
            f"{hint(label, labels)}"
        )


def check_model(run: RunSettings, config: Mapping[str, Any]) -> None:
    """Hold the sections against the architecture.

    Args:
        run: settings.
        config: of the model, in open_clip's form.
    Raises:
        ValueError: names the section, what it wants and what there is.
    """
    vocabulary = run.index.vocabulary
    misfit = tower_misfit(config) or vocabulary_misfit(config["text_cfg"], vocabulary)
    if misfit:
        where = f"model.name = {run.model.name}" if run.model.name else "model.config"
        raise ValueError(f"{where}: {misfit}")
    pretrained = run.model.pretrained
    if pretrained and not is_file_name(pretrained) and (misfit := pieces_misfit(run.index)):
        raise ValueError(f"model.pretrained = {pretrained!r}: {misfit}")
    _patches(run, config["vision_cfg"].get("patch_size", 16))  # as open_clip
    _positions(run, config["vision_cfg"].get("pos_embed_type") == "sin_cos_2d")
    _layers(run, config)


def pieces_misfit(index: IndexSettings) -> str:
    """Why a public model that reads WordPiece cannot read that of an index; empty if it can."""
    if index.vocabulary != "wordpiece" or index.wordpiece is not None:
        return ""
    return (
        "it reads BERT's own pieces, and index.wordpiece = null makes others from your captions. "
        "Hint: index: {wordpiece: vocab.txt}, that of bert-base-uncased"
    )


def _layers(run: RunSettings, config: Mapping[str, Any]) -> None:
    """The blocks that experts are trained and grafted in."""
    if run.moe is None or run.finetune_expert is None:
        return
    for tower, key in (("vision", "image_layers"), ("text", "text_layers")):
        depth = (config.get(f"{tower}_cfg") or {}).get("layers")
        for section in ("moe", "finetune_expert"):
            layers = getattr(getattr(run, section), key)
            if layers != "all" and isinstance(depth, int) and max(layers, default=0) >= depth:
                raise ValueError(
                    f"{section}.{key} = {layers}: the {tower} tower has {depth} layers. "
                    f"Hint: 0 to {depth - 1}, or all"
                )
        _grafted(run, key, depth)
    _compiled(run, config)


def _compiled(run: RunSettings, config: Mapping[str, Any]) -> None:
    """Blocks with experts are not compiled, and copies and two_experts are trained as the routers are."""
    assert run.moe is not None
    for tower, layers in (("vision", run.moe.image_layers), ("text", run.moe.text_layers)):
        depth = (config.get(f"{tower}_cfg") or {}).get("layers", 12)  # as open_clip
        if layers != "all" and len(set(layers)) < depth:
            return
    if run.finetune_router and run.finetune_router.compile:
        raise ValueError(
            "finetune_router.compile = true has no effect: every block has experts (moe.image_layers, "
            "moe.text_layers). Hint: compile: false"
        )


def _grafted(run: RunSettings, key: str, depth: object) -> None:
    """Blocks that no expert has trained would hold copies, for good if routers alone are trained."""
    assert run.moe is not None and run.finetune_expert is not None
    if run.finetune_router and run.finetune_router.train != "routers":
        return
    tower, grafted = key.removesuffix("_layers"), getattr(run.moe, key)
    is_locked = tower in run.finetune_expert.lock
    trained = [] if is_locked else getattr(run.finetune_expert, key)
    if isinstance(depth, int) and grafted == "all":
        grafted = list(range(depth))
    if trained == "all" or (grafted != "all" and set(grafted) <= set(trained)):
        return
    where = f"lock = [{tower}]" if is_locked else f"{key} = {trained}"
    raise ValueError(
        f"moe.{key} = {getattr(run.moe, key)}, but finetune_expert.{where}: in other blocks the experts would be "
        f"copies of one MLP. Hint: moe: {{{key}: {trained}}}"
    )


def _rounds(run: RunSettings) -> None:
    if run.moe is None:
        return
    num_rounds = run.moe.num_experts - 1
    for side, given in run.cluster.given.items():
        if isinstance(given, list) and len(given) != num_rounds:
            raise ValueError(
                f"cluster.{side}_clusters = {given} is for {len(given)} rounds, but moe.num_experts = "
                f"{run.moe.num_experts} makes {num_rounds}. Hint: one number for each round, or one for all"
            )


def _patches(run: RunSettings, patch: int) -> None:
    for phase in run.pretrain:
        if phase.image_size % patch:
            lower = max(patch, phase.image_size // patch * patch)
            of = run.model.name or "model.config.vision_cfg"
            raise ValueError(
                f"pretrain.{phase.name}.image_size = {phase.image_size} is not divisible by the patch size "
                f"{patch} of {of}. Hint: {lower} or {lower + patch}"
            )
        side = phase.image_size // patch
        try:
            num_kept(phase.image_reduction, side, side)
        except ValueError as error:
            raise ValueError(f"pretrain.{phase.name}.{error}") from None
        for name, task in run.evaluate.tasks.items():
            for reduction in task.robustness.image if task.robustness else ():
                try:
                    num_kept(reduction, side, side)
                except ValueError as error:
                    where = f"evaluate.tasks.{name}.robustness, of pretrain.{phase.name}"
                    raise ValueError(f"{where}: {error}") from None


def _vocabulary(run: RunSettings) -> None:
    pretrained = run.model.pretrained
    if pretrained and not is_file_name(pretrained) and run.index.vocabulary == "corpus":
        raise ValueError(
            f"model.pretrained = {pretrained!r} reads CLIP's whole vocabulary, index.vocabulary = corpus keeps the words of "
            "your captions alone. Hint: index: {vocabulary: full}"
        )


def _crops(run: RunSettings) -> None:
    for phase in run.pretrain:
        several = [each.crops for each in phase.references if each.crops > 1]
        if len(set(several)) > 1:
            raise ValueError(
                f"pretrain.{phase.name}.references: crops = {' and '.join(map(str, several))}, but a visit shows "
                "one crop to all of them. Hint: the same number, or 1 for the picture as in evaluation"
            )


def _positions(run: RunSettings, was_frozen: bool) -> None:
    for number, phase in enumerate(run.pretrain):
        misfit = position_misfit(phase, was_frozen, is_carried=number > 0)
        if misfit:
            raise ValueError(misfit)
        was_frozen = position_kind(phase, was_frozen) == "sincos_frozen"


def _starts(run: RunSettings) -> None:
    for number, phase in enumerate(run.pretrain):
        is_carried, has_pretrained = number > 0, run.model.pretrained is not None
        misfit = start_misfit(phase, is_carried, has_pretrained)
        if misfit:
            raise ValueError(misfit)
        has_weights = is_carried or has_pretrained or phase.init_from is not None
        if has_weights and phase.loss.tau == "learned" and "temperature" in changed(phase):
            raise ValueError(
                f"pretrain.{phase.name}.temperature = {phase.temperature} has no effect: a learned temperature comes "
                "with the weights. Hint: remove it, or loss: {temperature: constant}"
            )
        if is_carried and phase.text_pos_resize == "stretch":
            before = run.pretrain[number - 1].text_length
            misfit = stretch_misfit(phase.text_pos_keep, before)
            if misfit:
                raise ValueError(f"pretrain.{phase.name}.{misfit}")


def _batches(run: RunSettings) -> None:
    train = run.download["train"]
    if not isinstance(train, ShapesSource):
        return  # the number of samples is known after `index`; training checks it there
    for where, section in run.trainings.items():
        if section.batch_size > train.num_samples:
            raise ValueError(
                f"{where}.batch_size = {section.batch_size} is larger than the data: download.train.num_samples "
                f"= {train.num_samples}. Hint: a smaller batch, or more samples"
            )


def _source_weights(run: RunSettings) -> None:
    train = run.download["train"]
    names = list(train.sources) if isinstance(train, MixedSource) else []
    for where, section in run.trainings.items():
        for name in section.source_weights:
            if name not in names:
                raise ValueError(
                    f"{where}.source_weights: {name!r} is no source of download.train"
                    + (hint(name, names) if names else ", which is not of the kind `mixed`")
                )


def _watches(run: RunSettings) -> None:
    for where, section in run.trainings.items():
        watch = section.watch
        if watch is None:
            continue
        task = run.evaluate.tasks.get(watch.task)
        if task is None:
            raise ValueError(
                f"{where}.watch.task = {watch.task!r} is no task of evaluate.tasks"
                f"{hint(watch.task, run.evaluate.tasks)}"
            )
        if not task.retrieval and not task.zero_shot:
            raise ValueError(
                f"{where}.watch.task = {watch.task!r} has neither retrieval nor zero_shot, the quick measures. "
                f"Hint: evaluate.tasks.{watch.task}.retrieval: true, or another task"
            )


def _parallel(run: RunSettings) -> None:
    for where, section in run.trainings.items():
        stage = where.split(".")[0]
        wish = run.resources_of(stage)
        at_a_time = section.batch_size // section.accumulate
        if at_a_time % wish.nodes:
            parts = f" / accumulate = {section.accumulate}" if section.accumulate > 1 else ""
            raise ValueError(
                f"{where}.batch_size = {section.batch_size}{parts} does not divide by resources.{stage}.nodes = "
                f"{wish.nodes}. Hint: another number of nodes"
            )
        if section.parallel == "fsdp" and wish.gpu < 2 and wish.nodes < 2:
            raise ValueError(
                f"{where}.parallel = fsdp has no effect on one device: resources.{stage} wishes for gpu: {wish.gpu}, "
                f"nodes: {wish.nodes}. Hint: more devices, or parallel: ddp"
            )
