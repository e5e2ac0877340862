"""Runs that are killed or stopped end in the same bits as one that is left alone."""

import multiprocessing
import os
import signal
import time

import pytest

from input_pipeline import command_line
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


def test_ctrl_c_leaves_no_run_behind(tmp_path, monkeypatch, capsys):
    processes = []

    def start(lab):
        context = multiprocessing.get_context("spawn")
        processes.append(context.Process(target=time.sleep, args=(600,)))
        processes[0].start()
        return processes[0]

    monkeypatch.setattr(kill_test.Lab, "start", start)
    monkeypatch.setattr(kill_test.Lab, "finish", lambda *_: signal.raise_signal(signal.SIGINT))
    for name in ("JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"):
        monkeypatch.setenv(name, os.environ.get(name, ""))  # it sets them where they are not
    # Not ignored, as it is in tests that a shell started in the background.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    command_line.leave_at_once()
    try:
        assert kill_test.main([f"--output={tmp_path}"]) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    assert processes[0].exitcode == -signal.SIGKILL
    said = f"stopped by signal 2; the runs so far are in {tmp_path}\n"
    assert capsys.readouterr().err == said


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
