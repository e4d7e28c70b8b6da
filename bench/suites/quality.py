# SPDX-License-Identifier: Apache-2.0
"""Suite `quality`: what training reaches on real activations, and after what time.

Residual stream after layer 9 of SmolLM2-135M over the help topics of Python, as in `ksae demo`. All
contestants start from the same weights and see the same batches at the same learning rate, in
lock-step. FVU and dead latents are taken on held-out rows, from the weights, by one function.
"""

from __future__ import annotations

import contextlib
import io
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ksae import ops
from ksae.coders.initialize import geometric_median
from ksae.errors import UserError, failure

from ..contestants import ours, peers
from ..contestants.workers import missing
from ..harness import data
from ..harness.data import Weights
from ..harness.record import Row
from ..harness.session import Session

HOOK = "layers.9.resid_post"
CHUNK = 4096
LR = 2e-3
CHECKS = 12  # times that the held-out FVU is taken during a run
NEAR = 1.1  # "time to": until the FVU is this much of what dense torch reaches in the end
SETTINGS = {  # tokens a step, latents, k, steps, held-out rows while training
    "tiny": (32, 64, 4, 6, 64),
    "quick": (256, 2304, 32, 36, 2048),
    "full": (1024, 4608, 32, 200, 8192),
}
WAYS: dict[str, Callable[..., ours.Contestant]] = {
    "ksae fp32": ours.Ksae,
    "ksae bf16 weights": lambda *a: ours.Ksae(*a, dtype=torch.bfloat16),
    "ksae fp32, unfused": lambda *a: ours.Ksae(*a, fused=False),
    "dense torch": ours.Dense,
    "eai-sparsify": peers.Sparsify,
    "sae-lens": peers.SaeLens,
    "dictionary-learning": peers.DictionaryLearning,
    "overcomplete": peers.Overcomplete,
}


def activations(cache: Path, harvest: bool) -> tuple[Tensor, Tensor]:
    """Rows to train on and held-out rows [rows, d], from .npy files or harvested into them.

    Raises:
        FileNotFoundError: there are none and `harvest` is False.
    """
    files = [cache / f"{part}.npy" for part in ("train", "holdout")]
    if not all(file.exists() for file in files):
        if not harvest:
            raise FileNotFoundError(
                f"no activations in {cache}: `ksae bench --full --suite quality` harvests them"
            )
        _harvest(files)
    train, held = (torch.from_numpy(np.load(file)) for file in files)
    return train, held


def _harvest(files: list[Path]) -> None:
    from ksae.activations import PYDOC, SMOLLM2
    from ksae.runs.config import DataConfig
    from ksae.runs.data import open_data

    config = DataConfig(model=SMOLLM2, hook=HOOK, text=PYDOC, holdout=0.1)
    sources = open_data(config)
    files[0].parent.mkdir(parents=True, exist_ok=True)
    for file, source in zip(files, (sources.train, sources.holdout), strict=True):
        assert source is not None
        np.save(file, torch.cat([x for x, _ in source.sweep(CHUNK)]).float().numpy())


def start_of(F: int, train: Tensor, seed: int) -> Weights:
    """Tied unit rows; b_dec is the geometric median of a sample, as ksae.initialize sets it."""
    start = data.initial_weights(F, train.shape[1], seed)
    return start | {"b_dec": geometric_median(train[: 2 * CHUNK])}


@torch.no_grad()
def measure(weights: Weights, k: int, rows: Tensor) -> tuple[float, float]:
    """sum (x - recon)^2 / sum (x - mean x)^2 over all rows, and the share of latents never used."""
    error = 0.0
    fired = torch.zeros(len(weights["b_enc"]), dtype=torch.bool)
    for x in torch.split(rows, CHUNK):
        values, indices = ops.topk_encode(
            x, weights["W_enc"], weights["b_enc"], k, weights["b_dec"]
        )
        recon = ops.sparse_decode(values, indices, weights["W_dec"], weights["b_dec"])
        error += float((recon - x).double().square().sum())
        fired[indices[values > 0]] = True
    return error / data.total_variance(rows), 1 - float(fired.float().mean())


