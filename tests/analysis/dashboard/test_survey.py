# SPDX-License-Identifier: Apache-2.0
"""The pass over a text against one that keeps everything."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from toy_language_model import HOOK, D, contexts, llama

from ksae import TopKSAE
from ksae.activations import Contexts, capture, harvest
from ksae.analysis.dashboard import survey as module
from ksae.analysis.dashboard.best import EMPTY
from ksae.analysis.dashboard.coactivation import Codes
from ksae.analysis.dashboard.histograms import BINS, Histograms
from ksae.analysis.dashboard.survey import PHRASE, Survey, Window, survey
from ksae.errors import UserError

F, K = 20, 3


def coder() -> TopKSAE:
    torch.manual_seed(3)
    return TopKSAE(D, F, K).eval()


@pytest.fixture(scope="module")
def dense() -> np.ndarray:
    """The activations of every latent on every token, [contexts, length, F]."""
    text, sae, model = contexts(), coder(), llama()
    found = np.zeros((*text.ids.shape, F), np.float32)
    for begin in range(0, len(text), 16):
        part = slice(begin, begin + 16)
        ids, attended = text.ids[part].long(), text.attended()[part].long()
        x = capture(model, [HOOK], {"input_ids": ids, "attention_mask": attended})[HOOK]
        with torch.no_grad():
            code = sae.encode_dense(x).numpy()
        found[part] = code * text.mask()[part].numpy()[..., None]
    return found


@pytest.fixture(scope="module")
def found() -> Survey:
    return survey(coder(), llama(), contexts(), HOOK, top=4, sample=6, window=Window(5, 3))


def test_counts_sums_and_histograms(found: Survey, dense: np.ndarray) -> None:
    assert found.tokens == int(contexts().mask().sum())
    np.testing.assert_array_equal(found.fired, (dense > 0).sum((0, 1)))
    np.testing.assert_allclose(found.total, dense.astype(np.float64).sum((0, 1)), rtol=1e-6)
    np.testing.assert_array_equal(found.largest, dense.max((0, 1)))
    for latent in range(F):
        width, counts = found.histograms.of(latent)
        values = dense[..., latent][dense[..., latent] > 0].astype(np.float64)
        if len(values) == 0:
            assert counts == []
            continue
        expected = np.bincount((values / width).astype(int), minlength=len(counts))
        assert counts == expected.tolist()
        assert BINS // 2 <= values.max() / width < BINS


def brute_force(dense: np.ndarray, ids: np.ndarray, latent: int, n: int) -> list[int]:
    """Places of the top contexts: the strongest token of each, quotations once."""
    strongest = [
        (-float(row.max()), number, int(row.argmax()))
        for number, row in enumerate(dense[..., latent])
        if row.max() > 0
    ]
    places, phrases = [], set()
    for _, number, position in sorted(strongest):
        phrase = tuple(ids[number, max(0, position - PHRASE + 1) : position + 1])
        if phrase not in phrases:
            phrases.add(phrase)
            places.append(number * ids.shape[1] + position)
    return places[:n]


def test_top_contexts_are_those_of_a_brute_force_pass(found: Survey, dense: np.ndarray) -> None:
    ids = contexts().ids.numpy()
    quoted = False
    for latent in range(F):
        expected = brute_force(dense, ids, latent, 4)
        kept = found.top.key[latent] != EMPTY
        assert found.top.place[latent][kept].tolist() == expected
        quoted |= len(expected) < min(4, int((dense[..., latent].max(1) > 0).sum()))
        quoted |= expected != brute_force_with_quotations(dense, latent, 4)
    assert quoted  # the text has quotations that would be there twice


def brute_force_with_quotations(dense: np.ndarray, latent: int, n: int) -> list[int]:
    peaks = dense[..., latent].max(1)
    order = [c for c in np.argsort(-peaks, kind="stable").tolist() if peaks[c] > 0][:n]
    return [c * dense.shape[1] + int(dense[c, :, latent].argmax()) for c in order]


def test_activations_around_a_firing(found: Survey, dense: np.ndarray) -> None:
    length, text = dense.shape[1], contexts()
    for best in (found.top, found.sample):
        for latent, slot in zip(*(best.key != EMPTY).nonzero(), strict=True):
            context, position = divmod(int(best.place[latent, slot]), length)
            ids, inside = found.window_of(best.place[latent, slot])
            for i, at in enumerate(range(position - 5, position + 4)):
                there = 0 <= at < int(text.lengths[context])
                assert bool(inside[i]) == there
                if there:
                    assert ids[i] == int(text.ids[context, at])
                    assert best.acts[latent, slot, i] == dense[context, at, latent]
                else:
                    assert best.acts[latent, slot, i] == 0


def test_samples_are_firings_each_once(found: Survey, dense: np.ndarray) -> None:
    flat = dense.reshape(-1, F)
    for latent in range(F):
        places = found.sample.place[latent][found.sample.key[latent] != EMPTY]
        assert len(places) == min(6, int((flat[:, latent] > 0).sum()))
        assert len(set(places.tolist())) == len(places)
        assert (flat[places, latent] > 0).all()


def test_samples_are_uniform() -> None:
    """Over many latents that fire on the same 40 tokens, each is drawn equally often."""
    from ksae.analysis.dashboard.survey import _hash

    latents, places = np.meshgrid(np.arange(4000), np.arange(40), indexing="ij")
    keys = _hash(latents.reshape(-1), places.reshape(-1)).reshape(latents.shape)
    assert (keys >= 0).all()
    drawn = np.bincount(np.argsort(-keys, axis=1)[:, :4].reshape(-1), minlength=40)
    assert abs(drawn - 400).max() < 5 * np.sqrt(400 * 0.9)


def test_the_result_does_not_depend_on_the_batches(found: Survey) -> None:
    other = survey(
        coder(), llama(), contexts(), HOOK, top=4, sample=6, window=Window(5, 3), batch_size=5
    )
    np.testing.assert_array_equal(found.fired, other.fired)
    np.testing.assert_array_equal(found.top.place, other.top.place)
    np.testing.assert_array_equal(found.sample.place, other.sample.place)
    np.testing.assert_array_equal(found.histograms.counts, other.histograms.counts)
    for a, b in zip(found.codes.neighbours(5), other.codes.neighbours(5), strict=True):
        np.testing.assert_array_equal(a, b)


def test_activations_at_hand_give_the_same(found: Survey, monkeypatch) -> None:
    monkeypatch.setattr(module, "ROWS_AT_ONCE", 50)
    source = harvest(llama(), contexts(), HOOK, progress=False)
    other = survey(
        coder(), llama(), contexts(), HOOK, top=4, sample=6, window=Window(5, 3), source=source
    )
    assert other.tokens == found.tokens
    np.testing.assert_array_equal(found.fired, other.fired)
    for a, b in ((found.top, other.top), (found.sample, other.sample)):
        np.testing.assert_array_equal(a.place, b.place)
        np.testing.assert_array_equal(a.acts, b.acts)
    with pytest.raises(UserError, match="must be the activations of the text, got others"):
        survey(coder(), llama(), contexts(16), HOOK, source=source)


class Ragged(TopKSAE):
    """As an activation without a fixed k: the positive entries alone, and row offsets."""

    def encode(self, x, grad=None):
        values, indices = super().encode(x)
        keep = values > 0
        offsets = torch.zeros(len(x) + 1, dtype=torch.int64)
        offsets[1:] = keep.sum(1).cumsum(0)
        return values[keep], indices[keep], offsets


def test_codes_with_row_offsets(found: Survey) -> None:
    ragged = Ragged(D, F, K).eval()
    ragged.load_state_dict(coder().state_dict())
    other = survey(ragged, llama(), contexts(), HOOK, top=4, sample=6, window=Window(5, 3))
    np.testing.assert_array_equal(found.fired, other.fired)
    np.testing.assert_array_equal(found.top.acts, other.top.acts)
    np.testing.assert_array_equal(found.top.place, other.top.place)
    for a, b in zip(found.codes.neighbours(5), other.codes.neighbours(5), strict=True):
        np.testing.assert_array_equal(a, b)


def test_latents_that_fire_together(found: Survey, dense: np.ndarray) -> None:
    fires = dense.reshape(-1, F) > 0
    both = fires.T.astype(np.int64) @ fires
    either = fires.sum(0)[:, None] + fires.sum(0) - both
    share = np.where(either > 0, both / np.maximum(either, 1), 0).astype(np.float32)
    np.fill_diagonal(share, 0)
    shares, latents = found.codes.neighbours(5)
    order = np.argsort(-share, axis=1, kind="stable")[:, :5]
    np.testing.assert_array_equal(shares, np.take_along_axis(share, order, 1))
    np.testing.assert_array_equal(latents[shares > 0], order[shares > 0])


def test_codes_are_thinned_by_context() -> None:
    codes = Codes(6, pairs=40)
    rng = np.random.default_rng(0)
    for first in range(0, 64, 8):
        row = np.repeat(np.arange(16), 2)  # two latents a row, two rows a context
        codes.add(row, rng.integers(0, 6, 32), first + np.arange(16) // 2)
    assert codes.stride == 16 and codes.tokens == 8  # 4 pairs a row, 10 rows at most


def test_codes_of_one_context_with_too_many_pairs() -> None:
    codes = Codes(4, pairs=3)
    codes.add(np.array([0, 0]), np.array([1, 2]), np.array([5]))  # 4 pairs: nothing is left
    shares, latents = codes.neighbours(2)
    assert codes.tokens == 0 and shares.shape == latents.shape == (4, 2) and not shares.any()


def test_a_histogram_grows_by_joining_bins() -> None:
    values = np.array([0.1, 3.0, 1.5, 100.0, 0.001, 64.0], np.float32)
    one, parts = Histograms(2), Histograms(2)
    one.add(np.ones(6, np.int64), values)
    for value in values:
        parts.add(np.ones(1, np.int64), np.array([value]))
    np.testing.assert_array_equal(one.counts, parts.counts)
    width, counts = one.of(1)
    assert (width, sum(counts), len(counts)) == (2.0, 6, 51)
    assert one.of(0) == (0.0, [])


def test_a_coder_of_another_width_and_a_text_of_special_tokens_are_refused() -> None:
    with pytest.raises(UserError, match=r"must have the coder's width d_in = 8, got 16"):
        survey(TopKSAE(8, F, K), llama(), contexts(), HOOK)
    text = contexts()
    only = Contexts(torch.zeros_like(text.ids), *list(vars(text).values())[1:])
    with pytest.raises(UserError, match="at least one token that is not special"):
        survey(coder(), llama(), only, HOOK)
    with pytest.raises(UserError, match="valid are"):
        survey(coder(), llama(), text, "layers.9.resid_post")


def test_values_that_are_not_finite_are_refused() -> None:
    broken = coder()
    with torch.no_grad():
        broken.b_enc[0] = float("nan")
    with pytest.raises(UserError, match="non-finite"):
        survey(broken, llama(), contexts(), HOOK)
