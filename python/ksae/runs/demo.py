# SPDX-License-Identifier: Apache-2.0
"""`ksae demo`: the whole job on a small language model from pip, offline, in a few minutes.

SmolLM2-135M reads the help topics of Python's own documentation (about 113 000 tokens); a TopK SAE
learns the residual stream after layer 9 (d = 576). Every context starts with a special token, the
model's attention sink; its activation, unlike all others, is neither trained on nor replaced in the
evaluation.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch

from ksae.activations import PYDOC, SMOLLM2, ActivationSource, ArraySource, LanguageModel
from ksae.activations.progress import Progress
from ksae.analysis import plots
from ksae.analysis.dashboard import Dashboard
from ksae.analysis.dashboard.folder import check
from ksae.analysis.top_contexts import encode_rows, telling_latents, top_contexts
from ksae.coders.coder import SparseCoder
from ksae.errors import UserError
from ksae.files.atomic import write_atomic
from ksae.runs import checkpoint
from ksae.runs import config as runconfig
from ksae.runs.config import DataConfig, LogConfig, RunConfig, TrainConfig
from ksae.runs.dashboard import dashboard
from ksae.runs.data import RunData
from ksae.runs.directory import open_directory
from ksae.runs.evaluation import measure_language_model, table
from ksae.runs.model import build_model
from ksae.runs.model_config import ModelConfig
from ksae.runs.signals import Interrupted
from ksae.runs.start import compare_early, open_run_data
from ksae.runs.trainer import Trainer, TrainResult

HOOK = "layers.9.resid_post"
CE_TOKENS = 4096


def configure(
    out: Path, *, tokens: int, d_sae: int, k: int, seed: int, threads: int | None
) -> RunConfig:
    """The run of the demo; `out`/sae/run.yaml shows it and `ksae train` can do it too.

    Raises:
        UserError: sizes that no run can have.
    """
    batch_size = 1024
    steps = max(1, round(tokens / batch_size))
    config = RunConfig(
        out=str(out / "sae"),
        model=ModelConfig(d_sae=d_sae, k=k, dead_after=min(200_000, steps * batch_size // 4)),
        data=DataConfig(
            model=SMOLLM2,
            hook=HOOK,
            text=PYDOC,
            cache=str(out / "activations"),
            holdout=0.1,
            # help topics repeat whole sections of each other
            unquoted=True,
        ),
        train=TrainConfig(
            batch_size=batch_size,
            steps=steps,
            lr=2e-3,
            warmup=min(50, steps),
            decay=0.5,
            seed=seed,
            threads=threads,
            checkpoint_every=500,
        ),
        log=LogConfig(every=5),
    )
    return runconfig.fitted(config)


def demo(
    out: Path,
    *,
    tokens: int = 1_000_000,
    d_sae: int = 4608,
    k: int = 32,
    latents: int = 6,
    seed: int = 0,
    threads: int | None = None,
) -> dict[str, float]:
    """Harvest, train, evaluate, show. The results are printed, returned and kept in results.json.

    Args:
        out: folder of activations, model, pictures and results; an earlier call there is gone on
            with.
        tokens: to train on; the text is read many times.
        latents: how many latents to show contexts of; the dashboard shows all.
    """
    start = time.perf_counter()
    if not plots.available():
        raise UserError('demo: needs matplotlib: pip install "ksae[plots]"')
    config = configure(out, tokens=tokens, d_sae=d_sae, k=k, seed=seed, threads=threads)
    if threads is not None:
        torch.set_num_threads(threads)

    check(out / "dashboard")  # before the long work
    resume, restart = _open(config)

    _stage(start, f"activations of {SMOLLM2} at {HOOK} over the help topics of Python, in {out}")
    data = open_run_data(config)
    lm, held = data.language_model, data.holdout_contexts
    assert lm is not None and held is not None and data.holdout is not None
    assert isinstance(data.train, ArraySource)

    trained = config.train.steps * config.train.batch_size
    epochs = trained / len(_rows(data.train))
    _stage(start, f"training on {trained:,} tokens, {epochs:.1f} epochs")
    result = _train(config, data, resume, restart)

    _stage(start, "cross-entropy on held-out topics")
    costs = measure_language_model(result.model, lm, held, config.data, tokens=CE_TOKENS)

    if latents > 0:
        _stage(start, "what some latents respond to, in the training text")
        _show_contexts(result.model, data.train, lm, latents)

    _stage(start, "the dashboard: a page for each latent, on the training text")
    pages = _dashboard(result, config, data, out / "dashboard")

    seconds = time.perf_counter() - start
    results = _keep(out, result, costs, seconds=seconds, left_out=data.left_out)

    _stage(start, "results")
    topics = len(set(held.documents.tolist()))
    _print(result, costs, f"{topics} held-out topics, F = {d_sae}, k = {k}", data.left_out)
    print(f"dashboard {pages.page}: open it in a browser")
    print(f"all of it took {seconds:.0f} s with {torch.get_num_threads()} threads")
    return results


def _open(config: RunConfig) -> tuple[bool, bool]:
    """Make or open the folder of the run: whether to resume it, or to restart it."""
    folder = Path(config.out)
    resume = folder.is_dir() and checkpoint.latest(folder / "checkpoints") is not None
    restart = folder.is_dir() and not resume and any(folder.iterdir())  # stopped before the first
    newest = open_directory(folder, resume, restart)
    if newest is not None:
        compare_early(config, newest)
    return resume, restart


def _train(config: RunConfig, data: RunData, resume: bool, restart: bool) -> TrainResult:
    torch.manual_seed(config.train.seed)
    trainer = Trainer(
        build_model(config.model, data.train, dtype=config.train.dtype),
        data.train,
        config.train,
        out=config.out,
        resume=resume,
        restart=restart,
        log=config.log,
        holdout=data.holdout,
        run=config,
        origin=data.origin,
    )
    try:
        return trainer.run()
    except Interrupted:
        print("run the same command again to go on", file=sys.stderr)
        raise


def _dashboard(result: TrainResult, config: RunConfig, data: RunData, out: Path) -> Dashboard:
    assert isinstance(data.train, ArraySource)
    return dashboard(
        result.model,
        config.data,
        out,
        title="ksae demo",
        language_model=data.language_model,
        source=data.train,
    )


def _keep(
    out: Path, result: TrainResult, costs: dict[str, float], **more: float
) -> dict[str, float]:
    """Write results.json."""
    results = {**result.evaluation, **costs, "tokens": float(result.held_out_tokens), **more}
    text = json.dumps(results, indent=1) + "\n"
    write_atomic(out / "results.json", lambda file: file.write(text.encode()))
    return results


def _print(result: TrainResult, costs: dict[str, float], of: str, left_out: float) -> None:
    print(f"reconstruction of {result.held_out_tokens:,} tokens of {of}")
    print(f"({left_out:.0%} of the held-out tokens left out: they quote training text)")
    print(table(result.evaluation, RECONSTRUCTION))
    print(f"cross-entropy of {SMOLLM2} on {costs['ce_tokens']:,.0f} of them, nats a token")
    print(table(costs, COSTS))
    print(f"model     {result.model_path}")
    for path in result.plots:
        print(f"picture   {path}")


RECONSTRUCTION = {
    "fvu": "FVU (variance not explained)",
    "l0": "L0 (active latents a token)",
    "dead": "dead latents (never fired here)",
}
COSTS = {
    "ce_clean": "clean",
    "ce_sae": "with the SAE's reconstruction",
    "ce_zero": "zero-ablated",
    "ce_recovered": "recovered share",
}


def _rows(source: ActivationSource) -> range:
    assert source.num_tokens is not None
    return range(source.num_tokens)


def _show_contexts(model: SparseCoder, source: ArraySource, lm: LanguageModel, count: int) -> None:
    with Progress(len(_rows(source)), "encode") as shown:
        stream = shown.over(source.sweep(2048))
        values, indices = encode_rows(model, (x for x, _ in stream))
    ids, sequence, _ = source.tokens_of(torch.arange(len(_rows(source))))
    chosen = telling_latents(values, indices, ids, model.d_sae, count)
    found = top_contexts(values, indices, ids, sequence, chosen, n=4, before=10, after=4)
    fired = torch.bincount(indices[values > 0], minlength=model.d_sae)
    bold = ("\x1b[1;33m«", "»\x1b[0m") if sys.stdout.isatty() else ("«", "»")
    for latent, contexts in found.items():
        print(f"latent {latent}, fires on {int(fired[latent]) / len(values):.2%} of the tokens")
        for context in contexts:
            print(f"  {context.value:6.1f}  {context.text(lm.tokenizer.decode, bold)}")


def _stage(start: float, text: str) -> None:
    print(f"\n[{time.perf_counter() - start:4.0f} s] {text}", flush=True)
