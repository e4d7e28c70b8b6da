# SPDX-License-Identifier: Apache-2.0
"""Every CUDA kernel, executed by the emulator, in cases that only these kernels have."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from alignment import begin_anywhere
from cases import (
    DTYPES,
    NAMES,
    SCORES,
    assert_close,
    assert_same,
    clone_all,
    code,
    dtype_id,
    integers,
    norm_arguments,
    randn,
    row_arguments,
    scores,
    sums_arguments,
    to_float64,
    written,
)
from emulation.build import Emulator
from implementations import EMULATED, NOT_ON_GPUS, ON_CUDA, Emulated, takes_arguments_of
from torch import Tensor

from ksae import reference
from ksae.backends import cuda
from ksae.backends import product as products
from ksae.backends.cuda import Kernels
from ksae.ops.specs import BY_NAME

pytestmark = pytest.mark.implementations(EMULATED)

# ------------------------------------------------------------------------------------------- select


def select(
    impl: Emulated,
    z: Tensor,
    k: int,
    *,
    second: Tensor | None = None,
    mode: int = 0,
    beta: float = 0.0,
    scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The select kernel with the options that no op uses yet."""
    pointer = lambda t: 0 if t is None else t.data_ptr()
    values, indices = z.new_empty(z.shape[0], k), torch.empty(z.shape[0], k, dtype=torch.int64)
    dtype = cuda.DTYPES[z.dtype]
    impl.kernels.module.select(
        *z.shape, k, dtype, dtype, z.data_ptr(), pointer(second), mode, beta, 0, 0,
        pointer(scale), 0,
        False, values.data_ptr(), indices.data_ptr(), cuda._Workspace(z.device), 0,
    )  # fmt: skip
    return values, indices


@pytest.mark.parametrize("mode", [1, 2, 3], ids=["additive", "multiplicative", "signed"])
def test_select_by_a_second_operand(impl: Emulated, dtype: torch.dtype, mode: int) -> None:
    """Selected by s, carried is z; where z <= 0, s = z. Halves and integers: s is exact."""
    N, F, k, beta = 5, 333, 17, 0.5
    z, a = integers(N, F, dtype=dtype, top=4), integers(N, F, dtype=dtype, seed=1)
    scale = 2.0 ** integers(F, seed=2)
    for s in (None, scale):
        got = select(impl, z, k, second=a, mode=mode, beta=beta, scale=s)
        gain = torch.relu(-a.float()) if mode == 3 else a.float().abs()
        gained = z.float() * (gain if mode == 2 else 1 + beta * gain)
        order = torch.where(z > 0, gained, z.float()) * (1 if s is None else s)
        indices = reference.topk(order, k)[1]
        assert_same("indices", got[1], indices)
        assert_same("values", got[0], z.gather(1, indices))


@pytest.mark.parametrize("kind", ["descending", "ascending", "random", "all equal", "blocks"])
def test_buffer_of_candidates_overflows(impl: Emulated, kind: str) -> None:
    """Many columns reach the bound: the buffer is cut to the best k, several times a row."""
    N, F, k = 2, 9_001, 700  # 2048 keys: k and one round of 1024 fit, two rounds do not
    match kind:
        case "ascending":
            x = scores("descending", N, F, torch.float32).flip(1)
        case "blocks":  # groups of equal maxima, each with one number that counts
            x = torch.zeros(N, F)
            x[:, ::4] = 1.0
        case _:
            x = scores(kind, N, F, torch.float32)
    for name, got, want in zip(
        ("values", "indices"), impl.topk(x, k), reference.topk(x, k), strict=True
    ):
        assert_same(name, got, want)


@pytest.mark.parametrize("kind", SCORES)
def test_keys_in_the_workspace(impl: Emulated, kind: str) -> None:
    """k so large that the candidates do not fit in shared memory."""
    x = scores(kind, 2, 7_777, torch.float32)
    for k in (7_200, 7_777):
        assert_same("indices", impl.topk(x, k)[1], reference.topk(x, k)[1])


