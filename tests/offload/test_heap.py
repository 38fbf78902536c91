"""The heap is kept: in a process of its own, because it is for good."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys
import torch
from cenacle.offload.heap import keep_heap

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def fresh():
    before = faults()
    for _ in range(10):
        torch.ones(16 << 20)  # 64 MiB: 16384 pages, or some huge ones
    return faults() - before

fresh()
given_back = fresh()
assert keep_heap()
fresh()
kept = fresh()
sys.stdout.write(f"{given_back} {kept}")
"""


@pytest.mark.slow
def test_large_blocks_are_used_again() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], check=True, capture_output=True)
    given_back, kept = map(int, done.stdout.split())
    assert kept < given_back / 10