def batches(train: Tensor, size: int, steps: int, seed: int) -> list[Tensor]:
    """Row numbers of each step: epochs of random permutations, cut into batches."""
    generator = torch.Generator().manual_seed(seed)
    epochs = -(-steps * size // len(train))
    rows = torch.cat([torch.randperm(len(train), generator=generator) for _ in range(epochs)])
    return list(torch.split(rows[: steps * size], size))


def run(session: Session) -> None:
    """Fill a row for each contestant: its steps' times, and its curve in `extra`."""
    mode = "tiny" if session.tiny else "quick" if session.quick else "full"
    size, F, k, steps, some = SETTINGS[mode]
    try:
        train, held = _rows(session)
    except (OSError, ValueError, ImportError, UserError) as error:
        session.add(Row("quality", "real activations", "train", "train", "all", failure=str(error)))
        return
    shape = {"N": size, "d": train.shape[1], "F": F, "k": k}
    case = " ".join(f"{name}={value}" for name, value in shape.items())
    start = start_of(F, train, seed=0)
    rows, contestants = _contestants(session, start, k, shape, case)
    clock = dict.fromkeys(contestants, 0.0)
    blocks: dict[str, list[float]] = {name: [] for name in contestants}
    every = max(1, steps // CHECKS)
    done = 0
    for number, chosen in enumerate(batches(train, size, steps, seed=0), 1):
        x = train[chosen]
        for name, contestant in contestants.items():
            begin = time.perf_counter()
            with contextlib.redirect_stdout(io.StringIO()):
                contestant.step(x)
            taken = time.perf_counter() - begin
            clock[name] += taken
            blocks[name].append(taken)
        done = number
        late = session.left() < 0
        if number % every == 0 or number == steps or late:
            for name, contestant in contestants.items():
                fvu, dead = measure(contestant.weights(), k, held[:some])
                rows[name].extra["curve"].append([number, round(clock[name], 4), fvu, dead])
                rows[name].blocks.append(blocks[name])
                blocks[name] = []
            session.tick(f"step {number} of {steps}")
            if late:
                break
    cut = "" if done == steps else f", cut from {steps} by the time"
    session.note(
        f"{case}, {done} steps{cut}, lr {LR:g}, seed 0, {len(train)} rows to train on, "
        f"{len(held)} held out"
    )
    session.suite.facts["target_fvu"] = _finish(rows, contestants, k, held)


def _rows(session: Session) -> tuple[Tensor, Tensor]:
    if session.tiny:
        return tuple(data.batches("planted", 256, 16, 2))  # type: ignore[return-value]
    return activations(session.cache, harvest=not session.quick)


def _contestants(
    session: Session, start: Weights, k: int, shape: dict[str, int], case: str
) -> tuple[dict[str, Row], dict[str, ours.Contestant]]:
    """All that can be made; a row for the others as well, with the reason."""
    rows: dict[str, Row] = {}
    contestants: dict[str, ours.Contestant] = {}
    for name, make in WAYS.items():
        session.tick(f"making {name}")
        row = rows[name] = session.add(
            Row(
                "quality",
                case,
                "train",
                "train",
                name,
                ours=name.startswith("ksae"),
                anchor="dense torch",
                shape=shape,
                dtype="bf16" if "bf16" in name else "fp32",
                failure=missing(name),
                extra={"curve": []},
            )
        )
        if row.failure is not None:
            continue
        own = start
        if name == "overcomplete":  # it has no b_dec
            own = start | {"b_dec": torch.zeros_like(start["b_dec"])}
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                contestants[name] = make(own, k, LR)
        except Exception as error:  # whatever another library does is its row's affair
            row.failure = failure(error)
            continue
        row.extra |= {"version": contestants[name].version, "note": contestants[name].note}
    return rows, contestants


def _finish(
    rows: dict[str, Row], contestants: dict[str, ours.Contestant], k: int, held: Tensor
) -> float | None:
    """Final numbers on all held-out rows, and when each came near to what dense torch reached."""
    for name, contestant in contestants.items():
        fvu, dead = measure(contestant.weights(), k, held)
        rows[name].extra |= {"fvu": fvu, "dead": dead}
    curve = rows["dense torch"].extra.get("curve") or []
    if not curve:
        return None
    target = NEAR * float(curve[-1][2])
    for name in contestants:
        reached = [seconds for _, seconds, fvu, _ in rows[name].extra["curve"] if fvu <= target]
        rows[name].extra["seconds_to_target"] = reached[0] if reached else None
    return target
