# SPDX-License-Identifier: Apache-2.0
"""Folders that are written at once: where they cannot be, and what a failure or a kill leaves."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from vllm_mkv import folder as folders
from vllm_mkv.folder import check_replaceable, put_aside, replaced


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "ours").write_text("old")
    (tmp_path / "out" / "theirs").write_text("precious")
    return tmp_path / "out"


@pytest.fixture(params=[True, False], ids=["exchange", "aside"])
def exchanged(request, monkeypatch):
    """Whether the system can exchange two folders."""
    if not request.param:
        monkeypatch.setattr(folders, "_exchange", lambda one, other: False)
    return request.param


def write(folder, text="new"):
    with replaced(folder, ["ours", "gone"]) as staging:
        (staging / "ours").write_text(text)


def contents(folder):
    return {file.name: file.read_text() for file in folder.iterdir()}


def test_only_our_files_are_replaced(folder, exchanged):
    (folder / "gone").write_text("old")
    folder.chmod(0o700)
    write(folder)
    assert contents(folder) == {"ours": "new", "theirs": "precious"}
    assert folder.stat().st_mode & 0o777 == 0o700
    assert [file.name for file in folder.parent.iterdir()] == ["out"]


def test_a_new_folder_is_made_with_those_above(tmp_path):
    write(tmp_path / "some" / "where" / "out")
    assert contents(tmp_path / "some" / "where" / "out") == {"ours": "new"}


def test_a_file_system_without_exchanges_is_told_from_an_error(folder, tmp_path):
    assert folders._exchange(folder, folder.parent) is False  # invalid: one holds the other
    with pytest.raises(FileNotFoundError):
        folders._exchange(tmp_path / "nowhere", folder)


@pytest.mark.parametrize("failing", ["exchange", "first", "second"])
def test_a_failure_leaves_what_was_there(folder, monkeypatch, failing):
    replace, calls = os.replace, []

    def fail(*names):
        calls.append(names)
        if (failing, len(calls)) in (("exchange", 1), ("first", 1), ("second", 2)):
            raise OSError(5, "Input/output error")
        replace(*names)

    monkeypatch.setattr(folders, "_exchange", fail if failing == "exchange" else lambda one, other: False)
    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="Input/output error"):
        write(folder)
    assert contents(folder) == {"ours": "old", "theirs": "precious"}
    assert [file.name for file in folder.parent.iterdir()] == ["out"]


@pytest.mark.parametrize("moment", ["before", "after"])
def test_killed_while_it_is_put_in_place_it_is_old_or_new(folder, moment):
    code = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from vllm_mkv import folder\n"
        "exchange = folder._exchange\n"
        "def killing(*names):\n"
        f"    assert {moment == 'before'} or exchange(*names)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "folder._exchange = killing\n"
        "with folder.replaced(Path(sys.argv[1]), ['ours']) as staging:\n"
        "    (staging / 'ours').write_text('new')\n"
    )
    done = subprocess.run([sys.executable, "-c", code, folder], capture_output=True, text=True, timeout=60)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert contents(folder) == {"ours": "old" if moment == "before" else "new", "theirs": "precious"}


def test_killed_between_two_renames_it_is_found(folder, monkeypatch):
    monkeypatch.setattr(folders, "_exchange", lambda one, other: False)
    pid = os.fork()
    if pid == 0:
        replace = os.replace
        os.replace = lambda *names: (replace(*names), os.kill(os.getpid(), signal.SIGKILL))
        try:
            write(folder)
        finally:
            os._exit(0)
    assert os.waitpid(pid, 0)[1] == signal.SIGKILL
    assert not folder.exists()
    assert contents(put_aside(folder)) == {"ours": "old", "theirs": "precious"}
    assert put_aside(folder.with_name("o*t")) is None


def test_what_cannot_be_replaced_is_refused(folder, monkeypatch):
    check_replaceable(folder)
    check_replaceable(folder / "new" / "one")
    assert contents(folder) == {"ours": "old", "theirs": "precious"}
    with pytest.raises(ValueError, match=r"/proc is a mount point.*name a folder in it"):
        check_replaceable(Path("/proc"))
    with pytest.raises(ValueError, match=r"ours is a file, so that .* name a folder in another place"):
        check_replaceable(folder / "ours" / "new")
    (folder / "below").mkdir()
    monkeypatch.chdir(folder / "below")
    with pytest.raises(ValueError, match=r"out is where this command runs.*name another or run elsewhere"):
        check_replaceable(folder)
    check_replaceable(folder / "new")


@pytest.mark.parametrize("place", ["/proc/new", "/proc/some/new"])
def test_a_place_that_takes_no_folder_is_refused(place):
    with pytest.raises(ValueError, match=r"cannot write into /proc \(.*\); name a folder in another place"):
        check_replaceable(Path(place))
