# SPDX-License-Identifier: Apache-2.0
"""The data of a run, made from its configuration."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from ksae.activations import (
    ActivationSource,
    ArraySource,
    CacheSource,
    Contexts,
    LanguageModel,
    StreamSource,
    documents,
    harvest,
    load_model,
    model_fingerprint,
    open_source,
    tokenize,
)
from ksae.activations.cache import META
from ksae.activations.progress import say
from ksae.analysis.top_contexts import repeats
from ksae.errors import UserError
from ksae.parallel.ranks import Ranks
from ksae.runs.config import DataConfig

ORIGIN = ("model", "hook", "target_hook", "model_fingerprint")


@dataclass(frozen=True)
class RunData:
    """The sources of a run.

    language_model, holdout_contexts: where a language model makes the activations.
    origin: which model and hooks the activations are of, by the names of ORIGIN, as far as known.
    left_out: share of the held-out tokens that were left out, for they quote the training text.
    """

    train: ActivationSource
    holdout: ActivationSource | None
    language_model: LanguageModel | None = None
    holdout_contexts: Contexts | None = None
    origin: dict[str, str] = field(default_factory=dict)
    left_out: float = 0.0


def open_data(
    config: DataConfig,
    *,
    gradient: bool = False,
    progress: bool = True,
    fits: Callable[[ActivationSource], None] | None = None,
    ranks: Ranks | None = None,
) -> RunData:
    """Open files of activations, or harvest them from a language model over a text.

    Held out is a share of the documents, or the last rows of a file. Which ones does not depend
    on the run's seed, so that runs can be compared. `gradient` harvests the gradients of
    `config.gradient` too; a file has them or has not. `fits` raises if a source of the widths that
    the activations are to have is of no use; it is called before the harvest. `ranks` are processes
    that all call it and share the harvest.
    """
    if config.activations is not None:
        for key in ("model", "hook", "text", "exclude", "model_revision"):
            if getattr(config, key) is not None:
                raise UserError(
                    f"train: data.{key} must be left out where data.activations is given, "
                    f"got {getattr(config, key)!r}"
                )
        data = _open_files(config)
        if fits is not None:
            fits(data.train)
        return data
    for key in ("model", "hook", "text"):
        if getattr(config, key) is None:
            raise UserError(
                f"train: data.{key} must be given, or a file as data.activations, got neither"
            )
    return _harvest(config, gradient, progress, fits, ranks)


def open_files(path: str, targets: str | None = None) -> tuple[ArraySource, ArraySource | None]:
    """Activations on disk, and what was held out of them where `path` is the folder that a run
    kept its activations in (data.cache), which holds the caches train and holdout."""
    folder = Path(path)
    if not (folder / META).is_file() and (folder / "train" / META).is_file():
        if targets is not None:
            raise UserError(f"{path}: targets must be left out, the cache holds its own")
        train = open_source(folder / "train")
        held = open_source(folder / "holdout") if (folder / "holdout").is_dir() else None
        assert isinstance(train, ArraySource) and isinstance(held, ArraySource | None)
        return train, held
    source = open_source(path, targets)
    assert isinstance(source, ArraySource)  # files and cache folders always are
    return source, None


def origin_of(source: ActivationSource) -> dict[str, str]:
    """What a cache says about where its activations are from; {} for other sources."""
    identity = source.meta["identity"] if isinstance(source, CacheSource) else {}
    return {key: identity[key] for key in ORIGIN if identity.get(key) is not None}


def origin_of_model(config: DataConfig, lm: LanguageModel) -> dict[str, str]:
    """The same for activations that are harvested."""
    names = {"model": config.model, "hook": config.hook, "target_hook": config.target_hook}
    names["model_fingerprint"] = model_fingerprint(lm.model)
    return {key: value for key, value in names.items() if value is not None}


def _open_files(config: DataConfig) -> RunData:
    assert config.activations is not None
    source, held = open_files(config.activations, config.targets)
    origin = origin_of(source)
    if config.holdout == 0 or held is not None:
        return RunData(source, held if config.holdout > 0 else None, origin=origin)
    rows = source.num_tokens
    wanted = max(1, round(config.holdout * rows))
    if wanted >= rows:
        raise UserError(
            f"train: {source.name} must have more than {wanted} rows to hold out "
            f"data.holdout = {config.holdout}, got {rows}"
        )
    train, last = source.part(0, rows - wanted), source.part(rows - wanted, rows)
    return RunData(train, last, origin=origin)


def load_lm(config: DataConfig) -> LanguageModel:
    """The language model of a configuration."""
    assert config.model is not None
    return load_model(
        config.model,
        device="cuda" if torch.cuda.is_available() else "cpu",
        dtype=config.model_dtype,
        revision=config.model_revision,
    )


def read_text(config: DataConfig, lm: LanguageModel, progress: bool) -> Contexts:
    """The text of a configuration as contexts of the language model's tokens."""
    contexts = tokenize(
        documents(config.text, field=config.field, separator=config.separator),
        lm.tokenizer,
        length=config.context,
        bos=config.bos,
        max_tokens=config.max_tokens,
        exclude=config.exclude or (),
    )
    if progress:
        texts = len(set(contexts.documents.tolist()))
        say(f"text: {contexts.num_tokens:,} tokens, {texts:,} document{'s' * (texts != 1)}")
    return contexts


