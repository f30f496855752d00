# Report: one page per run, one per sweep, and links for people.
#
# REQUIRED INPUTS: all manifests of a run; phases and their results of all runs of a sweep
# OUTPUTS: results/report/{version}/report.html, results/scaling/{version}/scaling.html, results/runs/{run}/
# `RUN=demo snakemake --cores 1 explore` opens a page to try the models of a finished run


rule report:
    """Draw the report of a run."""
    input:
        manifest_list("report"),
    output:
        "results/report/{version}/manifest.json",
        page=report(
            "results/report/{version}/report.html",
            caption="../workflow/report/page.rst",
            category="Pages",
            labels=lambda wildcards: {"run": run_of("report", wildcards)},
        ),
        table=report(
            "results/report/{version}/results.csv",
            caption="../workflow/report/results.rst",
            category="Tables",
            labels=lambda wildcards: {"run": run_of("report", wildcards)},
        ),
        figures=report(
            directory("results/report/{version}/figures"),
            patterns=["{section,[a-z]+}_{figure}.svg"],
            caption="../workflow/report/figures.rst",
            category="{section}",
            labels=lambda wildcards: {
                "run": run_of("report", wildcards),
                "figure": wildcards.figure.replace("_", " "),
            },
        ),
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
        run=lambda wildcards: run_of("report", wildcards),
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
        page=report(
            "results/scaling/{version}/scaling.html",
            caption="../workflow/report/scaling.rst",
            category="Pages",
            labels={"run": "sweep"},
        ),
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
    explore,


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


rule explore:
    """Try the models of a finished run in the browser: `RUN=demo snakemake explore`; trains nothing, Ctrl-C ends it."""
    message:
        "explore"
    shell:
        "exec {PYTHON} -m clipgraft.explore ${{RUN:-}}"
