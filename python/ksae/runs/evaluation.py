# SPDX-License-Identifier: Apache-2.0
"""Evaluating a saved model: its data, its reconstruction, and what it costs a language model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from ksae.activations import (
    ActivationSource,
    Contexts,
    LanguageModel,
    harvest,
)
from ksae.activations.progress import Progress
from ksae.analysis.evaluate import Evaluation, evaluate, evaluate_language_model
from ksae.analysis.steering import latents_by_rate, logit_shift, matched_latents
from ksae.coders.coder import SparseCoder
from ksae.errors import UserError
from ksae.runs import config as runconfig
from ksae.runs.checks import check_widths
from ksae.runs.config import DataConfig
from ksae.runs.data import (
    hold_out,
    load_lm,
    open_data,
    open_files,
    origin_of,
    origin_of_model,
    probe,
    read_text,
)

TRAINED_ON = "training tokens (the run held nothing out)"
LOGITS_AT_ONCE = 2**25  # 128 MiB of float32; three such tensors live at once


@dataclass(frozen=True)
class EvalData:
    """The activations of an evaluation, and the language model and text they came from if there is
    one."""

    source: ActivationSource
    language_model: LanguageModel | None = None
    contexts: Contexts | None = None
    origin: dict[str, str] = field(default_factory=dict)  # by the names of data.ORIGIN
    what: str = "tokens"  # what its rows are: held-out, of the training data, or others


def run_config(path: Path) -> runconfig.RunConfig | None:
    """The configuration of a run; `path` is its folder, its model or one of its checkpoints."""
    folders = [path, path.parent, path.parent.parent]
    found = [folder / "run.yaml" for folder in folders if (folder / "run.yaml").is_file()]
    return runconfig.read(found[0]) if found else None


def open_eval_data(
    config: DataConfig,
    *,
    held_out: bool,
    tokens: int,
    gradient: bool = False,
    progress: bool = True,
    fits: Callable[[ActivationSource], None] | None = None,
) -> EvalData:
    """What an evaluation reads.

    Args:
        config: where the activations, or the language model and the text, are.
        held_out: take the share that a run of this config kept from training, or all of its data if
            it kept none; otherwise everything.
        tokens: rows wanted; about as many are harvested.
        gradient: harvest the gradients on the text's labels too.
        fits: as in `open_data`.
    """
    what = "tokens"
    if held_out:
        what = "held-out tokens" if config.holdout > 0 else TRAINED_ON
    if config.activations is not None:
        if held_out and config.holdout > 0:
            data = open_data(config)
            assert data.holdout is not None
            source, origin = data.holdout, data.origin
        else:
            whole, held = open_files(config.activations, config.targets)
            source = whole if held is None or held_out else held
            origin = origin_of(source)
        if fits is not None:
            fits(source)
        return EvalData(source, origin=origin, what=what)
    for key in ("model", "hook", "text"):
        if getattr(config, key) is None:
            raise UserError(
                f"eval: {key} must be given where there is no file of activations, got none"
            )
    assert config.model is not None and config.hook is not None
    lm = load_lm(config)
    contexts = read_text(config, lm, progress)
    if held_out and config.holdout > 0:
        contexts = hold_out(config, contexts)[1]
    contexts = about(contexts, tokens)
    loss = "labels" if gradient else None
    if fits is not None:
        fits(probe(lm, contexts, config, loss))
    rows = harvest(
        lm.model,
        contexts,
        config.hook,
        target_hook=config.target_hook,
        gradient=loss,
        progress=progress,
    )
    return EvalData(rows, lm, contexts, origin_of_model(config, lm), what)


def about(contexts: Contexts, tokens: int) -> Contexts:
    """Contexts that hold about `tokens` usable tokens, spread evenly over the text; or all."""
    usable = int(contexts.mask().sum())
    if usable <= tokens:
        return contexts
    count = max(1, round(len(contexts) * tokens / usable))
    return contexts.select(torch.arange(count) * len(contexts) // count)


def measure(
    model: SparseCoder,
    source: ActivationSource,
    *,
    tokens: int,
    batch_size: int = 2048,
    oracle: bool = False,
    progress: bool = False,
) -> Evaluation:
    """Reconstruction and sparsity on the first `tokens` rows of a source of the model's widths;
    `oracle`: where latents are selected with the source's gradients."""
    check_widths(model, source, "eval")
    tokens = min(tokens, source.num_tokens or tokens)
    with Progress(tokens, "evaluation", shown=progress) as shown:
        if oracle:
            return evaluate(model, shown.over(source.gradient_sweep(batch_size)), max_tokens=tokens)
        stream = shown.over(source.sweep(batch_size))
        return evaluate(model, (x if y is None else (x, y) for x, y in stream), max_tokens=tokens)


