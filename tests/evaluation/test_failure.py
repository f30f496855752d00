"""Laws of failed tasks."""

import errno
import json
import re

import pytest

from clipgraft.config import ConfigError
from clipgraft.evaluation.failure import or_failure
from clipgraft.versions import num_failures


def refuse():
    raise ConfigError("no label\n'x' in the data. Hint: y")


def test_what_a_user_has_to_mend_is_the_result_and_is_counted(tmp_path):
    out = tmp_path / "writing"
    out.mkdir()
    assert num_failures(tmp_path) == 0
    for number in (1, 2):
        facts = or_failure("renders", tmp_path, out, refuse)
        assert facts == {"failed": "no label\n'x' in the data. Hint: y"}
        assert json.loads((out / "result.json").read_text()) == {"task": "renders", **facts}
        assert num_failures(tmp_path) == number


def test_a_success_is_passed_on_and_counts_for_nothing(tmp_path):
    assert or_failure("renders", tmp_path, tmp_path, lambda: {"num_images": 3}) == {"num_images": 3}
    assert num_failures(tmp_path) == 0 and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (PermissionError(13, "Permission denied", "0.tar"), "PermissionError: .*denied: '0.tar'"),
        (RuntimeError("CUDA out of memory"), "RuntimeError: CUDA out of memory"),
    ],
)
def test_what_a_machine_has_to_mend_is_the_result_with_its_traceback_in_the_log(
    tmp_path, caplog, error, reason
):
    def fail():
        raise error

    facts = or_failure("renders", tmp_path, tmp_path, fail)
    assert re.fullmatch(reason, facts["failed"])
    assert json.loads((tmp_path / "result.json").read_text()) == {"task": "renders", **facts}
    assert num_failures(tmp_path) == 1 and "in fail\n    raise error" in caplog.text


@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOSPC, "full"), OSError(errno.EROFS, "read-only"), OSError("No space left")],
)
def test_a_disk_that_takes_no_results_is_no_failure_of_the_task(tmp_path, error):
    def fail():
        raise error

    with pytest.raises(OSError) as raised:
        or_failure("renders", tmp_path, tmp_path, fail)
    assert raised.value is error and not list(tmp_path.iterdir())


def test_our_own_mistakes_are_not_results(tmp_path):
    def fail():
        raise KeyError("x")

    with pytest.raises(KeyError):
        or_failure("renders", tmp_path, tmp_path, fail)
    assert num_failures(tmp_path) == 0
