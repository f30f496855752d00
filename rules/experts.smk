# Experts: round k embeds with expert k-1, clusters, and fine-tunes the MLPs of the base on homogeneous batches.
# References that pretraining reads the embeddings of (`cached: true`) are embedded here, too.
#
# REQUIRED INPUTS: results/{index,shard,pretrain}/{version}/; of references none but data
# OUTPUTS: results/{embed,cluster,finetune_expert}/{version}/


rule embed:
    """Embed the training set with one expert, or with a reference."""
    input:
        unpack(manifests("embed")),
        embed_parts,
    output:
        "results/embed/{version}/manifest.json",
    log:
        "logs/embed/{version}.log",
    benchmark:
        "logs/embed/{version}.tsv"
    threads: wish("embed", "threads")
    resources:
        gpu=slurm("embed", "gpu"),
        nodes=wish("embed", "nodes"),
        tasks=wish("embed", "nodes"),
        tasks_per_gpu=0,
        gpus_per_node=slurm("embed", "per_node"),
        gres=slurm("embed", "gres"),
        gpu_model=slurm("embed", "model"),
        mpi="",
        slurm_extra=slurm("embed", "words"),
        job=name("embed"),
        mem_mb=wish("embed", "mem_mb"),
        runtime=wish("embed", "runtime"),
    params:
        settings=settings("embed"),
        sources=sources("embed"),
        code=CODE["embed"],
        inputs=arguments("embed"),
        batch_size=batch_size("embed"),
        part="",
    message:
        "{resources.job}"
    shell:
        "{LAUNCH} --gpu {resources.gpu} --gpus-per-node {resources.gpus_per_node} --nodes {resources.nodes} "
        "--threads {threads} --batch-size {params.batch_size} {params.part} -- "
        "{SCRIPTS}/embed.py --name {resources.job} --settings {params.settings:q} "
        "{params.inputs} --out results/embed/{wildcards.version} --threads {threads} --log {log}"


use rule embed as embed_part with:
    input:
        unpack(manifests("embed")),
    output:
        temp(touch("results/embed/{version}/.part-{k}-of-{num}")),
    log:
        "logs/embed/{version}-{k}-of-{num}.log",
    benchmark:
        "logs/embed/{version}-{k}-of-{num}.tsv"
    params:
        settings=settings("embed"),
        sources=sources("embed"),
        code=CODE["embed"],
        inputs=arguments("embed"),
        batch_size=0,
        part=lambda wildcards: f"--part {wildcards.k}-of-{wildcards.num}",
    message:
        "{resources.job} part {wildcards.k} of {wildcards.num}"


rule cluster:
    """Cluster images and texts, and accumulate pseudo labels over the rounds."""
    input:
        unpack(manifests("cluster")),
    output:
        "results/cluster/{version}/manifest.json",
    log:
        "logs/cluster/{version}.log",
    benchmark:
        "logs/cluster/{version}.tsv"
    threads: wish("cluster", "threads")
    resources:
        job=name("cluster"),
        mem_mb=wish("cluster", "mem_mb"),
        runtime=wish("cluster", "runtime"),
    params:
        settings=settings("cluster"),
        code=CODE["cluster"],
        inputs=arguments("cluster"),
    message:
        "{resources.job}"
    shell:
        "{PYTHON} {SCRIPTS}/cluster.py --name {resources.job} --settings {params.settings:q} "
        "{params.inputs} --out results/cluster/{wildcards.version} --threads {threads} --log {log}"


rule finetune_expert:
    """Fine-tune the MLPs on batches of one pseudo label; baselines on ordinary batches."""
    input:
        unpack(manifests("finetune_expert")),
        unpack(watched("finetune_expert")),
    output:
        "results/finetune_expert/{version}/manifest.json",
    log:
        "logs/finetune_expert/{version}.log",
    benchmark:
        "logs/finetune_expert/{version}.tsv"
    threads: wish("finetune_expert", "threads")
    resources:
        gpu=slurm("finetune_expert", "gpu"),
        nodes=wish("finetune_expert", "nodes"),
        tasks=wish("finetune_expert", "nodes"),
        tasks_per_gpu=0,
        gpus_per_node=slurm("finetune_expert", "per_node"),
        gres=slurm("finetune_expert", "gres"),
        gpu_model=slurm("finetune_expert", "model"),
        mpi="",
        slurm_extra=slurm("finetune_expert", "words"),
        job=name("finetune_expert"),
        mem_mb=wish("finetune_expert", "mem_mb"),
        runtime=wish("finetune_expert", "runtime"),
    params:
        settings=settings("finetune_expert"),
        code=CODE["finetune_expert"],
        inputs=arguments("finetune_expert"),
        watch=watch("finetune_expert"),
        batch_size=batch_size("finetune_expert"),
    message:
        "{resources.job}"
    shell:
        "{LAUNCH} --gpu {resources.gpu} --gpus-per-node {resources.gpus_per_node} --nodes {resources.nodes} "
        "--threads {threads} --batch-size {params.batch_size} -- "
        "{SCRIPTS}/finetune_expert.py --name {resources.job} --settings {params.settings:q} "
        "{params.inputs} {params.watch} --out results/finetune_expert/{wildcards.version} --threads {threads} --log {log}"