def measure_language_model(
    model: SparseCoder,
    language_model: LanguageModel,
    contexts: Contexts,
    config: DataConfig,
    *,
    tokens: int,
    progress: bool = True,
) -> dict[str, float]:
    """`LM_DEFINITIONS` on about `tokens` tokens, for a model that can select with
    gradients ORACLE_DEFINITIONS too; {} for an encoder model."""
    lm = language_model.model
    if not predicts(language_model):
        return {}
    assert config.hook is not None
    contexts = about(contexts, tokens)
    head = lm.get_output_embeddings()  # type: ignore[operator]
    at_once = max(1, LOGITS_AT_ONCE // (contexts.ids.shape[1] * int(head.weight.shape[0])))
    with Progress(contexts.num_tokens, "cross-entropy", shown=progress) as shown:
        return evaluate_language_model(
            model,
            lm,
            _lm_batches(contexts, at_once),
            config.hook,
            target_hook=config.target_hook,
            exclude=contexts.special_ids,
            oracle=model.needs_gradient,
            progress=shown.update,
        )


def predicts(language_model: LanguageModel) -> bool:
    """Whether the model has a head that predicts tokens, which encoders lack."""
    head = getattr(language_model.model, "get_output_embeddings", lambda: None)()
    return head is not None


def why_no_cross_entropy(data: EvalData) -> str | None:
    """Why an evaluation on `data` has no cross-entropy; None if it has."""
    if data.language_model is None:
        return "a file of activations has no language model; give --model, --hook and --text"
    if not predicts(data.language_model):
        return f"{data.language_model.name} is an encoder without a head that predicts tokens"
    return None


def _lm_batches(contexts: Contexts, at_once: int) -> Iterator[tuple[Tensor, Tensor]]:
    attended = contexts.attended()
    for begin in range(0, len(contexts), at_once):
        part = slice(begin, begin + at_once)
        width = int(contexts.lengths[part].max())
        yield contexts.ids[part, :width].long(), attended[part, :width].long()


def steering(
    models: Sequence[SparseCoder],
    language_model: LanguageModel,
    contexts: Contexts,
    config: DataConfig,
    source: ActivationSource,
    *,
    latents: int,
    tokens: int = 256,
) -> dict[str, float]:
    """Mean shift of the logits when a latent's direction is added to the activation, with the
    mean length of an activation (see `ksae.analysis.steering.logit_shift`).

    One model: by decade of the firing rate, `latents` of each. Two: of `latents` each, matched by
    firing rate, "steering" and "steering_against". {} for an encoder model.
    """
    lm = language_model.model
    if not predicts(language_model):
        return {}
    assert config.hook is not None
    hook = config.target_hook or config.hook
    rates = [measure(model, source, tokens=source.num_tokens or 2**30) for model in models]
    found = [rate.frequency for rate in rates]
    if len(models) == 1:
        decades = latents_by_rate(found[0], latents)
        chosen = [(f"steering_{name}", models[0], at) for name, at in decades.items()]
    else:
        pair = matched_latents(found, latents)
        names = ("steering", "steering_against")
        chosen = list(zip(names, models, pair, strict=True))
    lengths = torch.cat(
        [(x if y is None else y).double().norm(dim=1) for x, y in source.sweep(2048)]
    )
    text = list(_lm_batches(about(contexts, tokens), 8))
    return {
        name: float(
            logit_shift(
                model,
                lm,
                text,
                hook,
                at,
                float(lengths.mean()),
                exclude=contexts.special_ids,
            ).mean()
        )
        for name, model, at in chosen
        if len(at)
    }


def with_data(config: DataConfig, settings: Mapping[str, object]) -> DataConfig:
    """`config` with some keys set; a file and a language model replace each other."""
    given = {key: value for key, value in settings.items() if value is not None}
    if "activations" in given:
        config = replace(
            config,
            model=None,
            hook=None,
            target_hook=None,
            text=None,
            targets=None,
            unquoted=False,
        )
    elif given.keys() & {"model", "hook", "text"}:
        config = replace(config, activations=None, targets=None)
    return replace(config, **given)  # type: ignore[arg-type]


def table(metrics: Mapping[str, float], names: Mapping[str, str]) -> str:
    """Lines `label  value` for the metrics that are there; shares are shown as percentages."""
    rows = [(label, _show(name, metrics[name])) for name, label in names.items() if name in metrics]
    width = max((len(label) for label, _ in rows), default=0)
    return "\n".join(f"  {label:<{width}}  {value:>9}" for label, value in rows)


def _show(name: str, value: float) -> str:
    if math.isnan(value):
        return "-"
    if name.removesuffix("_oracle") in ("dead", "ce_recovered", "kl_recovered"):
        return f"{value:.1%}"
    return f"{value:.2f}" if name.removesuffix("_oracle") == "l0" else f"{value:.4g}"
