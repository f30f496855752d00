# Evaluation: every model on the way, on every task.
#
# REQUIRED INPUTS: a model folder, results/index/{version}/ of the task's data, or an evaluation folder
# OUTPUTS: results/evaluate/{version}/result.json; of a task that failed it says why, and the next call tries again


rule evaluate:
    """Measure one model on one task."""
    input:
        unpack(manifests("evaluate")),
    output:
        "results/evaluate/{version}/manifest.json",
    log:
        "logs/evaluate/{version}.log",
    benchmark:
        "logs/evaluate/{version}.tsv"
    threads: wish("evaluate", "threads")
    resources:
        gpu=slurm("evaluate", "gpu"),
        gpus_per_node=slurm("evaluate", "per_node"),
        gres=slurm("evaluate", "gres"),
        gpu_model=slurm("evaluate", "model"),
        job=name("evaluate"),
        mem_mb=wish("evaluate", "mem_mb"),
        runtime=wish("evaluate", "runtime"),
    params:
        settings=settings("evaluate"),
        code=CODE["evaluate"],
        inputs=arguments("evaluate"),
        failures=failures("evaluate"),
        sources=sources("evaluate"),
    message:
        "{resources.job}"
    shell:
        "{LAUNCH} --gpu {resources.gpu} --gpus-per-node {resources.gpus_per_node} --threads {threads} -- "
        "{SCRIPTS}/evaluate.py --name {resources.job} --settings {params.settings:q} "
        "{params.inputs} --out results/evaluate/{wildcards.version} --threads {threads} --log {log}"
