# SPDX-License-Identifier: Apache-2.0
"""The circuit that is found is the one that was planted."""

from __future__ import annotations

import pytest
import torch
from planted_circuit import INPUTS, RIGHT, WRONG, A, B, P, Planted, Q, U, sites

from ksae.analysis.attribution import Node, curve, edges, effects, logit_difference

METRIC = logit_difference(RIGHT, WRONG)
CIRCUIT = {(0, 0, P), (0, 1, U), (1, 1, Q)}  # site, position, latent
# Activations: tokens have length 2. Q: 1.75 * 1.3 + 1.75 * 1.7 - 1.5.
Z_P, Z_U = 1.75, 1.75
Z_Q = 1.3 * Z_P + 1.7 * Z_U - 1.5


def keys(nodes):
    return {node.key for node in nodes}


@pytest.mark.parametrize("steps", [0, 3])
def test_the_nodes_are_those_of_the_circuit(steps):
    model = Planted()
    found = effects(model, INPUTS, METRIC, sites(model), steps=steps)
    assert found.clean == pytest.approx(2 * Z_Q, rel=1e-5)
    nodes = [node for node in found.nodes() if abs(node.effect) > 1e-5]
    assert keys(nodes) == CIRCUIT
    assert nodes[0].key == (1, 1, Q)
    by_key = {node.key: node for node in nodes}
    assert by_key[1, 1, Q].activation == pytest.approx(Z_Q, rel=1e-5)
    assert by_key[1, 1, Q].effect == pytest.approx(-2 * Z_Q, rel=1e-5)
    if steps == 0:  # linear in each latent as far as Q is active
        assert by_key[0, 0, P].effect == pytest.approx(-2 * 1.3 * Z_P, rel=1e-5)
        assert by_key[0, 1, U].effect == pytest.approx(-2 * 1.7 * Z_U, rel=1e-5)


def test_the_edges_are_those_of_the_circuit():
    model = Planted()
    found = effects(model, INPUTS, METRIC, sites(model))
    # with latents that are active beside it
    others = [Node(0, 0, 0), Node(0, 1, 1), Node(0, 0, 2), Node(1, 1, 8), Node(1, 1, 9)]
    nodes = [*(n for n in found.nodes() if n.key in CIRCUIT), *others]
    wanted = {
        ((0, 0, P), (1, 1, Q)): -1.3 * Z_P,
        ((0, 1, U), (1, 1, Q)): -1.7 * Z_U,
        ((0, 1, U), (1, 1, 9)): -1.7 * Z_U,
        ((0, 1, 1), (1, 1, 8)): -1.1 * Z_U,
        ((1, 1, Q), None): -2 * Z_Q,
    }
    of_activations = edges(model, INPUTS, METRIC, found, nodes, of="activation")
    got = {(e.source.key, e.target and e.target.key): e.weight for e in of_activations}
    strong = {pair: weight for pair, weight in got.items() if abs(weight) > 1e-5}
    assert strong == pytest.approx(wanted, rel=1e-5)
    # on the metric only the planted ones are left
    on_metric = edges(model, INPUTS, METRIC, found, nodes)
    strong = {
        (e.source.key, e.target and e.target.key): e.weight
        for e in on_metric
        if abs(e.weight) > 1e-5
    }
    into_q = {pair: 2 * weight for pair, weight in wanted.items() if pair[1] == (1, 1, Q)}
    assert strong == pytest.approx(into_q | {((1, 1, Q), None): -2 * Z_Q}, rel=1e-5)


def test_the_circuit_alone_does_it_all_and_nothing_is_left_without_it():
    model = Planted()
    found = effects(model, INPUTS, METRIC, sites(model))
    nodes = found.nodes(3)
    none, one, all_of_it = curve(model, INPUTS, METRIC, found.sites, nodes, [0, 1, 3])
    assert (none.nodes, none.faithfulness) == (0, 0) and none.completeness == pytest.approx(1)
    assert one.faithfulness == pytest.approx(0, abs=1e-5)  # Q alone has nothing to go on
    assert all_of_it.faithfulness == pytest.approx(1, rel=1e-5)
    assert all_of_it.completeness == pytest.approx(0, abs=1e-5)


def test_patching_finds_what_differs():
    """Another first token: P goes out, latents of both inputs are nodes; U and its edge stay."""
    model = Planted()
    patch = {"input_ids": torch.tensor([[B, B]])}
    found = effects(model, INPUTS, METRIC, sites(model), patch=patch)
    assert A != B and found.patch is not None and found.patch < found.clean / 2
    strong = keys(n for n in found.nodes() if abs(n.effect) > 1e-5)
    assert strong == {(0, 0, P), (1, 1, Q)}
    point = curve(model, INPUTS, METRIC, found.sites, found.nodes(2), [2], patch=patch)[0]
    assert point.faithfulness == pytest.approx(1, rel=1e-5)
    assert point.metric == pytest.approx(found.clean, rel=1e-5)
