"""The lock of a run folder."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path

import pytest

from calibrate.errors import UserError
from calibrate.record.folder import locked


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_filesystem_without_locks_is_not_another_process(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", refuse)
    said = r"must be on a filesystem that can lock files.*local disk"
    with pytest.raises(UserError, match=said), locked(tmp_path):
        pass


def test_a_name_that_is_not_utf8_is_refused_before_any_work(tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"raw\xff")
    with (
        pytest.raises(UserError, match=r"must be UTF-8, but got .*raw\\udcff.*rename it"),
        locked(folder),
    ):
        pass
    assert not folder.exists()


def test_a_folder_in_use_is_refused(tmp_path: Path) -> None:
    used = pytest.raises(UserError, match="in use by another")
    with locked(tmp_path), used, locked(tmp_path):
        pass
