# Pretraining: a chain of phases, short sequences first; the last phase is expert 0, the base.
#
# REQUIRED INPUTS: results/{index,shard}/{version}/
# OUTPUTS: results/pretrain/{version}/model.safetensors, model.json, metrics.jsonl


rule pretrain:
    """Train one phase; position tables are interpolated from the phase before."""
    input:
        unpack(manifests("pretrain")),
        unpack(watched("pretrain")),
    output:
        "results/pretrain/{version}/manifest.json",
    log:
        "logs/pretrain/{version}.log",
    benchmark:
        "logs/pretrain/{version}.tsv"
    threads: wish("pretrain", "threads")
    resources:
        gpu=slurm("pretrain", "gpu"),
        nodes=wish("pretrain", "nodes"),
        tasks=wish("pretrain", "nodes"),
        tasks_per_gpu=0,
        gpus_per_node=slurm("pretrain", "per_node"),
        gres=slurm("pretrain", "gres"),
        gpu_model=slurm("pretrain", "model"),
        mpi="",
        slurm_extra=slurm("pretrain", "words"),
        job=name("pretrain"),
        mem_mb=wish("pretrain", "mem_mb"),
        runtime=wish("pretrain", "runtime"),
    params:
        settings=settings("pretrain"),
        sources=sources("pretrain"),
        code=CODE["pretrain"],
        inputs=arguments("pretrain"),
        watch=watch("pretrain"),
        batch_size=batch_size("pretrain"),
    message:
        "{resources.job}"
    shell:
        "{LAUNCH} --gpu {resources.gpu} --gpus-per-node {resources.gpus_per_node} --nodes {resources.nodes} "
        "--threads {threads} --batch-size {params.batch_size} -- "
        "{SCRIPTS}/pretrain.py --name {resources.job} --settings {params.settings:q} "
        "{params.inputs} {params.watch} --out results/pretrain/{wildcards.version} --threads {threads} --log {log}"
