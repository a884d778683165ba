"""Processes of a run: where they meet, which GPU is whose, and who says what went wrong."""

import threading

import pytest
import torch
import torch.distributed as dist

from segkern.runtime import processes
from segkern.runtime.processes import Processes, apart, lost_another


def met(store, count):
    """What a name means in the parts of a store that so many processes find."""
    found = [None] * count

    def come(rank):
        found[rank] = apart(store, rank, count)

    threads = [threading.Thread(target=come, args=(rank,)) for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def test_a_group_that_starts_again_meets_in_a_part_of_its_own():
    """In the store of the last one, where the words of its processes still lie."""
    store = dist.HashStore()
    for name in ("first", "second"):
        parts = met(store, 3)
        assert not any(part.check(["name"]) for part in parts)
        parts[1].set("name", name)
        assert [part.get("name") for part in parts] == [name.encode()] * 3


def test_one_that_does_not_come_is_named(monkeypatch):
    monkeypatch.setattr(processes, "TIMEOUT", processes.timedelta(0))
    with pytest.raises(RuntimeError, match="timed out waiting for 1 of 2"):
        apart(dist.HashStore(), 0, 2)


@pytest.mark.parametrize(
    ("name", "gpus", "rank", "found"),
    [
        ("cpu", 0, 1, "cpu"),
        ("cuda", 2, 1, "cuda:1"),
        ("cuda", 1, 1, r"no more than its GPUs \(1\), got one with LOCAL_RANK 1"),
        ("cuda:0", 2, 1, "must be cuda, without a number, where 2 processes .* got 'cuda:0'"),
        ("cuda:0", 1, 1, "cuda:0"),  # the one that each sees, where a launcher shares them out
    ],
)
def test_each_process_has_a_gpu(monkeypatch, name, gpus, rank, found):
    chosen = []
    monkeypatch.setattr(processes, "usable_device", torch.device)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    one = Processes(4 + rank, 8, rank, 2)
    if " " in found:
        with pytest.raises(ValueError, match=found):
            one.device(name)
        return
    assert str(one.device(name)) == found
    assert chosen == ([rank] if name == "cuda" else [])
    assert str(Processes().device("cuda:0")) == "cuda:0"


@pytest.mark.parametrize(
    ("kind", "text", "lost"),
    [
        (RuntimeError, "[gloo/transport/tcp/pair.cc:544] Connection closed by peer [::1]:1", True),
        (
            RuntimeError,
            "[gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 600000ms",
            True,
        ),
        (
            dist.DistNetworkError,
            "failed to recv, got 0 bytes. Connection was likely closed.",
            True,
        ),
        (dist.DistBackendError, "NCCL error: ncclRemoteError: a remote process exited", True),
        (dist.DistNetworkError, "failed to listen on port: 29500 (EADDRINUSE)", False),
        (dist.DistBackendError, "NCCL error: unhandled cuda error: out of memory", False),
        (RuntimeError, "ProcessGroupNCCL is only supported with GPUs, no GPUs found!", False),
        (RuntimeError, "the server of the pictures timed out", False),
        (OSError, "gloo: Connection closed by peer", False),
    ],
)
def test_what_says_that_another_process_is_gone(kind, text, lost):
    assert lost_another(kind(text)) == lost
