# SPDX-License-Identifier: Apache-2.0
"""The dashboard of a saved model: its language model and text, from its run or from options."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ksae.activations import ArraySource, LanguageModel
from ksae.activations.progress import Progress
from ksae.analysis import exports
from ksae.analysis.dashboard import Dashboard, Options, build, read_labels
from ksae.analysis.dashboard.folder import check
from ksae.coders.coder import SparseCoder
from ksae.errors import UserError
from ksae.runs.config import DataConfig
from ksae.runs.data import load_lm, read_text
from ksae.runs.evaluation import about, run_config, with_data


def data_of(path: Path, given: Mapping[str, object]) -> DataConfig:
    """Language model, hook and text of the run at `path`, with those given in place of its own."""
    run = run_config(path)
    data = run.data if run is not None else DataConfig()
    config = with_data(data, given)
    for key in ("model", "hook", "text"):
        if getattr(config, key) is None:
            of_run = "the run does not name it" if run is not None else f"{path} is in no run"
            raise UserError(f"dashboard: --{key} must be given: {of_run}")
    return config


def title_of(path: Path) -> str:
    """The name of a run's folder, or of a file that is in none."""
    folders = [path, path.parent, path.parent.parent]
    found = [folder for folder in folders if (folder / "run.yaml").is_file()]
    return (found[0] if found else path).resolve().name


def dashboard(
    coder: SparseCoder,
    config: DataConfig,
    out: Path,
    *,
    labels: Path | None = None,
    tokens: int = 131_072,
    top: int = 12,
    title: str = "ksae",
    progress: bool = True,
    language_model: LanguageModel | None = None,
    source: ArraySource | None = None,
) -> Dashboard:
    """Make the pages from the text of a configuration.

    Args:
        labels: a JSON file, see `read_labels`.
        tokens: of the text that are read, spread evenly over it.
        language_model: the one that config names, where it is loaded.
        source: the activations of the text that a run trains on, where they are at hand: then all
            of these are read, and no others.
    """
    named = {} if labels is None else read_labels(labels, coder.d_sae)
    check(out)  # before the long work
    assert config.hook is not None
    lm = language_model or load_lm(config)
    contexts = read_text(config, lm, progress)
    if source is None:
        contexts = about(contexts, tokens)
    elif config.holdout > 0:
        contexts = contexts.split(config.holdout)[0]
    with Progress(int(contexts.mask().sum()), "dashboard", shown=progress) as bar:
        return build(
            coder,
            lm.model,
            lm.tokenizer,
            contexts,
            config.hook,
            out,
            target_hook=config.target_hook,
            labels=named,
            title=title,
            options=Options(top=top),
            source=source,
            progress=bar.update,
        )


def export(
    pages: Path, config: DataConfig, *, neuronpedia: Path | None, saedashboard: Path | None
) -> list[Path]:
    """A finished dashboard in the formats of other tools, in folders that are given."""
    assert config.model is not None
    model, written = Path(config.model).name, []
    if neuronpedia is not None:
        written.append(exports.neuronpedia(pages, neuronpedia, model=model))
    if saedashboard is not None:
        exports.saedashboard(pages, saedashboard, model=model)
        written.append(saedashboard)
    return written


def summary(made: Dashboard) -> str:
    """What is said of a finished dashboard."""
    return (
        f"{made.fired:,} of {made.latents:,} latents fire on {made.tokens:,} tokens, "
        f"{made.bytes / 1e6:.0f} MB\nopen      {made.page}"
    )
