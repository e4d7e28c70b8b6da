# SPDX-License-Identifier: Apache-2.0
"""How many of the true features training finds: SynthSAEBench-16k (arXiv 2602.14687).

    python -m ksae.bench.studies.synth --cache bench/cache/synth --out bench/results

A cell is library x activation x learning rate x seed: a coder with 4096 latents and L0 = 25 on
batches of 1024 fresh samples, the same for every library, from its library's own start. At each
checkpoint it is measured on held-out samples, one function for all. The state at the last
checkpoint is kept, so that a study goes on where it was stopped; a cell that fails is a row that
says why. See bench/README.md.
"""

from __future__ import annotations

import argparse
import pickle
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, astuple, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from ksae.activations.synthetic import SyntheticSource, World, WorldConfig
from ksae.analysis.ground_truth import compare_with_truth, mean_correlation
from ksae.coders import SAE, BatchTopK, TopK
from ksae.coders.initialize import initialize_from
from ksae.errors import failure
from ksae.files.atomic import write_atomic
from ksae.step.train_step import TrainStep

from ..contestants import peers
from ..contestants.workers import missing
from ..harness.data import Weights, fill
from ..harness.measure import describe, machine, write_json
from . import synth_report
from .store import stored

WIDTH, L0 = 4096, 25
BATCH = 1024
ACTIVATIONS = ("topk", "batch_topk", "matryoshka")
PREFIXES = (128, 512, 2048, WIDTH)  # of matryoshka, whose losses are summed
PLACE = ("library", "activation", "lr", "seed")  # the fields of a cell
DEAD_AFTER = 1000 * BATCH  # samples; SAELens' window


@dataclass(frozen=True)
class Cell:
    library: str
    activation: str
    lr: float
    seed: int


class Ksae:
    """An SAE of ksae and its training step, as `ksae train` starts and takes them."""

    version = ""
    scale = 0.1  # of the encoder at the start
    step_options: ClassVar[dict[str, Any]] = {"clip": "always"}

    def __init__(self, cell: Cell, d: int, sample: Tensor) -> None:
        torch.manual_seed(cell.seed)
        options: dict[str, Any] = {}
        if cell.activation == "matryoshka":
            options = {"prefixes": prefixes(), "prefix_weights": "sum"}
        kind = TopK(L0) if cell.activation == "topk" else BatchTopK(L0)
        self.model = SAE(d, WIDTH, kind, dead_after=DEAD_AFTER, **options)
        initialize_from(self.model, sample, encoder_scale=self.scale)
        self.trainer = TrainStep(self.model, cell.lr, clip_norm=1.0, **self.step_options)

    def step(self, x: Tensor) -> None:
        self.trainer(x)

    def weights(self) -> Weights:
        return {name: p.detach() for name, p in self.model.named_parameters()}

    def state(self) -> Any:
        return self.model.state_dict(), self.trainer.state_dict()

    def load(self, state: Any) -> None:
        self.model.load_state_dict(state[0])
        self.trainer.load_state_dict(state[1])


class Plain(Ksae):
    """The same from a tied start, with one rate and without clipping: norms stay below 1."""

    scale = 1.0
    step_options: ClassVar[dict[str, Any]] = {"decoder_lr": 1.0}


class SaeLens:
    """sae-lens: `SAETrainer.step` of its training SAE, its defaults."""

    def __init__(self, cell: Cell, d: int, sample: Tensor) -> None:
        if (reason := missing("sae-lens")) is not None:
            raise ImportError(reason)
        import sae_lens
        from sae_lens.config import SAETrainerConfig
        from sae_lens.training.sae_trainer import SAETrainer

        torch.manual_seed(cell.seed)
        self.version = sae_lens.__version__
        kinds = {"topk": "TopK", "batch_topk": "BatchTopK", "matryoshka": "MatryoshkaBatchTopK"}
        name = kinds[cell.activation] + "TrainingSAE"
        options: dict[str, Any] = {"d_in": d, "d_sae": WIDTH, "k": L0}
        if cell.activation == "matryoshka":
            options["matryoshka_widths"] = list(prefixes())
        self.sae = getattr(sae_lens, name)(getattr(sae_lens, name + "Config")(**options))
        config = SAETrainerConfig(
            total_training_samples=10**9, train_batch_size_samples=BATCH, lr=cell.lr, lr_end=cell.lr
        )
        self.trainer = SAETrainer(config, self.sae, data_provider=iter(()))

    def step(self, x: Tensor) -> None:
        self.trainer.maybe_reset_sparsity()
        self.trainer.step(x)
        self.trainer.n_training_steps += 1  # as its fit() does

    def weights(self) -> Weights:
        return peers.folded(self.sae)

    def state(self) -> Any:
        t = self.trainer
        counts = {name: getattr(t, name) for name in _COUNTS}
        return self.sae.state_dict(), t.optimizer.state_dict(), t.lr_scheduler.state_dict(), counts

    def load(self, state: Any) -> None:
        self.sae.load_state_dict(state[0])
        self.trainer.optimizer.load_state_dict(state[1])
        self.trainer.lr_scheduler.load_state_dict(state[2])
        for name, value in state[3].items():
            setattr(self.trainer, name, value)


_COUNTS = (
    "n_training_samples", "n_training_steps", "act_freq_scores", "n_forward_passes_since_fired",
    "n_frac_active_samples",
)  # fmt: skip
LIBRARIES: dict[str, type] = {"ksae": Ksae, "ksae, plain": Plain, "sae-lens": SaeLens}


