# SPDX-License-Identifier: Apache-2.0
"""Each op of ksae against torch's ways of doing it: time, and share of a ceiling measured here.

    python bench/ops.py --json ops.json

Every way is checked against ksae's result in the same run. See bench/README.md.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import costs
import torch
from costs import Ceilings, Cost
from measure import describe, interleave, machine, table, write_json
from opcases import Case, latent_pass
from torch import Tensor

from ksae import native, ops

# The last three of each list are where a dense or stored way may win: few rows, large k / F.
SHAPES = [
    (2048, 768, 24576, 32),
    (2048, 768, 16384, 64),
    (32, 768, 24576, 32),
    (1, 768, 24576, 32),
    (256, 768, 4096, 512),
]
SMALL = [(64, 96, 1024, 16), (1, 96, 1024, 16), (32, 96, 1024, 128)]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
NO_PRODUCT = "product alone, same microkernel: no entry (native.encode_product is missing)"


@dataclass
class Comparison:
    """One op at one shape: ksae's way, others by name, and what all must agree on."""

    op: str
    cost: Cost
    product: float  # flop/s of the ceiling
    ours: dict[str, Callable[[], Any]]
    others: dict[str, Callable[[], Any]]
    check: Callable[[Any], Tensor] | None = lambda result: result  # what is compared; None: nothing
    baselines: dict[str, Callable[[], Any]] = field(default_factory=dict)  # parts, not compared
    remarks: list[str] = field(default_factory=list)


def screened(on: bool, call: Callable[[], Any]) -> Any:
    """`call` with certified screening switched on or off."""
    before, native.screening = native.screening, on
    try:
        return call()
    finally:
        native.screening = before


def comparisons(case: Case, limit: Ceilings) -> Iterator[Comparison]:
    """All ops at one shape and dtype."""
    N, d, F, k, s = case.N, case.d, case.F, case.k, case.dtype.itemsize
    x, W, b_enc, b_dec = case.x, case.W, case.b_enc, case.b_dec
    gather = limit.mm_fp32  # gathers are bound by bytes: the rate hardly matters
    linear = partial(torch.nn.functional.linear, x - b_dec, W, b_enc)
    values, indices, grad = case.values, case.indices, case.grad

    yield topk_comparison(case, limit)

    def encode() -> tuple[Tensor, Tensor]:
        return ops.topk_encode(x, W, b_enc, k, b_dec)

    fp32 = case.dtype == torch.float32
    ways = {"ksae": partial(screened, False, encode)}
    if fp32 and case.can_screen:
        ways["ksae, screened"] = partial(screened, True, encode)
    baselines: dict[str, Callable[[], Any]] = {"F.linear alone": linear}
    with_product = native.available() and hasattr(native, "encode_product")
    if with_product:
        for name in ways:
            screen = name.endswith("screened")
            call = partial(native.encode_product, x, W, screen=screen)
            baselines[f"product alone of {name}"] = call
    yield Comparison(
        "topk_encode",
        costs.topk_encode(N, d, F, k, s),
        limit.product(case.dtype),
        ways,
        {"F.linear + topk": lambda: linear().topk(k)},
        check=lambda r: r[0].relu(),
        baselines=baselines,
        remarks=[] if with_product else [NO_PRODUCT],
    )
    yield Comparison(
        "sparse_decode",
        costs.sparse_decode(N, d, F, k, s),
        gather,
        {"ksae": lambda: ops.sparse_decode(values, indices, W, b_dec)},
        {
            "embedding_bag": lambda: (
                b_dec
                + torch.nn.functional.embedding_bag(
                    indices, W, per_sample_weights=values, mode="sum"
                )
            ),
            "dense matmul": lambda: b_dec + case.dense_code() @ W,
        },
    )
    yield Comparison(
        "backward, values",
        costs.backward_values(N, d, F, k, s),
        gather,
        {"ksae": lambda: ops.sparse_decode_backward_values(grad, indices, W)},
        {
            "gather + bmm": lambda: torch.bmm(W[indices], grad[:, :, None])[:, :, 0],
            "dense matmul": lambda: (grad @ W.T).gather(1, indices),
        },
    )
    yield Comparison(
        "backward, weight",
        costs.backward_weight(N, d, F, k, s),
        gather,
        {"ksae": lambda: ops.sparse_decode_backward_weight(grad, values, indices, F)},
        {"index_add_": case.index_add, "dense matmul": lambda: (case.dense_code().T @ grad,)},
        check=lambda r: r[0],
    )
    yield Comparison(
        "group_by_latent",
        costs.group_by_latent(N, F, k, s),
        gather,
        {"ksae": lambda: ops.group_by_latent(values, indices, F)},
        {"stable sort": case.sort_by_latent},
        check=lambda r: r[0],
    )
    if fp32:
        yield latent_comparison(case, limit)


def topk_comparison(case: Case, limit: Ceilings) -> Comparison:
    u = torch.nn.functional.linear(case.x - case.b_dec, case.W, case.b_enc)  # [N, F]
    return Comparison(
        "topk of stored scores",
        costs.topk(case.N, case.F, case.k, case.dtype.itemsize),
        limit.mm_fp32,
        {"ksae": lambda: ops.topk(u, case.k)},
        {"torch.topk": lambda: u.topk(case.k)},
        check=lambda r: r[0],
    )


def latent_comparison(case: Case, limit: Ceilings) -> Comparison:
    """Gradients, projection, Adam and unit rows of both matrices, from the residual on."""
    N, d, F, k = case.N, case.d, case.F, case.k
    cost = costs.latent_sums(N, F, k)
    cost = cost + costs.row_update(N, d, F, k) + costs.row_update(N, d, F, k)
    ours, torchs, adam = latent_pass(case)
    return Comparison(
        "latent pass, both matrices",
        cost,
        limit.mm_fp32,
        {"ksae": ours},
        {"index_add_, fused Adam": torchs},
        baselines={"fused Adam alone": adam},
    )


