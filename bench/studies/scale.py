# SPDX-License-Identifier: Apache-2.0
"""What sharding costs, by formula and as counted: writes docs/scale.md, `python -m
ksae.bench.studies.scale`; with --count it takes the steps that are counted anew."""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ksae.parallel.cost import (
    Sizes,
    bytes_sent,
    flops,
    state_bytes,
    update_bytes,
    working_bytes,
)
from ksae.parallel.layout import best_replicas

COUNTED = Path(__file__).parents[1] / "results" / "scale_counted.json"
# One step of each is counted, by Gloo, a rank a process.
STEPS = {
    "2 ranks": Sizes(2, 96, 64, 1024, 8),
    "3 ranks": Sizes(3, 96, 64, 1024, 8),
    "4 ranks": Sizes(4, 96, 64, 1024, 8),
    "4 ranks, bfloat16": Sizes(4, 96, 64, 1024, 8, 2),
    "4 ranks, BatchTopK": Sizes(4, 96, 64, 1024, 8, batch=True),
    "4 ranks, 3 prefixes": Sizes(4, 96, 64, 1024, 8, prefixes=3),
    "4 ranks, 2 copies": Sizes(4, 1024, 64, 128, 16, replicas=2),
    "4 ranks, 4 copies": Sizes(4, 1024, 64, 128, 16, replicas=4),
}
D, K, TOKENS = 4096, 64, 8192
LATENTS = (2**17, 2**20, 2**24)
RANKS = (1, 2, 4, 8, 16, 32, 64)
# Assumed of a device: product, memory and links within and between nodes of 8, a second.
FLOPS, MEMORY, WITHIN, BETWEEN, NODE = 4e14, 4e12, 4e11, 5e10, 8
HEAD = """# Scale: latents spread over devices

This page is written by `python -m ksae.bench.studies.scale` from the formulas of
`python/ksae/parallel/cost.py`. **Nothing on it was measured on a GPU.** That a step sends the
bytes of the formula, within 2 %, is tested with 2, 3 and 4 processes
(`tests/parallel/test_sharding.py`), as is that it gives the numbers of one device: selections are
identical, and over 20 steps losses are within 1e-6.

<!-- run by tests/parallel/test_sharding.py -->
```python
torch.distributed.init_process_group("gloo")  # or "nccl"
sae = ksae.shard(ksae.TopKSAE(d_in=768, d_sae=24576, k=32))
step = ksae.TrainStep(sae, lr=1e-4)
metrics = step(x)  # x: the tokens of this rank
```

`torchrun --nproc-per-node 8 -m ksae train run.yaml` does a whole run, in which the processes also
share the harvest of activations; `ksae convert runs/x/checkpoints/step_00001000 sae.safetensors
--to ksae` gathers a checkpoint into one file, and any number of processes goes on from it.

TopK, GradTopK, BatchTopK and AbsTopK (both float32) and JumpReLU are served, SAEs and transcoders,
with Matryoshka prefixes and every AuxK. BatchTopK has one threshold for the tokens and latents of
all ranks. What is not served is refused by name.

## What is sent

R ranks with n tokens each, N = R n. Rank r holds latents r, r + R, ...: their rows of W_enc and
W_dec, biases, moments, counters. A rank sends in a step, without AuxK, d being the width, k the
active latents and b the bytes of an element of x:

| exchange | bytes a rank sends |
|---|---|
| tokens, to all | (R - 1) n d b |
| candidates (64-bit keys), to the token's rank | (R - 1) n k 8 |
| the k-th key, to all | (R - 1) n 8 |
| partial reconstructions, float32, to the token's rank | (R - 1) n d 4 |
| residual, float32, to all | (R - 1) n d 4 |
| sums for b_dec, float64, and for centring | (R - 1) d 12 |
| mean and variance of the targets, float64 | (R - 1) d 8 |

BatchTopK sends no candidates but the counts of three digits of a threshold, (R - 1) 49,152 bytes,
and on equal values a few more. P Matryoshka prefixes have P partial reconstructions and residuals.
AuxK adds candidates of k_aux dead latents, and partial sums and residuals once more. A skip
connection adds the sum of its gradient, in two exchanges of d_in d_out 4 (R - 1) / R bytes. No
weight and no gradient of a latent is sent.

## Copies of the coder

`ksae.shard(sae, replicas=D)`, or a DeviceMesh of two dimensions, makes D copies of the coder, each
on R / D ranks, which exchange the above among themselves. Between copies go the gradients of the
rows that the batch touches, F D / R rows at most on a rank, 16 F d bytes of float32 for D = R;
their sum has the same bits everywhere. That sends less where F is small beside N.
`ksae train` takes the D that sends least by the formula, or `train.replicas`. By
`DistributedDataParallel` and `fully_shard` a module is trained as any other;
`ksae.count_over_ranks(sae, global_variance=True)` makes what it counts that of the whole batch.
"""
TAIL = """
## What breaks first

- **The rows of all tokens.** Tokens, partial sums and residuals are N d numbers on every rank,
  and N = R n grows with R: with more ranks take fewer tokens each, as a fixed batch N does.
  They are not taken in chunks, so these exchanges do not hide behind the product; the times
  above are sums. Small ones do: the variance goes beside the encode, the sum for centring beside
  the decoder's update. On a CPU Gloo's copies take the cores that would compute meanwhile.
- **Links between nodes.** Within a node the exchange is small beside the product; between
  nodes, at the assumed rate and with 131,072 latents, it is the larger part.
- **AuxK's candidates**: k_aux is half the width by default, so they are as large as the tokens.
  Fewer dead latents than k_aux make them fewer (on the CPU; on a GPU the number is not read).
- **A few latents a rank.** Each rank keeps min(k, F / R) candidates a token; at F / R near k
  nothing is saved.
- **Small F**: where N is above F, copies send less. Sharding is then for the memory alone.
- **P prefixes** multiply the two large exchanges and the rows by P.
"""


