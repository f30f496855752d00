"""Laws of the command: mistakes are said before anything heavy is imported, in one line."""

import os
import subprocess
import sys

import pytest


def explore(*words, cwd):
    command = [sys.executable, "-m", "clipgraft.explore", *words]
    return subprocess.run(command, cwd=cwd, env=os.environ, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "has no finished run. Hint: make demo"),
        (["demo"], "run 'demo' is not finished, or there is no such run"),
    ],
)
def test_a_mistake_is_one_line_and_an_exit_code(words, message, tmp_path):
    done = explore(*words, cwd=tmp_path)
    assert done.returncode == 1 and done.stdout == ""
    assert message in done.stderr and len(done.stderr.splitlines()) == 1


def test_the_number_of_samples_is_checked(store, tmp_path):
    done = explore("tiny", "--results", str(store), "--samples", "0", cwd=tmp_path)
    assert done.returncode == 1 and "--samples 0: 1 or more" in done.stderr


def test_reading_a_run_imports_neither_torch_nor_gradio():
    code = "import sys, clipgraft.explore.finished; print({'torch', 'gradio', 'faiss'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_the_rule_runs_nothing_but_the_page(workflow):
    printed = workflow.snakemake("--cores", "1", "explore", check=False, RUN="small")
    assert "explore: run 'small' is not finished, or there is no such run" in printed
    assert not (workflow.root / "results").exists()
