"""Runs that are killed or stopped end in the same bits as one that is left alone."""

import os
import signal

import pytest

from scripts import kill_test


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch):
    monkeypatch.setenv("NPROC", "1")  # XLA's sums depend on the number of threads
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")


def test_a_run_killed_in_a_save_and_then_stopped(tmp_path):
    lab = kill_test.Lab(tmp_path, num_epochs=2)
    lab.finish(lab.start())
    expected = kill_test.what_is_left(lab.put_away("left_alone"))

    process = lab.start()
    assert kill_test.wait_for(process, lambda: len(lab.steps()) >= 4 and lab.saving())
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert process.exitcode == -signal.SIGKILL

    killed = len(lab.steps())
    process = lab.start()
    assert kill_test.wait_for(process, lambda: len(lab.steps()) >= killed + 3)
    os.kill(process.pid, signal.SIGTERM)
    process.join()
    assert process.exitcode == 128 + signal.SIGTERM

    stopped = lab.steps()
    lab.finish(lab.start())
    trained = lab.steps()
    # Every step from where the kill had left it, none twice after the stop.
    assert trained[killed:] == list(range(trained[killed], 13))
    assert len(trained) > len(stopped)
    assert kill_test.compare(lab.workdir, expected) == []


def test_a_file_for_the_output_is_one_line(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert kill_test.main([f"--output={tmp_path / 'file'}"]) == 1
    err = capsys.readouterr().err
    assert "is a file, not a folder; choose another --output" in err
    assert err.count("\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_many_moments_and_every_file(tmp_path, workers):
    kills = "20" if workers == 0 else "6"
    arguments = [f"--kills={kills}", "--terms=5", f"--workers={workers}", f"--output={tmp_path}"]
    assert kill_test.main(arguments) == 0
