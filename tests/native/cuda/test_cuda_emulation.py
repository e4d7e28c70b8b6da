# SPDX-License-Identifier: Apache-2.0
"""The emulator of CUDA C++: its primitives give CUDA's results, and broken kernels are caught.

Each broken kernel stands for a mistake that a kernel of ksae could hold; where the emulator cannot
reject it, some order of threads must give a wrong result.
"""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import assert_same, integers
from emulation.build import Emulator

SEEDS = range(8)


@pytest.fixture
def kernels(emulated_kernels: Emulator):
    emulated_kernels.seed(0)
    emulated_kernels.blocks_in_flight(3)
    emulated_kernels.step_limit(2**32)
    return emulated_kernels.module


def ints(*shape: int) -> torch.Tensor:
    return torch.full(shape, -1, dtype=torch.int32)


# -------------------------------------------------------------------------------------------- right


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("blocks", [1, 3])
def test_barriers_and_shared_memory(kernels, emulated_kernels, seed, blocks):
    emulated_kernels.seed(seed)
    emulated_kernels.blocks_in_flight(blocks)
    x = integers(5, 1001)
    out = torch.full((5,), torch.nan)
    assert kernels.row_sum(x.data_ptr(), 5, 1001, out.data_ptr()) == 0
    assert_same("sum", out, x.sum(1))


@pytest.mark.parametrize("seed", SEEDS)
def test_warp_operations(kernels, emulated_kernels, seed):
    emulated_kernels.seed(seed)
    x = integers(32, dtype=torch.int32, top=7, seed=seed)
    out = ints(17, 32)
    assert kernels.warp(x.data_ptr(), out.data_ptr()) == 0

    lane = torch.arange(32)
    bit = 1 << lane

    def word(mask: torch.Tensor) -> int:
        value = int((bit * mask).sum())
        return value - 2**32 if value >= 2**31 else value

    def same(value: int | bool) -> torch.Tensor:
        return torch.full((32,), int(value))

    first, second = x[:16], x[16:]
    halves = lane < 16
    expected = [
        same(int(x[3])),
        x[lane // 8 * 8 + 5],
        x[torch.where(lane < 2, lane, lane - 2)],
        x[torch.where(lane % 16 < 1, lane, lane - 1)],
        x[torch.where(lane + 4 > 31, lane, lane + 4)],
        x[torch.where(lane % 8 + 3 > 7, lane, lane + 3)],
        x[lane ^ 1],
        x[lane ^ 16],
        same(word(x > 0)),
        same(bool((x == 7).any())),
        same(bool((x > -100).all())),
        torch.tensor([word(x == v) for v in x]),
        same(int(x.sum())),
        same(int(x.min())),
        same(int(x.max())),
        torch.where(halves, first.sum(), second.sum()),
        torch.where(halves, (first & 1).sum(), (second & 1).sum()),
    ]
    for row, (got, want) in enumerate(zip(out, expected, strict=True)):
        assert_same(f"operation {row}", got, want.to(torch.int32))


def test_block_votes(kernels):
    for n in (1, 31, 64, 97):
        x, out = integers(n, dtype=torch.int32, top=7), ints(3)
        assert kernels.votes(x.data_ptr(), n, out.data_ptr()) == 0
        assert out.tolist() == [int((x > 0).sum()), int((x == 7).any()), 1]


def test_a_barrier_does_not_wait_for_threads_that_returned(kernels):
    out = ints(40)
    assert kernels.early_exit(40, out.data_ptr()) == 0
    assert out.tolist() == list(range(39, -1, -1))


@pytest.mark.parametrize("seed", SEEDS)
def test_the_last_block_sees_what_all_wrote(kernels, emulated_kernels, seed):
    emulated_kernels.seed(seed)
    x, partial, out = integers(23), torch.full((23,), torch.nan), torch.full((1,), torch.nan)
    counter = torch.zeros(1, dtype=torch.int32)
    arguments = (x.data_ptr(), 23, partial.data_ptr(), counter.data_ptr(), out.data_ptr())
    assert kernels.last_block(*arguments) == 0
    assert out.item() == x.sum().item() and counter.item() == 0


@pytest.mark.parametrize("seed", SEEDS)
def test_atomics(kernels, emulated_kernels, seed):
    emulated_kernels.seed(seed)
    n = 500
    x = integers(n, dtype=torch.int32, top=9)
    out = torch.zeros(6, dtype=torch.int32)
    wide, total = torch.zeros(1, dtype=torch.int64), torch.zeros(1)
    arguments = (x.data_ptr(), n, out.data_ptr(), wide.data_ptr(), total.data_ptr())
    assert kernels.atomics(*arguments) == 0
    both = 0
    for v in x.tolist():
        both |= v
    assert out.tolist() == [int(x.sum()), 9, -9, both, int(x.sum()), 1]
    assert wide.item() == n << 33 and total.item() == x.sum().item()


def test_a_seed_fixes_the_order_and_another_changes_it(kernels, emulated_kernels):
    def order(seed: int, blocks: int) -> list[int]:
        emulated_kernels.seed(seed)
        emulated_kernels.blocks_in_flight(blocks)
        out, counter = ints(4 * 40), torch.zeros(1, dtype=torch.int32)
        assert kernels.order(4, 40, counter.data_ptr(), out.data_ptr()) == 0
        assert sorted(out.tolist()) == list(range(160))
        return out.tolist()

    assert order(1, 3) == order(1, 3) != order(2, 3)

    def changes(sequence: list[int]) -> int:
        blocks = [i // 40 for i in sequence]
        return sum(a != b for a, b in itertools.pairwise(blocks))

    assert changes(order(1, 1)) == 3  # one block after the other
    assert changes(order(1, 3)) > 20


def test_shared_memory_starts_as_nan(kernels):
    out = torch.zeros(50)
    assert kernels.poison(50, out.data_ptr()) == 0
    assert out.isnan().all()


def test_conversions_round_as_torch_does(kernels):
    every = torch.arange(2**16).to(torch.int32)
    exact = [every.to(torch.int16).view(t).float() for t in (torch.float16, torch.bfloat16)]
    exact += [t.nextafter(torch.tensor(e)) for t in exact for e in (torch.inf, -torch.inf)]
    bits = torch.randint(-(2**31), 2**31, (10**5,), generator=torch.Generator().manual_seed(0))
    halfway = torch.arange(2**15).float() * 2.0**-25  # between two subnormal halves
    x = torch.cat([*exact, bits.to(torch.int32).view(torch.float32), halfway])
    h, b = (torch.empty(len(x), dtype=t) for t in (torch.float16, torch.bfloat16))
    h_back, b_back = torch.empty_like(x), torch.empty_like(x)
    arguments = (t.data_ptr() for t in (h, b, h_back, b_back))
    assert kernels.convert(x.data_ptr(), len(x), *arguments) == 0
    assert_same("half", h, x.half())
    assert_same("bfloat16", b, x.bfloat16())
    assert_same("half to float", h_back, x.half().float())
    assert_same("bfloat16 to float", b_back, x.bfloat16().float())
    number = ~x.isnan()  # -0 too
    assert torch.equal(h.view(torch.int16)[number], x.half().view(torch.int16)[number])
    assert torch.equal(b.view(torch.int16)[number], x.bfloat16().view(torch.int16)[number])


def test_launch_limits(kernels):
    invalid_value, invalid_configuration = 1, 9
    assert kernels.empty(0, 32, 0) == invalid_configuration
    assert kernels.empty(1, 1025, 0) == invalid_configuration
    assert kernels.empty(1, 0, 0) == invalid_configuration
    assert kernels.empty(1, 32, 48 * 1024) == 0
    assert kernels.empty(1, 32, 48 * 1024 + 1) == invalid_value
    assert kernels.opt_in(227 * 1024 + 1) == invalid_value
    assert kernels.opt_in(100_000) == 0
    assert kernels.empty(1, 32, 100_000) == 0
    assert kernels.empty(1, 32, 100_001) == invalid_value


# ------------------------------------------------------------------------------------------- broken


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("divergent_barrier", 0, r"divergent barrier: thread .* block \(\d,\d,0\), seed 0"),
        ("wrong_mask", 1, r"deadlock of 32 threads: 16 from .* a shuffle.* 16 from .* __sync"),
        ("outside_mask", 1, r"reads lane 20, which is not in the mask"),
        ("own_lane_missing", 1, r"mask of __ballot_sync lacks the calling lane.*thread \("),
        ("mixed_operations", 1, r"divergent warp operation: (__ballot_sync|a shuffle) meets"),
        ("deadlock", 0, r"deadlock of 64 threads: 32 from .*__syncthreads.*, 32 from .*__syncwarp"),
    ],
)
def test_broken_synchronisation_is_rejected(kernels, name, arguments, message):
    out = ints(64)
    with pytest.raises(RuntimeError, match=f"emulation of {name}_kernel: .*{message}"):
        getattr(kernels, name)(*[out.data_ptr()] * arguments)
    assert kernels.poison(3, torch.zeros(3).data_ptr()) == 0  # the next launch is unharmed