def test_groups_in_the_workspace(impl: Emulated) -> None:
    """Too many columns for their groups' maxima to fit in shared memory."""
    x = randn(1, 1_600_003, dtype=torch.bfloat16)
    for got, want in zip(impl.topk(x, 40), reference.topk(x, 40), strict=True):
        assert_same("topk", got, want)


@pytest.mark.parametrize("F", [8192 + 8, 8192 + 4, 24, 4])
@pytest.mark.parametrize("offset", [0, 4, 8])
def test_rows_that_are_read_in_chunks(
    impl: Emulated, dtype: torch.dtype, F: int, offset: int
) -> None:
    """8 columns, 4 or one at a time, as length and place of the rows allow; the last chunks of a
    row begin within a batch of loads and end before it does."""
    N = 2
    memory = randn(N * F + offset, dtype=dtype)
    x = memory[offset:].view(N, F)
    x[0, -1], x[1, -2], x[1, F // 2] = 9.0, torch.nan, -torch.inf
    for k in (1, 4):
        for got, want in zip(impl.topk(x, k), reference.topk(x, k), strict=True):
            assert_same(f"k={k}", got, want)


def test_encode_in_chunks_of_rows(
    impl: Emulated, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    N, d, F, k = 19, 17, 130, 9
    x, W, b = (integers(*s, dtype=dtype, seed=i) for i, s in enumerate([(N, d), (F, d), (F,)]))
    want = reference.topk_encode(x, W, b, k)
    for rows in (0, 1, 5, 19):
        monkeypatch.setattr(products, "chunk_bytes", rows * F * 4 + 3)
        for got, w in zip(impl.topk_encode(x, W, b, k), want, strict=True):
            assert_same(f"{rows} rows", got, w)


# ---------------------------------------------------------------------------------------- grouping


@pytest.mark.parametrize(
    ("N", "F", "k"),
    [(1, 1, 1), (700, 3, 3), (257, 511, 8), (300, 512, 8), (70, 5000, 33), (3, 300_000, 9)],
    ids=lambda n: str(n),
)
@pytest.mark.implementations(*ON_CUDA)
def test_grouping_in_tiles_and_passes(impl: Emulated, N: int, F: int, k: int) -> None:
    """One to four tiles, one to three passes, full tiles and a rest, a latent of every token."""
    values, indices = code(N, F, k, torch.float32)
    indices[:, -1] = F - 1
    values[:, -1] = 1.0
    none, last = torch.zeros_like(values), torch.zeros_like(values)
    last[-1, -1] = torch.nan
    for v, i in ((values, indices), (values, indices.int()), (none, indices), (last, indices)):
        for name, got, want in zip(
            ("offsets", "order"),
            impl.group_by_latent(v, i, F),
            reference.group_by_latent(v, i, F),
            strict=True,
        ):
            assert_same(name, got, want)


# ------------------------------------------------------------------------------------ long segments


@pytest.mark.parametrize(("side", "d"), [("encoder", 7), ("decoder", 7), ("encoder", 1110)])
def test_hot_latents_are_cut(impl: Emulated, emulated: Emulator, side: str, d: int) -> None:
    """Segments of several cuts that begin and end inside of them, and two that share one; with
    1110 columns more to do than there are blocks. The same bits in another order of blocks."""
    N, F = 400, 23
    a = row_arguments(torch.float32, side, N=N, d=d, F=F, ks=(2, 3))
    for g, k in enumerate((2, 3)):
        values = torch.rand(N, k, generator=torch.Generator().manual_seed(g))
        indices = torch.full((N, k), 2)
        indices[:, 1] = 4
        indices[::50] = 5
        indices[1::50, 0] = 0
        a["offsets"][g], a["order"][g] = reference.group_by_latent(values, indices, F)
        a["coefficients"][g] = values
    assert int((a["offsets"][0][1:] - a["offsets"][0][:-1]).max()) > 256
    plain, again, exact = clone_all(a), clone_all(a), to_float64(a)
    got, want = (i.row_grad_sq(*norm_arguments(a)) for i in (impl, reference))
    eps = torch.finfo(torch.float32).eps
    assert_close("grad_sq", got, want, reference.row_grad_sq(*norm_arguments(exact)), eps)
    impl.row_update(*a.values())
    reference.row_update(*plain.values())
    reference.row_update(*exact.values())
    emulated.seed(5)
    emulated.blocks_in_flight(7)
    impl.row_update(*again.values())
    for name, t in written(a).items():
        assert_close(name, t, written(plain)[name], written(exact)[name])
        assert torch.equal(t, written(again)[name]), name


@pytest.mark.parametrize("T", DTYPES, ids=dtype_id)
def test_sums_of_hot_latents_are_cut(impl: Emulated, emulated: Emulator, T: torch.dtype) -> None:
    """Segments of one to three cuts that begin anywhere: the sums, and the same bits always."""
    N, F = 700, 9
    lists: dict[str, list[Tensor]] = {"values": [], "grads": [], "offsets": [], "order": []}
    for g, k in enumerate((2, 3)):
        values = randn(N, k, dtype=T, seed=g).abs() + 0.5
        indices = torch.arange(N * k).reshape(N, k) % 7 // 5 * 3 + 2  # latents 2 and 5
        indices[::9, 0] = 1
        offsets, order = reference.group_by_latent(values, indices, F)
        grads = randn(N, k, seed=g + 9)
        for name, t in zip(lists, (values, grads, offsets, order), strict=True):
            lists[name].append(t)
    a: dict[str, Any] = lists | {"scales": torch.tensor([0.5, 0.03])}
    plain, exact = (
        reference.latent_sums(*a.values()),
        reference.latent_sums(*to_float64(a).values()),
    )
    got = impl.latent_sums(*a.values())
    for name, g, p, e in zip(("grad_b_enc", "grad_dot_w"), got, plain, exact, strict=True):
        assert_close(name, g, p, e)
    emulated.seed(5)
    emulated.blocks_in_flight(7)
    assert all(map(torch.equal, got, impl.latent_sums(*a.values())))


def called(emulated: Emulator, op: str, sizes: dict[str, int], allocate: object) -> None:
    """Call an op of the module with these fields, one group, and 0 for the rest."""

    def values(fields: tuple[object, ...]) -> tuple[object, ...]:
        return tuple([values(f)] if isinstance(f, tuple) else sizes.get(f, 0) for f in fields)

    getattr(emulated.module, op)(*values(emulated.module.fields[op]), allocate, 0)


def test_the_workspace_of_many_entries_is_bounded(emulated: Emulator) -> None:
    """AuxK with d=4096 has 2^24 to 2^27 entries; pieces of units of 256 would be 2 to 17 GB."""
    F, d, sizes = 131_072, 4096, []

    class Asked(Exception):
        pass

    def allocate(size: int) -> int:
        sizes.append(size)
        raise Asked

    for entries in (2**19, 2**20, 2**24, 2**27, 2**31 - 1):
        sized = {"F": F, "d": d, "columns": d, "k": d // 2, "order_size": entries}
        with pytest.raises(Asked):
            called(emulated, "row_grad_sq", sized, allocate)
    pieces = 2 * 4096 * d * 4
    assert sizes[0] < 0.6 * pieces and pieces <= sizes[1] and max(sizes) < 1.01 * pieces


@pytest.mark.parametrize("T", [torch.float32, torch.bfloat16], ids=dtype_id)
@pytest.mark.implementations(*ON_CUDA)
@pytest.mark.parametrize(("F", "d"), [(5, 11 * 1024 + 5), (3073 * 8, 5), (9, 8)], ids=str)
def test_parts_of_the_gradient_of_b_dec(impl: Emulated, T: torch.dtype, F: int, d: int) -> None:
    """A part in the workspace; shares of nine latents, the last shorter; one latent."""
    a = row_arguments(T, "encoder", N=3, d=d, F=F, ks=(2,))
    a["grad_b_enc"] = integers(F)
    a["W"] = integers(F, d, dtype=T, seed=1)
    if a["master"] is not None:
        a["master"] = a["W"].float()
    a["grad_b_dec"].fill_(torch.nan)
    want = a["W"].double().T @ a["grad_b_enc"].double()
    impl.row_update(*a.values())
    assert_same("grad_b_dec", a["grad_b_dec"].double(), want)


# ------------------------------------------------------------------------------------ unused slots


@pytest.mark.parametrize("used", [[], [0, 1], [2, 40, 99]], ids=str)
def test_slots_of_value_0_are_passed_over(
    impl: Emulated, dtype: torch.dtype, used: list[int]
) -> None:
    """AuxK's, most of them without a latent: none of 100 used, the first, some of the 1st, 2nd and
    4th 32. What the others name is infinite."""
    N, d, F, k = 3, 21, 33, 100
    values, indices = torch.zeros(N, k, dtype=dtype), torch.full((N, k), 7)
    values[:, used] = integers(N, len(used), dtype=dtype).abs() + 1
    values[1, used[:1]] = 0
    indices[:, used] = 8 + torch.arange(N * len(used)).view(N, -1)
    W, target = integers(F, d, dtype=dtype), integers(N, d, dtype=dtype, seed=1)
    W[:8] = torch.inf
    for b_dec in (None, target[0]):
        args = (values, indices, W, b_dec)
        assert_same("decode", impl.sparse_decode(*args), reference.sparse_decode(*args))
        got = impl.sparse_residual(*args, target, d)
        want = reference.sparse_residual(*args, target, d)
        for name, g, w in zip(("residual", "squares", "grads"), got, want, strict=True):
            assert_same(name, g, w)


# ------------------------------------------------------------------------- sums of residual columns


@pytest.mark.parametrize(("N", "d"), [(0, 5), (1, 33), (2060, 9), (3, 11 * 1024 + 5)])
def test_column_sums_beside_the_residual(
    impl: Emulated, emulated: Emulator, dtype: torch.dtype, N: int, d: int
) -> None:
    """One token a block and several, rows in shared memory and in the workspace; the other results
    are the same bits as without the sums."""
    F, k = 7, 2
    values, indices = code(N, F, k, dtype)
    W, b, x = (randn(*s, dtype=dtype, seed=i) for i, s in enumerate([(F, d), (d,), (N, d)]))
    sums, again = torch.full((d,), torch.nan), torch.full((d,), torch.nan)
    got = impl.sparse_residual(values, indices, W, b, x, d // 2, sums)
    for t, want in zip(got, impl.sparse_residual(values, indices, W, b, x, d // 2), strict=True):
        assert torch.equal(t, want)
    plain, exact = torch.zeros(d), torch.zeros(d, dtype=torch.float64)
    reference.sparse_residual(values, indices, W, b, x, d, plain)
    wide = (t.double() for t in (W, b, x))
    reference.sparse_residual(values.double(), indices, *wide, d, exact)
    assert_close("sums", sums, plain, exact)
    emulated.seed(5)
    emulated.blocks_in_flight(7)
    impl.sparse_residual(values, indices, W, b, x, 0, again)
    assert torch.equal(sums, again)


@pytest.mark.parametrize("d", [24, 33])
@pytest.mark.parametrize("offsets", [None, torch.tensor([0, 0, 3, 14])], ids=["k a row", "offsets"])
def test_the_residual_in_the_dtype_of_the_weights(
    impl: Emulated, dtype: torch.dtype, d: int, offsets: Tensor | None
) -> None:
    """Beside what is returned, which it does not change, and no columns of that."""
    N, F, k = 3, 7, 2
    values, indices = code(N, F, k, dtype) if offsets is None else code(14, F, 1, dtype)
    W, b, x = (randn(*s, dtype=dtype, seed=i) for i, s in enumerate([(F, d), (d,), (N, d)]))
    args = (values, indices, W, b, x)
    rounded, sums, plain = torch.empty(N, d, dtype=dtype), torch.empty(d), torch.empty(d)
    whole, *want = impl.sparse_residual(*args, d, plain, offsets)
    none, *got = impl.sparse_residual(*args, 0, sums, offsets, rounded)
    assert none.shape == (N, 0) and torch.equal(rounded, whole.to(dtype))
    assert all(map(torch.equal, [*got, sums], [*want, plain]))


# ---------------------------------------------------------------------------------------- alignment


@pytest.mark.parametrize("offset", [1, 2, 4])
def test_rows_that_begin_anywhere(impl: Emulated, dtype: torch.dtype, offset: int) -> None:
    begin_anywhere(impl.kernels, dtype, offset, "cpu")


# -------------------------------------------------------------------------------------- determinism


def test_bits_do_not_depend_on_the_order_of_threads_and_blocks(
    impl: Emulated, emulated: Emulator, dtype: torch.dtype
) -> None:
    N, d, F, k = 23, 40, 97, 17
    x, W, b = (randn(*s, dtype=dtype, seed=i) for i, s in enumerate([(N, d), (F, d), (F,)]))
    results = []
    for seed, blocks in ((1, 1), (2, 3), (77, 5)):
        emulated.seed(seed)
        emulated.blocks_in_flight(blocks)
        out: list[Tensor] = [*impl.topk(scores("ties", 3, 1500, dtype), 100)]
        values, indices = impl.topk_encode(x, W, b, k)
        out += (values, indices, impl.sparse_decode(values, indices, W))
        out += impl.sparse_residual(values, indices, W, x[0], x, d)
        out.append(impl.sparse_residual_slice(values, indices, W, None, x, 3, 11))
        out.append(impl.sparse_decode_backward_values(x, indices, W))
        hot = torch.where(indices < 80, 3, indices)
        out += impl.sparse_decode_backward_weight(x, values, hot, F)
        out += impl.group_by_latent(values, hot, F)
        out += impl.latent_sums(*sums_arguments(dtype, N=61, F=97).values())
        for side in ("encoder", "decoder"):
            a = row_arguments(dtype, side)
            out.append(impl.row_grad_sq(*norm_arguments(a)))
            impl.row_update(*a.values())
            out += written(a).values()
        results.append(out)
    for other in results[1:]:
        assert all(torch.equal(t, o) for t, o in zip(results[0], other, strict=True))


# ------------------------------------------------------------------------------------------- errors


def test_a_failed_launch_names_op_error_and_sizes(impl: Emulated) -> None:
    values, indices = code(3, 9, 2, torch.float32)
    unknown = 9  # no storage type
    with pytest.raises(RuntimeError, match=r"sparse_decode with N=3, d=4, F=9, k=2: CUDA error 1 "):
        impl.kernels.module.sparse_decode(
            3, 4, 9, 2, unknown, values.data_ptr(), indices.data_ptr(), 8, 0, 0, 0, False, 0
        )


def test_every_op_has_a_kernel_of_its_name_and_arguments(emulated: Emulator) -> None:
    methods = {n for n in dir(Kernels) if not n.startswith("_")} - {"kernel", "bf16_copy"}
    methods -= {n for n in methods if n.startswith("screened_")}  # another way of an op
    stated = set(emulated.module.fields)
    assert methods | stated == set(NAMES) - NOT_ON_GPUS and not methods & stated
    for op in methods | stated:
        takes_arguments_of(Kernels(emulated.module).kernel(BY_NAME[op]), op)
