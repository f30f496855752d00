# MoE: graft the experts into one model, then train its routers; or average them.
#
# REQUIRED INPUTS: results/{pretrain,finetune_expert,index,shard}/{version}/; `assemble` reads samples for centroids only
# OUTPUTS: results/{assemble,finetune_router,soup}/{version}/


rule assemble:
    """Put the MLPs of all experts side by side, behind fresh routers (a device helps with `router_init: centroids`)."""
    input:
        unpack(manifests("assemble")),
    output:
        "results/assemble/{version}/manifest.json",
    log:
        "logs/assemble/{version}.log",
    benchmark:
        "logs/assemble/{version}.tsv"
    threads: wish("assemble", "threads")
    resources:
        gpu=slurm("assemble", "gpu"),
        gpus_per_node=slurm("assemble", "per_node"),
        gres=slurm("assemble", "gres"),
        gpu_model=slurm("assemble", "model"),
        job=name("assemble"),
        mem_mb=wish("assemble", "mem_mb"),
        runtime=wish("assemble", "runtime"),
    params:
        settings=settings("assemble"),
        code=CODE["assemble"],
        inputs=arguments("assemble"),
    message:
        "{resources.job}"
    shell:
        "{LAUNCH} --gpu {resources.gpu} --gpus-per-node {resources.gpus_per_node} --threads {threads} -- "
        "{SCRIPTS}/assemble.py --name {resources.job} --settings {params.settings:q} "
        "{params.inputs} --out results/assemble/{wildcards.version} --threads {threads} --log {log}"


rule finetune_router:
    """Train the routers, or more: contrastive plus balance loss."""
    input:
        unpack(manifests("finetune_router")),
        unpack(watched("finetune_router")),
    output:
        "results/finetune_router/{version}/manifest.json",
    log:
        "logs/finetune_router/{version}.log",
    benchmark:
        "logs/finetune_router/{version}.tsv"
    threads: wish("finetune_router", "threads")
    resources:
        gpu=slurm("finetune_router", "gpu"),
        nodes=wish("finetune_router", "nodes"),
        tasks=wish("finetune_router", "nodes"),
        tasks_per_gpu=0,
        gpus_per_node=slurm("finetune_router", "per_node"),
        gres=slurm("finetune_router", "gres"),
        gpu_model=slurm("finetune_router", "model"),
        mpi="",
        slurm_extra=slurm("finetune_router", "words"),
        job=name("finetune_router"),
        mem_mb=wish("finetune_router", "mem_mb"),
        runtime=wish("finetune_router", "runtime"),
    params:
        settings=settings("finetune_router"),
        code=CODE["finetune_router"],
        inputs=arguments("finetune_router"),
        watch=watch("finetune_router"),
        batch_size=batch_size("finetune_router"),
    message:
        "{resources.job}"
    shell:
        "{LAUNCH} --gpu {resources.gpu} --gpus-per-node {resources.gpus_per_node} --nodes {resources.nodes} "
        "--threads {threads} --batch-size {params.batch_size} -- "
        "{SCRIPTS}/finetune_router.py --name {resources.job} --settings {params.settings:q} "
        "{params.inputs} {params.watch} --out results/finetune_router/{wildcards.version} --threads {threads} --log {log}"


rule soup:
    """Average the weights of all experts."""
    input:
        unpack(manifests("soup")),
    output:
        "results/soup/{version}/manifest.json",
    log:
        "logs/soup/{version}.log",
    benchmark:
        "logs/soup/{version}.tsv"
    threads: wish("soup", "threads")
    resources:
        job=name("soup"),
        mem_mb=wish("soup", "mem_mb"),
        runtime=wish("soup", "runtime"),
    params:
        settings=settings("soup"),
        code=CODE["soup"],
        inputs=arguments("soup"),
    message:
        "{resources.job}"
    shell:
        "{PYTHON} {SCRIPTS}/soup.py --name {resources.job} --settings {params.settings:q} "
        "{params.inputs} --out results/soup/{wildcards.version} --threads {threads} --log {log}"
