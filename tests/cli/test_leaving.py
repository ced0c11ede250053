"""What is said of errors of other processes, before there is a group of them and without one."""

from __future__ import annotations

import subprocess
import sys
from datetime import timedelta

import pytest
import torch
from torch.distributed import TCPStore

from lightning_moe.cli.leaving import lost_rank

HOST = """
import sys, time
from torch.distributed import TCPStore
store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
print(store.port, flush=True)
sys.stdin.read()
"""


def test_the_one_that_holds_the_store_dies_while_the_group_is_forming() -> None:
    host = subprocess.Popen([sys.executable, "-c", HOST], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert host.stdout is not None
    with host:
        port = int(host.stdout.readline())
        store = TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=20))
        store.set("mine", "here")
        host.kill()
        host.wait()
        with pytest.raises(torch.distributed.DistError) as raised:
            store.get("theirs")
    assert lost_rank(raised.value), raised.value


def test_an_error_of_one_process_alone_is_no_lost_rank() -> None:
    assert lost_rank(RuntimeError("Connection reset by peer")) is None
    assert lost_rank(torch.distributed.DistError("an argument is wrong")) is None
