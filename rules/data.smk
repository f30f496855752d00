# Data: from a source to images and tokens that training reads.
#
# REQUIRED INPUTS: what `download:` in config.yaml names (nothing for the built-in data set)
# OUTPUTS: results/{download,index,shard}/{version}/
# `snakemake retry` fetches again what failed


rule download:
    """Generate or download images and captions, or check the tars that are there."""
    output:
        "results/download/{version}/manifest.json",
    log:
        "logs/download/{version}.log",
    benchmark:
        "logs/download/{version}.tsv"
    threads: wish("download", "threads")
    resources:
        job=name("download"),
        mem_mb=wish("download", "mem_mb"),
        runtime=wish("download", "runtime"),
    params:
        settings=settings("download"),
        code=CODE["download"],
        sources=sources("download"),
        min_success=min_success,
    message:
        "{resources.job}"
    shell:
        "{PYTHON} {SCRIPTS}/download.py --name {resources.job} --settings {params.settings:q} "
        "{params.min_success} --out results/download/{wildcards.version} --threads {threads} --log {log}"


rule retry:
    """Fetch again what failed in the downloads by URL, and only that; what stands on them is then out of date."""
    input:
        url_downloads,
    log:
        "logs/retry.log",
    benchmark:
        "logs/retry.tsv"
    threads: 8
    shell:
        "for manifest in {input:q}; do out=$(dirname $manifest); {PYTHON} -m clipgraft.data.retry $out && "
        "{PYTHON} {SCRIPTS}/download.py $manifest --out $out --threads {threads} --log {log} || exit 1; done"


rule index:
    """Decode every image once, accept or reject it, tokenize captions: row i is sample i."""
    input:
        unpack(manifests("index")),
    output:
        "results/index/{version}/manifest.json",
    log:
        "logs/index/{version}.log",
    benchmark:
        "logs/index/{version}.tsv"
    threads: wish("index", "threads")
    resources:
        job=name("index"),
        mem_mb=wish("index", "mem_mb"),
        runtime=wish("index", "runtime"),
    params:
        settings=settings("index"),
        code=CODE["index"],
        inputs=arguments("index"),
        sources=sources("index"),
    message:
        "{resources.job}"
    shell:
        "{PYTHON} {SCRIPTS}/index.py --name {resources.job} --settings {params.settings:q} "
        "{params.inputs} --out results/index/{wildcards.version} --threads {threads} --log {log}"


rule shard:
    """Store images at the size that a training phase needs, in row order."""
    input:
        unpack(manifests("shard")),
    output:
        "results/shard/{version}/manifest.json",
    log:
        "logs/shard/{version}.log",
    benchmark:
        "logs/shard/{version}.tsv"
    threads: wish("shard", "threads")
    resources:
        job=name("shard"),
        mem_mb=wish("shard", "mem_mb"),
        runtime=wish("shard", "runtime"),
    params:
        settings=settings("shard"),
        code=CODE["shard"],
        inputs=arguments("shard"),
    message:
        "{resources.job}"
    shell:
        "{PYTHON} {SCRIPTS}/shard.py --name {resources.job} --settings {params.settings:q} "
        "{params.inputs} --out results/shard/{wildcards.version} --threads {threads} --log {log}"
