# SPDX-License-Identifier: Apache-2.0
"""What holds for every installed library: its signatures, our own methods, its pinned version."""

from __future__ import annotations

import inspect
import re
import warnings
from importlib import import_module, metadata
from pathlib import Path

import pytest
from torch import nn

from ksae.interop import dictionary_learning, libraries, overcomplete, saelens, sparsify

CLASSES = {
    "sparsify.sparse_coder.SparseCoder": sparsify.SparseCoder,
    "dictionary_learning.trainers.top_k.AutoEncoderTopK": dictionary_learning.AutoEncoderTopK,
    "overcomplete.sae.TopKSAE": overcomplete.TopKSAE,
    "sae_lens.TopKSAE": saelens.TopKSAE,
    "sae_lens.TopKTrainingSAE": saelens.TopKTrainingSAE,
    "sae_lens.LanguageModelSAETrainingRunner": saelens.LanguageModelSAETrainingRunner,
}
FUNCTIONS = {
    "sparsify.fused_encoder.fused_encoder": sparsify.fused_encoder,
    "sparsify.utils.eager_decode": sparsify.decoder_impl,
}


def original(path):
    module, _, name = path.rpartition(".")
    return getattr(import_module(module), name)


def public(cls):
    """Names of a class's own attributes, without those of every module."""
    names = {n for n in dir(cls) if not n.startswith("_")} - set(dir(nn.Module))
    return names | {"__init__", "forward"} & set(dir(cls))


def assert_takes_the_same(what, ours, theirs):
    """Names, kinds and defaults of the arguments; by keyword only, ours may take more."""
    own, wanted = (list(inspect.signature(f).parameters.values()) for f in (ours, theirs))
    wanted = [(p.name, p.kind, p.default) for p in wanted]
    names = {name for name, *_ in wanted}
    more = [p for p in own if p.name not in names]
    assert [(p.name, p.kind, p.default) for p in own if p.name in names] == wanted, what
    assert all(p.kind == inspect.Parameter.KEYWORD_ONLY for p in more), what


@pytest.mark.parametrize("path", CLASSES)
def test_methods_have_the_signatures_of_the_library(path):
    ours, theirs = CLASSES[path], original(path)
    assert issubclass(ours, theirs)
    for name in public(theirs):
        if callable(getattr(theirs, name)):
            assert_takes_the_same(name, getattr(ours, name), getattr(theirs, name))


def test_functions_have_the_signatures_of_the_library():
    for path, ours in FUNCTIONS.items():
        theirs = original(path)
        wanted = list(inspect.signature(theirs).parameters)
        assert list(inspect.signature(ours).parameters)[: len(wanted)] == wanted, path


def test_sparsifys_other_names_are_there():
    theirs = import_module("sparsify")
    assert sparsify.Sae is sparsify.SparseCoder
    assert sparsify.SparseCoderConfig is theirs.SparseCoderConfig
    assert sparsify.SaeConfig is theirs.SaeConfig
    ours, wanted = sparsify.TranscoderConfig(k=3), theirs.TranscoderConfig(k=3)
    assert ours == wanted and ours.transcode


@pytest.mark.parametrize("path", [p for p in CLASSES if not p.startswith("sae_lens")])
def test_nothing_public_is_left_to_the_library(path):
    """Without it the class is the same; SAELens' alone need theirs."""
    own = set().union(*(vars(c) for c in CLASSES[path].__mro__ if c.__module__.startswith("ksae.")))
    assert not public(original(path)) - own


def test_the_pinned_versions_are_installed_and_pass_without_a_warning():
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    pins = dict(re.findall(r'"([\w-]+)==([\w.]+)"', text.partition("[dependency-groups]")[2]))
    for name, library in libraries.LIBRARIES.items():
        assert metadata.version(library.distribution) == pins[library.distribution]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            libraries._check_version(name, library)
