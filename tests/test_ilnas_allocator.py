"""What is freed between changes of the network goes back to the system, gaps between live blocks included."""

import subprocess
import sys

import pytest

from ilnas import allocator

PROGRAM = """
import os
from pathlib import Path
import torch
from ilnas import allocator

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

allocator.reuse_memory()
blocks = [(torch.ones(1 << 20), torch.ones(8)) for _ in range(64)]  # 4 MiB each, small ones between them
small = [b for _, b in blocks]
del blocks
full = resident()
allocator.release_memory()
kept = resident()
allocator.MOST_IDLE = 0
allocator.release_memory()
assert all(bool((b == 1).all()) for b in small)
print(full - kept >> 20, kept - resident() >> 20)
"""


@pytest.mark.skipif(not hasattr(allocator._glibc(), "mallinfo2"), reason="not glibc 2.33 or newer")
def test_idle_memory_is_released_only_where_there_is_much():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    below_the_limit, beyond_it = map(int, done.stdout.split())
    assert below_the_limit < 16 and beyond_it > 200  # MiB, of 256