def copies() -> str:
    """The number that sends least, for few and many latents and tokens."""
    R, sizes = 8, (2**12, 2**14, 2**16, 2**18)
    lines = [
        "",
        f"Copies that send least on {R} ranks, float32, d = 768, k = 32:",
        "",
        "| latents | " + " | ".join(f"{N:,} tokens a step" for N in sizes) + " |",
        "|---" * (len(sizes) + 1) + "|",
    ]
    for F in (2048, 8192, 32768, 131072):
        best = [best_replicas(Sizes(R, N // R, 768, F, 32)) for N in sizes]
        lines.append(f"| {F:,} | " + " | ".join(map(str, best)) + " |")
    return "\n".join(lines) + "\n"


def counted() -> str:
    """The record of counted steps beside the formula."""
    lines = [
        "",
        "## What was counted",
        "",
        "One step each, Gloo, n tokens a rank; a rank's bytes, the largest of all ranks.",
        "",
        "| step | n | d | F | k | sent | by formula | held | by formula |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    record = json.loads(COUNTED.read_text())
    for name, found in record.items():
        s = Sizes(**found["sizes"])
        want = sum(bytes_sent(s).values())
        cells = (s.n, s.d, s.F, s.k, found["sent"], want, found["held"], state_bytes(s))
        lines.append(f"| {name} | " + " | ".join(f"{cell:,}" for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def count() -> dict[str, Any]:
    """Take a step of each of STEPS and count."""
    from torch.multiprocessing.spawn import spawn

    record = {}
    for name, s in STEPS.items():
        with tempfile.TemporaryDirectory() as folder:
            spawn(_step, (s, folder), s.R)  # type: ignore[no-untyped-call]
            found = [json.loads(path.read_text()) for path in Path(folder).glob("*.json")]
        most = [max(pair) for pair in zip(*found, strict=True)]
        record[name] = {"sizes": asdict(s), "sent": most[0], "held": most[1]}
    return record


def _step(rank: int, s: Sizes, folder: str) -> None:
    """Of one rank: bytes sent, and held as parameters, counters and state."""
    import torch
    import torch.distributed as dist

    from ksae.coders import SAE, BatchTopK, TopK
    from ksae.parallel.shard import shard
    from ksae.step.train_step import TrainStep

    torch.set_num_threads(1)
    file = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=file, rank=rank, world_size=s.R)
    torch.manual_seed(0)
    activation = BatchTopK(s.k) if s.batch else TopK(s.k)
    prefixes = [s.F * (p + 1) // s.prefixes for p in range(s.prefixes)] if s.prefixes > 1 else None
    dtype = {4: torch.float32, 2: torch.bfloat16}[s.itemsize]
    sae = SAE(s.d, s.F, activation, prefixes=prefixes, dtype=dtype)
    part = shard(sae, replicas=s.replicas)
    step = TrainStep(part)
    part.ranks.bytes.clear()
    torch.manual_seed(rank)
    step(torch.randn(s.n, s.d))
    tensors = [*part.state_dict().values(), *step.state_dict().values()]
    held = sum(t.numel() * t.element_size() for t in tensors)
    Path(folder, f"{rank}.json").write_text(json.dumps([sum(part.ranks.bytes.values()), held]))
    dist.barrier()
    dist.destroy_process_group()


def table(F: int) -> str:
    lines = [
        f"### {F:,} latents",
        "",
        f"d = {D}, k = {K}, bfloat16 weights with float32 masters,"
        f" N = {TOKENS * 8:,} tokens a step.",
        "",
        "| ranks | state, GB | temporaries, GB | product, TFLOP | sent, GB |"
        " product, ms | optimizer, ms | exchange, ms |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for R in RANKS:
        s = Sizes(R, TOKENS * 8 // R, D, F, K, 2)
        sent = sum(bytes_sent(s).values())
        outside = max(R - NODE, 0) / max(R - 1, 1)  # share that leaves the node
        times = (
            flops(s) / FLOPS,
            update_bytes(s) / MEMORY,
            sent * (1 - outside) / WITHIN + sent * outside / BETWEEN,
        )
        cells = [
            f"{state_bytes(s) / 1e9:.2f}",
            f"{working_bytes(s) / 1e9:.2f}",
            f"{flops(s) / 1e12:.1f}",
            f"{sent / 1e9:.2f}",
            *(f"{t * 1e3:.1f}" for t in times),
        ]
        lines.append(f"| {R} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def page() -> str:
    assumed = (
        f"Times assume {FLOPS / 1e12:.0f} TFLOP/s in the product, {MEMORY / 1e12:.0f} TB/s of"
        f" memory, {WITHIN / 1e9:.0f} GB/s between\ndevices of a node of {NODE} and"
        f" {BETWEEN / 1e9:.0f} GB/s between nodes.\n"
    )
    by_formula = "\n## A rank, by formula\n\n" + "\n".join([assumed, *map(table, LATENTS)])
    return HEAD + copies() + counted() + by_formula + TAIL


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("docs/scale.md"))
    parser.add_argument("--count", action="store_true", help="take the counted steps anew")
    args = parser.parse_args()
    if args.count:
        COUNTED.write_text(json.dumps(count(), indent=1) + "\n", encoding="utf-8")
    out: Path = args.out
    out.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
