# SPDX-License-Identifier: Apache-2.0
"""What the pages are told: one record a latent, and the columns of the index."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from ksae.analysis.dashboard.best import EMPTY, Best, Floats, Ints
from ksae.analysis.dashboard.lens import Lens
from ksae.analysis.dashboard.survey import Survey
from ksae.analysis.dashboard.vocabulary import Vocabulary

BANDS = 4  # quantiles of the activations
OF_A_BAND = 3  # contexts
RANDOM = 6
SNIPPET_BEFORE, SNIPPET_AFTER = 8, 5  # tokens in the index
TOKENS_OF_INDEX = 5


@dataclass(frozen=True)
class Joined:
    """What is known of latents without the text; n neighbours each."""

    lens: Lens | None
    reads: tuple[Tensor, Tensor] | None  # tokens whose embeddings a transcoder reads, cosines
    decoder: tuple[Tensor, Tensor]  # cosines, latents [F, n]
    encoder: tuple[Tensor, Tensor]
    together: tuple[Floats, Ints]  # shares, latents [F, n]
    decoder_norm: Floats
    encoder_norm: Floats
    bias: Floats
    cosine: Floats | None  # of encoder and decoder rows, where they have one width


def shown_tokens(found: Survey, joined: Joined, F: int) -> Ints:
    """How often the pages show each token id, [V]."""
    counts = np.zeros(1, np.int64)

    def add(ids: Ints) -> None:
        nonlocal counts
        more = np.bincount(ids.reshape(-1), minlength=len(counts))
        more[: len(counts)] += counts
        counts = more

    for best in (found.top, found.sample):
        for latent in range(0, F, 256):
            part = slice(latent, latent + 256)
            ids, inside = found.window_of(best.place[part])
            add(ids[inside & (best.key[part] != EMPTY)[..., None]])
    if joined.lens is not None:
        add(joined.lens.promoted.numpy())
        add(joined.lens.demoted.numpy())
    if joined.reads is not None:
        add(joined.reads[0].numpy())
    return counts


def record(found: Survey, joined: Joined, vocabulary: Vocabulary, latent: int) -> dict[str, Any]:
    """One latent as its page reads it."""
    contexts = _contexts(found, found.top, vocabulary, latent, _filled(found.top, latent))
    bands, drawn = _bands(found.sample, latent, found.window.before)
    first = len(contexts)
    contexts += _contexts(found, found.sample, vocabulary, latent, drawn)
    at = {slot: first + i for i, slot in enumerate(drawn)}
    random = _filled(found.sample, latent)[:RANDOM]
    fired = int(found.fired[latent])
    width, counts = found.histograms.of(latent)
    data: dict[str, Any] = {
        "fired": fired,
        "mean": _short(found.total[latent] / fired) if fired else None,
        "max": _short(found.largest[latent]),
        "decoder_norm": _short(joined.decoder_norm[latent]),
        "encoder_norm": _short(joined.encoder_norm[latent]),
        "bias": _short(joined.bias[latent]),
        "histogram": [width, counts],
        "contexts": contexts,
        "top": first,
        "bands": [
            [_short(low), _short(high), [at[s] for s in slots]] for low, high, slots in bands
        ],
        "random": [at[slot] for slot in random],
        "decoder": _pairs(joined.decoder[1][latent], joined.decoder[0][latent]),
        "encoder": _pairs(joined.encoder[1][latent], joined.encoder[0][latent]),
    }
    if joined.cosine is not None:
        data["cosine"] = _short(joined.cosine[latent])
    shares, others = joined.together[0][latent], joined.together[1][latent]
    data["together"] = _pairs(others[shares > 0], shares[shares > 0])
    if joined.lens is not None:
        lens = joined.lens
        for name, ids, logits in (
            ("promoted", lens.promoted, lens.promoted_logits),
            ("demoted", lens.demoted, lens.demoted_logits),
        ):
            data[name] = _pairs(vocabulary.number[ids[latent].numpy()], logits[latent])
    if joined.reads is not None:
        ids, cosines = joined.reads
        data["reads"] = _pairs(vocabulary.number[ids[latent].numpy()], cosines[latent])
    return data


def index_columns(
    found: Survey,
    joined: Joined,
    vocabulary: Vocabulary,
    texts: Sequence[str],
    labels: Mapping[int, str],
) -> dict[str, Any]:
    """The index: a list over latents for each column."""
    F = len(found.fired)
    return {
        "fired": found.fired.tolist(),
        "norm": [_short(v) for v in joined.decoder_norm],
        "max": [_short(v) for v in found.largest],
        "labels": {str(latent): text for latent, text in sorted(labels.items())},
        "snippet": [_snippet(found, vocabulary, texts, latent) for latent in range(F)],
        "tokens": [_firing_tokens(found, vocabulary, texts, latent) for latent in range(F)],
        "promoted": [
            []
            if joined.lens is None
            else [texts[i] for i in vocabulary.number[joined.lens.promoted[latent, :3].numpy()]]
            for latent in range(F)
        ],
    }


def _filled(best: Best, latent: int) -> list[int]:
    return np.flatnonzero(best.key[latent] != EMPTY).tolist()


def _contexts(
    found: Survey, best: Best, vocabulary: Vocabulary, latent: int, slots: list[int]
) -> list[list[Any]]:
    """Context number, position of the first token shown, which of them fires, the tokens, and the
    latent's activations on them as pairs of token and value."""
    if not slots:
        return []
    length, before = found.contexts.ids.shape[1], found.window.before
    places, acts = best.place[latent, slots], best.acts[latent, slots]
    ids, inside = found.window_of(places)
    rows = []
    for place, value, token, shown in zip(places.tolist(), acts, ids, inside, strict=True):
        cut = int(np.argmax(shown))  # tokens of the window before the context
        value = value[shown]
        on = np.flatnonzero(value)
        flat: list[Any] = []
        for i, v in zip(on.tolist(), value[on], strict=True):
            flat += [i, _short(v)]
        tokens = vocabulary.number[token[shown]].tolist()
        start = place % length - before + cut
        rows.append([place // length, start, before - cut, tokens, flat])
    return rows


def _bands(
    sample: Best, latent: int, before: int
) -> tuple[list[tuple[float, float, list[int]]], list[int]]:
    """Bands of equal numbers of sampled firings, strongest first, as lowest and highest value and
    slots spread evenly over the band; and every slot that is shown. No bands of few firings."""
    slots = _filled(sample, latent)
    shown = slots[:RANDOM]
    if len(slots) < 2 * BANDS:
        return [], shown
    values = sample.acts[latent, :, before]  # of the firing tokens
    order = np.argsort(-values[slots], kind="stable")
    bands = []
    for band in np.array_split(np.array(slots)[order], BANDS):
        spread = np.linspace(0, len(band) - 1, min(OF_A_BAND, len(band))).round().astype(int)
        chosen = band[spread].tolist()
        bands.append((float(values[band[-1]]), float(values[band[0]]), chosen))
        shown = shown + [slot for slot in chosen if slot not in shown]
    return bands, shown


def _pairs(numbers: Iterable[Any], values: Iterable[Any]) -> list[list[Any]]:
    return [[int(n) for n in numbers], [_short(v) for v in values]]


def _short(value: Any) -> float | int:
    """Four digits; JSON writes 3 shorter than 3.0."""
    rounded = float(f"{float(value):.4g}")
    return int(rounded) if rounded == int(rounded) else rounded


def _snippet(
    found: Survey, vocabulary: Vocabulary, texts: Sequence[str], latent: int
) -> list[str] | None:
    """The strongest context in short: text before, firing token, text after."""
    if found.top.n == 0 or found.top.key[latent, 0] == EMPTY:
        return None
    ids, inside = found.window_of(found.top.place[latent, :1])
    before = found.window.before
    numbers = np.where(inside[0], vocabulary.number[ids[0]], -1)
    low = max(0, before - SNIPPET_BEFORE)
    parts = (
        numbers[low:before],
        numbers[before : before + 1],
        numbers[before + 1 :][:SNIPPET_AFTER],
    )
    return ["".join(texts[i] for i in part.tolist() if i >= 0) for part in parts]


def _firing_tokens(
    found: Survey, vocabulary: Vocabulary, texts: Sequence[str], latent: int
) -> list[str]:
    """The tokens that fire in the top contexts, each once, strongest first."""
    places = found.top.place[latent, _filled(found.top, latent)]
    length = found.contexts.ids.shape[1]
    ids = found.contexts.ids.numpy()[places // length, places % length]
    names = (texts[i].strip() for i in vocabulary.number[ids].tolist())
    return list(dict.fromkeys(name for name in names if name))[:TOKENS_OF_INDEX]