def test_a_wait_for_a_block_that_cannot_start_ends(kernels, emulated_kernels):
    emulated_kernels.step_limit(10_000)
    counter = torch.zeros(1, dtype=torch.int32)
    with pytest.raises(RuntimeError, match=r"spin_kernel: more steps than 10000; block"):
        kernels.spin(counter.data_ptr())


def test_a_missing_barrier_gives_wrong_numbers_in_every_order(kernels, emulated_kernels):
    for seed in SEEDS:
        emulated_kernels.seed(seed)
        out = ints(64)
        assert kernels.missing_barrier(out.data_ptr()) == 0
        assert out.tolist() != list(range(63, -1, -1))


def test_what_was_not_written_is_poison(kernels):
    out = ints(64)
    assert kernels.off_by_one(out.data_ptr()) == 0
    assert out.tolist()[1:] == list(range(62, -1, -1))
    assert torch.equal(out[:1].view(torch.uint8), torch.full((4,), 255, dtype=torch.uint8))


def test_a_dropped_overflow_gives_wrong_sums(kernels):
    x, out = ints(64).fill_(1), ints(1)
    assert kernels.dropped_overflow(x.data_ptr(), 64, 64, out.data_ptr()) == 0
    assert out.item() == 64
    assert kernels.dropped_overflow(x.data_ptr(), 64, 63, out.data_ptr()) == 0
    assert out.item() == 63


@pytest.mark.parametrize(
    ("call", "report"),
    [
        ("shared_overrun(5)", "write past the end of shared memory, at byte 20 of 20"),
        ("shared_overrun(1024)", r"outside of shared memory, at 0x\w+; thread \(0,0,0\); block"),
        ("poison(3, 8)", r"outside of memory, at 0x\w+; thread \([0-2],0,0\); block \(0,0,0\), s"),
    ],
)
def test_an_access_outside_of_memory_is_seen(call, report):
    """In a process of its own, which it ends; so does AddressSanitizer, where it is on."""
    code = (
        "from emulation import build\n"
        "module = build.kernels().module\n"
        "assert module.empty(1, 32, 20) == 0\n"
        f"module.{call}\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[2] / "helpers",
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    assert re.search(f"{report}|AddressSanitizer", done.stderr), done.stderr