def hold_out(config: DataConfig, contexts: Contexts) -> tuple[Contexts, Contexts, float]:
    """Training text, held-out text, and the share of its tokens that config.unquoted left out."""
    train, held = contexts.split(config.holdout)
    if not config.unquoted:
        return train, held, 0.0
    # Documents repeat passages of each other, which no split by document can keep apart.
    used = held.mask()
    new = ~repeats(held.ids, used, train.ids[train.mask()])  # [contexts]
    if not bool(used[new].any()):
        raise UserError(
            "data.unquoted: at least one held-out context must quote no training text, got none"
        )
    return train, held.select(new), 1 - int(used[new].sum()) / int(used.sum())


def probe(
    lm: LanguageModel, contexts: Contexts, config: DataConfig, loss: str | None
) -> ActivationSource:
    """A source of one context, which shows the widths of the activations before the harvest."""
    assert config.hook is not None
    usable: Tensor = contexts.mask().any(1).nonzero()[:1, 0]
    few = contexts.select(usable if len(usable) else torch.tensor([0]))
    return StreamSource(
        lm.model, few, config.hook, target_hook=config.target_hook, gradient=loss, batch_size=1
    )


def _harvest(
    config: DataConfig,
    gradient: bool,
    progress: bool,
    fits: Callable[[ActivationSource], None] | None,
    ranks: Ranks | None,
) -> RunData:
    assert config.model is not None and config.hook is not None
    lm = load_lm(config)
    contexts = read_text(config, lm, progress)
    held: Contexts | None = None
    left_out = 0.0
    if config.holdout > 0:
        contexts, held, left_out = hold_out(config, contexts)
    loss = config.gradient if gradient else None
    if fits is not None:
        fits(probe(lm, contexts, config, loss))

    def rows(part: Contexts, name: str) -> ActivationSource:
        assert config.hook is not None
        if config.stream:
            return StreamSource(
                lm.model, part, config.hook, target_hook=config.target_hook, gradient=loss
            )
        return harvest(
            lm.model,
            part,
            config.hook,
            None if config.cache is None else Path(config.cache) / name,
            target_hook=config.target_hook,
            gradient=loss,
            progress=progress,
            model_name=config.model,
            ranks=ranks,
        )

    return RunData(
        rows(contexts, "train"),
        None if held is None else rows(held, "holdout"),
        lm,
        held,
        origin_of_model(config, lm),
        left_out,
    )