def measure(c: Comparison, rounds: int, limit: Ceilings, case: Case) -> dict[str, Any]:
    """Check, then time: the record of one op at one shape."""
    wrong = [] if c.check is None else differences(c, case.tolerance)
    times = interleave({**c.ours, **c.others, **c.baselines}, rounds)
    floor = c.cost.seconds(limit, c.product)
    return {
        "op": c.op,
        "N": case.N,
        "d": case.d,
        "F": case.F,
        "k": case.k,
        "dtype": case.name,
        "bytes": c.cost.bytes,
        "flops": c.cost.flops,
        "ceilings": limit,
        "floor_seconds": floor,
        "ours": {name: times[name] for name in c.ours},
        "others": {name: times[name] for name in c.others},
        "baselines": {name: times[name] for name in c.baselines},
        "remarks": c.remarks,
        "wrong": wrong,
    }


def differences(c: Comparison, tolerance: float) -> list[str]:
    """Ways whose result is not ksae's, by the largest error over the largest entry."""
    results = {name: c.check(call()).double() for name, call in {**c.ours, **c.others}.items()}
    want = next(iter(results.values()))
    scale = want.abs().max().clamp(min=1e-30)
    wrong = []
    for name, got in results.items():
        error = float((got - want).abs().max() / scale)
        if not error <= tolerance:
            wrong.append(f"{name}: differs from ksae by {error:.1e}")
    return wrong


def rows(record: dict[str, Any]) -> Iterator[list[str]]:
    """Ours, torch's, then in brackets parts of an op. LOSES: ksae's best is slower than this."""
    best = min(t.median for t in record["ours"].values())
    first = record["op"]
    compared = {**record["ours"], **record["others"]}
    parts = {f"({name})": t for name, t in record["baselines"].items()}
    for name, t in (compared | parts).items():
        ours = name in record["ours"]
        loses = " LOSES" if name in record["others"] and t.median < best else ""
        yield [
            first,
            name,
            f"{t.median * 1e3:.3f}",
            f"{t.q1 * 1e3:.3f}-{t.q3 * 1e3:.3f}",
            "" if ours else f"{t.median / best:.2f}x{loses}",
            f"{record['bytes'] / t.median / 1e9:.1f}" if ours else "",
            f"{record['flops'] / t.median / 1e9:.0f}" if ours else "",
            f"{record['floor_seconds'] / t.median:.0%}" if ours else "",
        ]
        first = ""


def verdicts(record: dict[str, Any]) -> Iterator[str]:
    """The issue of the encoder: what selection costs beside the product, and torch's way."""
    if record["op"] != "topk_encode":
        return
    ours = {name: t.median for name, t in record["ours"].items()}
    where = f"N={record['N']} F={record['F']} k={record['k']} {record['dtype']}"
    for name, seconds in ours.items():
        alone = record["baselines"].get(f"product alone of {name}")
        if alone is not None:
            ratio = seconds / alone.median
            verdict = "PASS" if ratio <= 1.10 else "MISS"
            claim = f"{name}: encode at most 1.10x its product alone"
            yield f"{verdict}  {where}: {claim}: {ratio:.3f}x"
    ratio = record["others"]["F.linear + topk"].median / min(ours.values())
    verdict = "PASS" if ratio >= 2 else "MISS"
    yield f"{verdict}  {where}: encode at least 2x F.linear + topk: {ratio:.2f}x"


def run(
    shape: tuple[int, int, int, int], name: str, args: argparse.Namespace
) -> list[dict[str, Any]]:
    case = Case(*shape, name, DTYPES[name], args.data)
    print(f"\nN={case.N} d={case.d} F={case.F} k={case.k} {name}, data {args.data}", flush=True)
    limit = costs.ceilings(256, 96, 1024) if args.small else costs.ceilings(rounds=3)
    print(limit)
    records = [measure(c, args.rounds, limit, case) for c in comparisons(case, limit)]
    header = ["op", "way", "ms", "quartiles", "time / ksae", "GB/s", "GFLOP/s", "of ceiling"]
    print(table(header, [row for record in records for row in rows(record)]))
    for record in records:
        if case.N >= 1024:
            for line in verdicts(record):
                print(line)
        for remark in [*record["remarks"], *(f"RESULTS DIFFER: {w}" for w in record["wrong"])]:
            print(f"{record['op']}: {remark}")
    return records


@torch.no_grad()
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--shape", action="append", metavar="N,d,F,k", help="default: those of the README")
    add("--small", action="store_true", help="small shapes, to see that everything runs")
    add("--dtype", action="append", choices=list(DTYPES), help="default: all")
    add("--threads", type=int, default=2, help="default %(default)s")
    add("--rounds", type=int, default=15, help="interleaved (default %(default)s)")
    add("--data", default="normal", help="normal, planted or a .npy file (default %(default)s)")
    add("--json", metavar="PATH", help="write the results there")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    shapes = [tuple(map(int, s.split(","))) for s in args.shape or []]
    record = machine(data=args.data, rounds=args.rounds, cache="hot where inputs fit")
    print(describe(record))
    records: list[dict[str, Any]] = []
    for shape in shapes or (SMALL if args.small else SHAPES):
        for name in args.dtype or DTYPES:
            records += run(shape, name, args)
    write_json(args.json, {"machine": record, "ops": records})
    return 1 if any(r["wrong"] for r in records) else 0


if __name__ == "__main__":
    sys.exit(main())