def prefixes() -> tuple[int, ...]:
    return (*(width for width in PREFIXES if width < WIDTH), WIDTH)


def measure(weights: Weights, activation: str, source: SyntheticSource) -> dict[str, float]:
    """The benchmark's metrics; codes are selected from whole batches where training does that."""
    kind = TopK(L0) if activation == "topk" else BatchTopK(L0)  # without a threshold: by batch
    model = SAE(weights["b_dec"].numel(), WIDTH, kind)
    fill(model, weights)
    found = compare_with_truth(model, source, batch_size=BATCH)
    return found | {"mcc": mean_correlation(model.W_dec.detach(), source.world.directions)}


def world_of(cache: Path, config: WorldConfig) -> World:
    """The world of `config`, from `cache` if it has been made."""
    path = cache / f"world_{config.features}_{config.seed}.pickle"
    if path.exists():
        world = pickle.loads(path.read_bytes())
        if isinstance(world, World) and world.config == config:
            return world
    world = World(config)
    cache.mkdir(parents=True, exist_ok=True)
    write_atomic(path, lambda file: file.write(pickle.dumps(world)))
    return world


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    add = parser.add_argument
    add("--cache", type=Path, default=Path("bench/cache/synth"), help="default %(default)s")
    add("--out", type=Path, default=Path("bench/results"), help="default %(default)s")
    add("--libraries", nargs="+", choices=list(LIBRARIES), default=["ksae", "sae-lens"])
    add("--activations", nargs="+", choices=ACTIVATIONS, default=list(ACTIVATIONS))
    add("--lrs", type=float, nargs="+", default=[3e-4], help="default %(default)s, the paper's")
    add("--seeds", type=int, nargs="+", default=[0], help="default %(default)s")
    add("--samples", type=int, default=20_000_000, help="to train on (default %(default)s)")
    add("--every", type=int, default=250_000, help="samples to a checkpoint (default %(default)s)")
    add("--held-out", type=int, default=65_536, help="samples to measure on (default %(default)s)")
    add("--threads", type=int, default=2, help="default %(default)s")
    add("--report", action="store_true", help="only write the table and the plot of what is there")
    return parser.parse_args(argv)


def cells(args: argparse.Namespace) -> Iterator[Cell]:
    for seed in args.seeds:
        for lr in args.lrs:
            for activation in args.activations:
                for library in args.libraries:
                    yield Cell(library, activation, lr, seed)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "synth_study.json"
    settings = {"width": WIDTH, "L0": L0, "batch": BATCH, "held_out": args.held_out}
    record = stored(path, settings, "rows")
    if not args.report:
        if find_spec("scipy") is None:
            raise SystemExit("the MCC needs scipy: pip install scipy")
        work(record, path, args)
    synth_report.write(record, args.out)
    return 0


def work(record: dict[str, Any], path: Path, args: argparse.Namespace) -> None:
    """Take every cell to `--samples`."""
    world = world_of(args.cache, WorldConfig())
    source = SyntheticSource(world, held_out=args.held_out)
    for cell in cells(args):
        try:
            for row in train(cell, source, record, args):
                add(record, path, asdict(cell) | row)
        except Exception as error:  # of whatever another library does
            add(record, path, asdict(cell) | {"failure": failure(error)})


def train(
    cell: Cell, source: SyntheticSource, record: dict[str, Any], args: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """Steps from the last checkpoint on; a row at each of those that come."""
    every, steps = max(1, args.every // BATCH), args.samples // BATCH
    done = max((row["samples"] for row in of_cell(record, cell)), default=0) // BATCH
    if done >= steps:
        return
    sample = next(source.batches(8 * BATCH, seed=cell.seed + 1_000_000))[0]
    run = LIBRARIES[cell.library](cell, source.d_in, sample)
    kept = args.cache / ("-".join(str(part) for part in astuple(cell)) + ".pt")
    if done:
        run.load(torch.load(kept, weights_only=False))
    begin = time.perf_counter()
    for t, (x, _) in enumerate(source.batches(BATCH, seed=cell.seed, start_step=done), done + 1):
        run.step(x)
        if t % every == 0 or t == steps:
            row: dict[str, Any] = {
                "samples": t * BATCH,
                "seconds": round(time.perf_counter() - begin),
            }
            row |= {"version": run.version} if run.version else machine()
            row |= measure(run.weights(), cell.activation, source)
            write_atomic(kept, lambda file: torch.save(run.state(), file))
            yield row
        if t == steps:
            return


def of_cell(record: dict[str, Any], cell: Cell) -> list[dict[str, Any]]:
    """Its checkpoints."""
    own = asdict(cell)
    rows = [row for row in record["rows"] if all(row[name] == own[name] for name in own)]
    return [row for row in rows if "failure" not in row]


def add(record: dict[str, Any], path: Path, row: dict[str, Any]) -> None:
    """Write a row; it takes the place of what failed before."""
    cell = astuple(Cell(*(row[name] for name in PLACE)))
    kept = [
        old
        for old in record["rows"]
        if "failure" not in old or tuple(old[name] for name in PLACE) != cell
    ]
    record["rows"] = [*kept, row]
    write_json(path, record)
    print(describe(row), flush=True)


if __name__ == "__main__":
    sys.exit(main())
