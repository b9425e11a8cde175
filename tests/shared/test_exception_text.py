"""Texts of exceptions: what the machine has run out of, exceptions of loader processes, and whose frames are named."""

from __future__ import annotations

import errno
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._utils import ExceptionWrapper

import fedqueue
from fedqueue.errors import TaskError
from fedqueue.exception_text import exception_text, exception_with_place
from fedqueue.local_update import _train_result

FULL = "unable to write to file </torch_11_22_0>: No space left on device (28)"


class Rows(torch.utils.data.Dataset[Any]):
    def __init__(self, error: BaseException) -> None:
        self.error = error

    def __len__(self) -> int:
        return 4

    def __getitem__(self, row: int) -> Any:
        raise self.error


def passed_on(error: BaseException) -> BaseException:
    """Return the exception that a DataLoader raises where `error` is raised in its worker process 0."""
    try:
        Rows(error)[0]
    except BaseException:
        wrapper: Any = ExceptionWrapper  # torch leaves its own parts untyped
        wrapped = wrapper(sys.exc_info(), where="in DataLoader worker process 0")
    with pytest.raises(type(error)) as caught:
        wrapped.reraise()
    return caught.value


def test_exception_of_a_loader_process_has_its_own_text() -> None:
    text = exception_with_place(passed_on(ValueError("row 3 is empty\nreally")))
    assert text.startswith("ValueError: row 3 is empty\nreally (in DataLoader worker process 0); in __getitem__ (")
    assert "Traceback" not in text
    assert "__getitem__ (test_exception_text.py:" in text


@pytest.mark.parametrize("error", [RuntimeError(FULL), passed_on(RuntimeError(FULL))], ids=["own", "passed-on"])
def test_full_shared_memory_is_named_with_what_to_do(error: BaseException) -> None:
    text = exception_text(error)
    assert "No space left on device" in text[:150]
    assert "/dev/shm" in text
    assert "training.loader_workers = 0" in text


def test_semaphore_without_shared_memory_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    import multiprocessing.synchronize  # noqa: F401 - at its import, the real class is needed
    from multiprocessing import get_context

    def no_space(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("_multiprocessing.SemLock", no_space)
    with pytest.raises(OSError) as caught:
        get_context().Lock()
    assert "/dev/shm" in exception_text(caught.value)


def test_full_disk_is_no_lack_of_shared_memory() -> None:
    with pytest.raises(OSError) as caught:
        raise OSError(errno.ENOSPC, "No space left on device", "/data/rows")
    assert "/dev/shm" not in exception_text(caught.value)


def test_too_many_open_files_names_the_limit() -> None:
    error = OSError(errno.EMFILE, "Too many open files", "rows/252")
    assert exception_text(error).startswith("OSError: [Errno 24] Too many open files: 'rows/252' (this process may")
    assert "ulimit -n" in exception_text(error)


def test_task_error_of_fedqueue_names_no_frame_of_its_own() -> None:
    with pytest.raises(TaskError) as caught:
        _train_result(fedqueue.Task(), [1], (1, {}))
    error = caught.value
    while error.__traceback__ and error.__traceback__.tb_frame.f_code.co_filename == __file__:  # a job calls it
        error = error.with_traceback(error.__traceback__.tb_next)
    assert exception_with_place(error) == exception_text(error)


def test_task_error_names_the_users_frame_alone() -> None:
    with pytest.raises(TaskError) as caught:
        _train_result(fedqueue.Task(), [1], (1, {}))
    place = exception_with_place(caught.value).rpartition("; in ")[2]
    assert place.startswith(f"test_task_error_names_the_users_frame_alone ({Path(__file__).name}:")
    assert "<" not in place
