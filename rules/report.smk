# Report: one page per run, one per sweep, and links for people.
#
# REQUIRED INPUTS: all manifests of a run; phases and their results of all runs of a sweep
# OUTPUTS: results/report/{version}/report.html, results/scaling/{version}/scaling.html, results/runs/{run}/


rule report:
    """Draw the report of a run."""
    input:
        manifest_list("report"),
    output:
        "results/report/{version}/manifest.json",
    log:
        "logs/report/{version}.log",
    benchmark:
        "logs/report/{version}.tsv"
    threads: wish("report", "threads")
    resources:
        job=name("report"),
        mem_mb=wish("report", "mem_mb"),
        runtime=wish("report", "runtime"),
    params:
        settings=settings("report"),
        code=CODE["report"],
        inputs=arguments("report"),
    message:
        "{resources.job}"
    shell:
        "{PYTHON} {SCRIPTS}/report.py --name {resources.job} --settings {params.settings:q} "
        "{params.inputs} --out results/report/{wildcards.version} --threads {threads} --log {log}"


rule scaling:
    """Draw the inverse scaling law of a sweep."""
    input:
        manifest_list("scaling"),
    output:
        "results/scaling/{version}/manifest.json",
    log:
        "logs/scaling/{version}.log",
    benchmark:
        "logs/scaling/{version}.tsv"
    threads: wish("scaling", "threads")
    resources:
        job=name("scaling"),
        mem_mb=wish("scaling", "mem_mb"),
        runtime=wish("scaling", "runtime"),
    params:
        settings=settings("scaling"),
        code=CODE["scaling"],
        inputs=arguments("scaling"),
    message:
        "{resources.job}"
    shell:
        "{PYTHON} {SCRIPTS}/scaling.py --name {resources.job} --settings {params.settings:q} "
        "{params.inputs} --out results/scaling/{wildcards.version} --threads {threads} --log {log}"


localrules:
    link,


rule link:
    """Link a run's versions under results/runs/, and write its lock."""
    input:
        run_page,
    output:
        "results/runs/{run}/versions.json",
    params:
        versions=run_versions,
    message:
        "link results/runs/{wildcards.run}"
    shell:
        "{PYTHON} -m clipgraft.runs link {wildcards.run} {params.versions:q}"
