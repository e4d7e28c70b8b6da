# SPDX-License-Identifier: Apache-2.0
"""`destroy_process_group` ends the threads of every group, whatever ksae still holds.

A thread of Gloo that drops the last tensor of an exchange while Python ends aborts the process.
"""

from __future__ import annotations

import subprocess
import sys

import pytest

START = """
import os
import socket

import torch
import torch.distributed as dist

from ksae.errors import RankError
from ksae.parallel.ranks import Ranks

def threads():
    return len(os.listdir("/proc/self/task"))

before = threads()
"""

OF_A_SCRIPT = """
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
"""

OF_A_RUN = """
from ksae.parallel.ranks import set_up

rank = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "TORCHELASTIC_RUN_ID": "one"}
with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free.getsockname()[1]}
os.environ.update({name: str(value) for name, value in (rank | place).items()})
assert set_up()
import torch.distributed.nn.functional  # as torch's compiler does
"""

END = """
held = [Ranks(dist.group.WORLD), Ranks(dist.new_group([0]))]
for ranks in held:
    ranks.gather(torch.ones(3))
during = threads()
dist.destroy_process_group()
print(during > before, threads() - before)
try:
    held[0].gather(torch.ones(3))
except RankError as error:
    print(error)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="threads are counted in /proc")
@pytest.mark.parametrize("middle", [OF_A_SCRIPT, OF_A_RUN], ids=["script", "run"])
def test_no_thread_is_left_and_the_next_exchange_says_why(middle: str) -> None:
    script = START + middle + END
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "True 0",
        "rank 0 of 1: its process group must be there, got one that"
        " torch.distributed.destroy_process_group has ended",
    ]
