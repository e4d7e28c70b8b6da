# SPDX-License-Identifier: Apache-2.0
"""Makes a dashboard: the pass over the text, what it is joined with, and the folder of pages."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ksae.activations import ArraySource, Contexts
from ksae.analysis.dashboard import folder
from ksae.analysis.dashboard.lens import embedding_match, logit_lens, why_no_lens
from ksae.analysis.dashboard.neighbours import nearest
from ksae.analysis.dashboard.records import Joined, index_columns, record, shown_tokens
from ksae.analysis.dashboard.survey import Survey, Window, survey
from ksae.analysis.dashboard.vocabulary import Vocabulary
from ksae.coders.coder import SparseCoder
from ksae.errors import UserError

CHUNK = 32  # latents of a file: about 200 kB


@dataclass(frozen=True)
class Options:
    """How much a latent's page shows."""

    top: int = 12  # contexts with the largest activations
    sample: int = 32  # firing tokens that quantiles and random contexts are drawn from
    tokens: int = 10  # at each end of the logit lens
    neighbours: int = 8
    window: Window = field(default_factory=Window)


@dataclass(frozen=True)
class Dashboard:
    """What was made."""

    page: Path  # to open
    latents: int
    fired: int  # latents that fired on the text
    tokens: int
    bytes: int


@torch.no_grad()
def build(
    coder: SparseCoder,
    model: nn.Module,
    tokenizer: Any,
    contexts: Contexts,
    hook: str,
    out: Path,
    *,
    target_hook: str | None = None,
    labels: Mapping[int, str] | None = None,
    title: str = "ksae",
    options: Options | None = None,
    source: ArraySource | None = None,
    progress: Callable[[int], object] | None = None,
) -> Dashboard:
    """Write the dashboard of a coder to a folder; see `survey` for what is measured: activations
    above 0, so that AbsTopK's negative ones are not shown.

    Args:
        coder: an autoencoder or a transcoder.
        model, tokenizer: a Hugging Face language model; without an unembedding the pages have no
            logit lens and say so.
        contexts: the text.
        hook: where the coder reads.
        out: a new or empty folder, or a dashboard to write anew.
        target_hook: where a transcoder writes.
        labels: shown and searched, latent -> text.
        source: the activations of these contexts at the hook, if they are at hand.
        progress: called with the number of tokens of each batch done.

    Raises:
        UserError: the width of the coder is not that at the hook; `out` holds other files; a label
            of a latent that does not exist.
    """
    chosen = options or Options()
    named = dict(labels or {})
    for latent in named:
        if not 0 <= latent < coder.d_sae:
            raise UserError(f"labels: a latent must be in [0, {coder.d_sae}), got {latent}")
    folder.check(out)
    found = survey(
        coder,
        model,
        contexts,
        hook,
        top=chosen.top,
        sample=chosen.sample,
        window=chosen.window,
        source=source,
        progress=progress,
    )
    joined, notes = join(coder, model, found, target_hook or hook, chosen)
    folder.clear(out)
    vocabulary = Vocabulary(shown_tokens(found, joined, coder.d_sae), tokenizer)
    texts = vocabulary.texts()
    size = folder.write(out, "tokens", texts)
    for begin in range(0, coder.d_sae, CHUNK):
        latents = range(begin, min(begin + CHUNK, coder.d_sae))
        records = [record(found, joined, vocabulary, latent) for latent in latents]
        size += folder.write(out, f"latents/{begin // CHUNK}", records)
    columns = index_columns(found, joined, vocabulary, texts, named)
    size += folder.write(out, "index", columns)
    meta = describe(coder, found, hook, target_hook, title, chosen) | notes
    meta["special"] = vocabulary.numbers(contexts.special_ids)
    size += folder.write(out, "meta", meta)
    size += folder.finish(out)
    fired = int((found.fired > 0).sum())
    return Dashboard(out / "index.html", coder.d_sae, fired, found.tokens, size)


def join(
    coder: SparseCoder, model: nn.Module, found: Survey, writes: str, options: Options
) -> tuple[Joined, dict[str, Any]]:
    """What is known of latents without the text, and what the pages say of it."""
    n = options.neighbours
    reason = why_no_lens(model, coder.d_out, writes)
    lens = None if reason else logit_lens(model, coder.W_dec, options.tokens)
    reads = None
    if not coder.centred and why_no_lens(model, coder.d_in) is None:
        reads = embedding_match(model, coder.W_enc, options.tokens)
    enc, dec = coder.W_enc.detach().float().cpu(), coder.W_dec.detach().float().cpu()
    cosine = None
    if coder.d_in == coder.d_out:
        cosine = nn.functional.cosine_similarity(enc, dec, dim=1).numpy()
    joined = Joined(
        lens=lens,
        reads=reads,
        decoder=nearest(coder.W_dec, n),
        encoder=nearest(coder.W_enc, n),
        together=found.codes.neighbours(n),
        decoder_norm=dec.norm(dim=1).numpy(),
        encoder_norm=enc.norm(dim=1).numpy(),
        bias=coder.b_enc.detach().float().cpu().numpy(),
        cosine=cosine,
    )
    return joined, {"no_lens": reason, "together_tokens": found.codes.tokens}


def describe(
    coder: SparseCoder,
    found: Survey,
    hook: str,
    target_hook: str | None,
    title: str,
    options: Options,
) -> dict[str, Any]:
    """The coder and the text, for the head of the pages."""
    return {
        "title": title,
        "kind": type(coder).__name__,
        "transcoder": not coder.centred,
        "d_in": coder.d_in,
        "d_out": coder.d_out,
        "F": coder.d_sae,
        "hook": hook,
        "target_hook": target_hook,
        "tokens": found.tokens,
        "contexts": len(found.contexts),
        "length": found.contexts.ids.shape[1],
        "l0": round(float(found.fired.sum()) / found.tokens, 2),
        "chunk": CHUNK,
        "top": options.top,
    }
