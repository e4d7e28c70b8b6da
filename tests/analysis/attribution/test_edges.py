# SPDX-License-Identifier: Apache-2.0
"""Edges against finite differences and against the formula of transcoders."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attribution_sites import METRIC, RESID, F, coder, ids, two_sites
from attribution_sites import model as language_model
from torch import Tensor, nn
from toy_language_model import D, llama

from ksae.activations import capture
from ksae.analysis.attribution import Effects, Node, Site, edges, effects, frozen
from ksae.errors import UserError


def strongest(found: Effects, n: int) -> list[Node]:
    """The n strongest of each site."""
    nodes = found.nodes()
    return [x for i in range(len(found.sites)) for x in [y for y in nodes if y.site == i][:n]]


def test_edges_are_finite_differences() -> None:
    """The activation of a later latent, and the metric with later parts held, as an earlier latent
    or error changes at a hook written here."""
    model, sites = language_model(), two_sites()
    found = effects(model, ids(), METRIC, sites, patch=ids(5))
    nodes = strongest(found, 10)
    assert {node.latent is None for node in nodes if node.site == 0} == {True, False}
    made = edges(model, ids(), METRIC, found, nodes, of="activation")
    block, mlp = model.model.layers[0], model.model.layers[1].mlp
    clean = capture(model, ["layers.1.mlp_out"], ids())["layers.1.mlp_out"]

    def passed(source: Node, step: float) -> tuple[Tensor, float]:
        """The second coder's dense code, and the metric with the second MLP's output held."""
        here, place = found.at[0], source.position
        delta = torch.zeros(2, 7, D, dtype=torch.float64)
        if source.latent is None:
            delta[:, place] = (here.error_patch - here.error_clean)[:, place]
        else:
            mine = torch.where(here.indices == source.latent, here.patch - here.clean, 0).sum(-1)
            delta[:, place] = (mine[..., None] * sites[0].coder.W_dec[source.latent])[:, place]
        seen: list[Tensor] = []

        def hold(_m: Any, args: Any, out: Tensor) -> Tensor:
            seen.append(args[0])
            recon, old = sites[1].coder.decode, clean  # a skip connection is a path that counts
            zero = torch.zeros(2, 7, 1, dtype=torch.float64)
            of = lambda x: recon(zero, zero.long(), x)
            return old + of(args[0]) - of(original)

        handles = [block.register_forward_hook(lambda _m, _a, out: out + step * delta)]
        handles.append(mlp.register_forward_hook(hold))
        value = float(METRIC(model(**ids())).sum())
        for handle in handles:
            handle.remove()
        return sites[1].coder.encode_dense(seen[0]), value

    original = capture(model, ["layers.1.mlp_in"], ids())["layers.1.mlp_in"]
    seen_edges, h = 0, 1e-5
    with torch.no_grad():
        for source in (node for node in nodes if node.site == 0):
            (up, high), (down, low) = passed(source, h), passed(source, -h)
            mine = {e.target and e.target.key: e.weight for e in made if e.source == source}
            slopes = ((up - down) / (2 * h)).sum(0)  # [T, F]
            for target in nodes:
                if target.site == 1 and target.latent is not None:
                    expected = float(slopes[target.position, target.latent])
                    got = mine.get(target.key, 0.0)
                    assert got == pytest.approx(expected, rel=1e-2, abs=1e-9)
                    seen_edges += abs(got) > 1e-6
            expected = (high - low) / (2 * h)
            assert mine.get(None, 0.0) == pytest.approx(expected, rel=1e-2, abs=1e-9)
    assert seen_edges > 10


def test_weights_on_the_metric_are_those_on_the_activation_times_its_gradient() -> None:
    model, sites = language_model(), two_sites()
    inputs = {"input_ids": ids()["input_ids"][:1]}
    found = effects(model, inputs, METRIC, sites)
    nodes = strongest(found, 8)
    one = edges(model, inputs, METRIC, found, nodes, of="activation")
    two = {(e.source, e.target): e.weight for e in edges(model, inputs, METRIC, found, nodes)}
    assert len(one) > 10
    for edge in one:
        by = 1.0
        if edge.target is not None:
            assert edge.target.latent is not None
            by = -edge.target.effect / edge.target.activation  # its change is to zero
        assert two[edge.source, edge.target] == pytest.approx(edge.weight * by, rel=1e-6)


@pytest.mark.parametrize("patched", [False, True])
def test_what_goes_through_the_nodes_of_the_next_site_is_the_whole_effect(patched: bool) -> None:
    """Between sites in the residual stream, where no path goes around: to the latents that are
    active in the inputs and the error."""
    model = language_model()
    sites = [Site(coder("topk"), RESID), Site(coder("topk", 3), "layers.1.resid_post")]
    found = effects(model, ids(), METRIC, sites, patch=ids(5) if patched else None)
    here = found.at[1]
    later = [
        Node(1, t, j)
        for t in range(7)
        for j in {*here.indices[:, t][here.clean[:, t] != 0].tolist(), None}
    ]
    sources = strongest(found, 12)[:12]
    assert {node.latent is None for node in sources} == {True, False}
    made = edges(model, ids(), METRIC, found, [*sources, *later])
    for source in sources:
        through = sum(e.weight for e in made if e.source == source)
        assert through == pytest.approx(source.effect, rel=1e-8)
        assert not any(e.target is None for e in made if e.source == source)


def test_errors_have_edges_where_no_latent_is_active() -> None:
    model, silent = language_model(), coder("jumprelu")
    nn.init.constant_(silent.log_threshold, 20.0)
    sites = [Site(silent, RESID), Site(coder("topk", 3), "layers.1.resid_post")]
    found = effects(model, ids(), METRIC, sites)
    assert found.at[0].indices.shape[-1] == 0
    sources = [node for node in found.nodes() if node.site == 0]
    assert sources and all(node.latent is None for node in sources)
    here = found.at[1]
    every = {j for row in here.indices.flatten(0, 1).tolist() for j in row}
    later = [Node(1, t, j) for t in range(7) for j in [*every, None]]
    made = edges(model, ids(), METRIC, found, [*sources, *later])
    for source in sources:
        through = sum(e.weight for e in made if e.source == source)
        assert through == pytest.approx(source.effect, rel=1e-8) and through != 0


def test_nodes_without_positions_add_up() -> None:
    model, sites = language_model(), two_sites()
    found = effects(model, ids(), METRIC, sites)
    wide = [node for node in found.nodes(positions=False) if node.latent is not None]
    narrow = [node for node in found.nodes() if node.latent is not None]
    target = next(node for node in wide if node.site == 1)
    source = next(node for node in wide if node.site == 0)
    (one,) = [e for e in edges(model, ids(), METRIC, found, [source, target]) if e.target == target]
    pairs = [n for n in narrow if (n.site, n.latent) in ((0, source.latent), (1, target.latent))]
    many = [e for e in edges(model, ids(), METRIC, found, pairs) if e.target is not None]
    assert one.weight == pytest.approx(sum(e.weight for e in many), rel=1e-6)


def test_frozen_edges_between_transcoders_are_products_of_weights() -> None:
    """z <W_dec[i], W_enc[j]> along the residual stream, and through each head's values and output
    with the attention from the one position to the other (arXiv 2406.11944, section 3)."""
    model = language_model()
    model.set_attn_implementation("eager")
    first, second = coder("transcoder", 1), coder("transcoder", 2)
    hooks = [f"layers.{i}.mlp_{side}" for i in range(2) for side in ("in", "out")]
    sites = [Site(first, hooks[0], hooks[1]), Site(second, hooks[2], hooks[3])]
    inputs = {"input_ids": ids()["input_ids"][:1]}
    found = effects(model, inputs, METRIC, sites)
    nodes = [n for n in strongest(found, 25) if n.latent is not None]
    made = edges(model, inputs, METRIC, found, nodes, of="activation", frozen=True)
    got = {(e.source.key, e.target and e.target.key): e.weight for e in made}

    block = model.model.layers[1]
    out = model(**inputs, output_attentions=True)
    pattern = out.attentions[1][0]  # [heads, T, T]
    acts = capture(
        model, ["layers.1.resid_pre", "model.layers.1.post_attention_layernorm:in"], inputs
    )
    before, after = (
        acts["layers.1.resid_pre"][0],
        acts["model.layers.1.post_attention_layernorm:in"][0],
    )
    eps = model.config.rms_norm_eps
    scale = lambda x: (x.square().mean(-1) + eps).rsqrt()  # [T]
    V = block.self_attn.v_proj.weight  # [kv * width, d]
    O = block.self_attn.o_proj.weight  # [d, heads * width]
    width = D // 2  # two heads that share one pair of keys and values
    seen = 0
    with torch.no_grad():
        for source in (n for n in nodes if n.site == 0):
            for target in (n for n in nodes if n.site == 1):
                s, t = source.position, target.position
                reads = second.W_enc[target.latent] * block.post_attention_layernorm.weight
                row = first.W_dec[source.latent]
                path = row @ reads if s == t else row.new_zeros(())
                if s <= t:
                    normed = row * block.input_layernorm.weight * scale(before)[s]
                    for head in range(2):
                        mine = O[:, head * width : (head + 1) * width]
                        path = path + pattern[head, t, s] * (reads @ (mine @ (V @ normed)))
                expected = float(-source.activation * path * scale(after)[t])
                assert got.get((source.key, target.key), 0.0) == pytest.approx(
                    expected, rel=1e-6, abs=1e-12
                )
                seen += abs(expected) > 1e-9
    assert seen > 20


def test_frozen_leaves_the_outputs_as_they_are() -> None:
    model = llama()
    clean = model(**ids()).logits
    with frozen(model):
        assert torch.equal(model(**ids()).logits, clean)
    assert not any(m._forward_hooks for m in model.modules())


def of_gpt2() -> tuple[nn.Module, nn.Module, Any]:
    """A model, a block and its attention after its norm, of [1, T, d]."""
    import transformers

    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=40, n_embd=D, n_layer=2, n_head=2, n_positions=32, bos_token_id=0, eos_token_id=0
    )
    model = transformers.GPT2LMHeadModel(config)
    block = model.transformer.h[0]
    return model, block, lambda x: block.attn(block.ln_1(x))[0]


def of_gpt_neox() -> tuple[nn.Module, nn.Module, Any]:
    import transformers

    torch.manual_seed(0)
    config = transformers.GPTNeoXConfig(
        vocab_size=40, hidden_size=D, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=24, max_position_embeddings=32, initializer_range=0.3,
    )  # fmt: skip
    model = transformers.GPTNeoXForCausalLM(config)
    block, mask = model.gpt_neox.layers[0], torch.full((5, 5), -1e9).triu(1)[None, None]

    def run(x: Tensor) -> Tensor:
        places = model.gpt_neox.rotary_emb(x, torch.arange(x.shape[1])[None])
        norm, attention = block.input_layernorm, block.attention
        return attention(norm(x), mask.to(x.dtype), position_embeddings=places)[0]

    return model, block, run


@pytest.mark.parametrize("family", [of_gpt2, of_gpt_neox])
def test_a_frozen_attention_with_its_norm_is_linear(family: Any) -> None:
    """Of models with LayerNorm and one module for query, key and value, whose biases are zero here:
    along x itself the derivative is the output."""
    model, block, run = family()
    model.double().eval()
    for name, parameter in block.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(parameter)
    x = torch.randn(1, 5, D, dtype=torch.float64)

    def along(t: Tensor) -> Tensor:
        """The derivative of run at t along t, by reverse mode."""
        t = t.clone().requires_grad_()
        out = run(t)
        columns = [torch.autograd.grad(o, t, retain_graph=True)[0] for o in out.flatten()]
        return torch.stack([(c * t).sum() for c in columns]).reshape(out.shape)

    with frozen(model):
        torch.testing.assert_close(along(x), run(x))
    assert (along(x) - run(x)).abs().max() > 1e-4


@pytest.mark.parametrize("name", ["GemmaRMSNorm", "LlamaRMSNorm"])
def test_a_frozen_norm_is_linear(name: str) -> None:
    """Also where the gain is stored less one."""
    from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    norm = {"GemmaRMSNorm": GemmaRMSNorm, "LlamaRMSNorm": LlamaRMSNorm}[name](D, 1e-3).double()
    nn.init.normal_(norm.weight)
    model = language_model()
    model.model.norm = norm
    x = torch.randn(D, dtype=torch.float64, requires_grad=True)
    with frozen(model):
        out = norm(x)
        jacobian = torch.stack([torch.autograd.grad(o, x, retain_graph=True)[0] for o in out])
    torch.testing.assert_close(jacobian @ x, out, rtol=1e-6, atol=1e-9)
    assert torch.equal(jacobian, torch.diag(jacobian.diag()))


def test_a_norm_of_an_unknown_kind_is_refused() -> None:
    """Its gain or its centring may be another."""

    class ScaledLayerNorm(nn.LayerNorm):
        pass

    class CrazyNorm(nn.Module):
        pass

    for norm in (ScaledLayerNorm(D), CrazyNorm(), nn.GroupNorm(1, D)):
        model = language_model()
        model.model.norm = norm
        name = type(norm).__name__
        want = f"frozen: norms must be nn.LayerNorm or an RMSNorm, got {name}"
        with pytest.raises(UserError, match=want), frozen(model):
            pass
        assert not any(m._forward_hooks for m in model.modules())


def test_mistakes() -> None:
    model, sites = language_model(), two_sites()
    found = effects(model, ids(), METRIC, sites)
    with pytest.raises(UserError, match="of must be one of metric, activation, got 'all'"):
        edges(model, ids(), METRIC, found, [], of="all")
    with pytest.raises(UserError, match=r"latent must be in \[0, 32\), got 32"):
        edges(model, ids(), METRIC, found, [Node(0, 0, F)])
    for block in model.model.layers:
        block.self_attn.renamed = block.self_attn.q_proj
        del block.self_attn.q_proj
        block.self_attn.other = block.self_attn.k_proj
        del block.self_attn.k_proj
    with (
        pytest.raises(UserError, match="attention of block 0 of LlamaForCausalLM must have"),
        frozen(model),
    ):
        pass
    assert found.sites[0].name == RESID
