"""A launcher and its processes: signals go to all of them, and none outlives it."""

import os
import signal
import time

import pytest

from segkern import cli
from segkern.runtime import launch
from segkern.runtime.shared_work import end_with_launcher


class Worker:
    """Stands for a process, which ends with the first signal that it gets."""

    all = ()
    number = signal.SIGTERM  # that reaches the launcher when it first looks at one
    sent = False

    def __init__(self, *_, **__):
        self.pid, self.returncode = 0, None
        Worker.all += (self,)

    def poll(self):
        if len(self.all) == 2 and not Worker.sent:
            Worker.sent = True
            signal.raise_signal(self.number)
        return self.returncode

    def send_signal(self, number):
        self.returncode = -number

    def wait(self, timeout=None):
        return self.returncode


@pytest.fixture
def workers(monkeypatch):
    monkeypatch.setattr(Worker, "all", ())
    monkeypatch.setattr(Worker, "sent", False)
    monkeypatch.setattr(launch.subprocess, "Popen", Worker)
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # ignored where nohup runs the tests
    yield Worker
    signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_to_the_launcher_goes_to_all(workers, monkeypatch, capsys, name):
    number = signal.Signals[name]
    monkeypatch.setattr(workers, "number", number)
    before = signal.getsignal(number)
    assert launch.launch(["train"], 2) == 128 + number
    assert [worker.returncode for worker in workers.all] == [-number, -number]
    assert f"process 0 of 2 was ended by {name}" in capsys.readouterr().err
    assert signal.getsignal(number) == before


def test_nohup_is_heeded(workers, monkeypatch):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    kept = []
    send = workers.send_signal

    def seen(self, number):
        kept.append(signal.getsignal(signal.SIGHUP))
        send(self, number)

    monkeypatch.setattr(workers, "send_signal", seen)
    assert launch.launch(["train"], 2) == 128 + signal.SIGTERM
    assert kept == [signal.SIG_IGN] * 2


def test_a_process_ends_with_its_launcher():
    read, write = os.pipe()
    launcher = os.fork()
    if launcher == 0:
        if os.fork() == 0:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            end_with_launcher()
            os.write(write, b"ready")
            time.sleep(60)
            os.write(write, b"outlived it")
            os._exit(0)
        time.sleep(60)
        os._exit(0)
    os.close(write)
    assert os.read(read, 5) == b"ready"
    os.kill(launcher, signal.SIGKILL)
    os.waitpid(launcher, 0)
    assert os.read(read, 20) == b""  # its end of the pipe closed with it
    os.close(read)


@pytest.mark.parametrize("command", ["train", "evaluate", "predict", "info"])
def test_the_commands_of_several_processes_end_with_their_launcher(monkeypatch, capsys, command):
    called = []
    monkeypatch.setattr(cli, "end_with_launcher", lambda: called.append(command))
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    assert cli.main([command]) == (0 if command == "info" else 2)
    assert called == ([] if command == "info" else [command])
