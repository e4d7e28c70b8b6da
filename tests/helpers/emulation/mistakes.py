# SPDX-License-Identifier: Apache-2.0
"""Mistakes that are put into the CUDA kernels, by name: the inputs of mutants.py that see it, and
what is wrong."""

from __future__ import annotations

from typing import NamedTuple


class Mutant(NamedTuple):
    file: str
    old: str
    new: str  # WRONG stands for: this mutant is on


MUTANTS = {
    # ------------------------------------------------------------------------------------- select
    "select: missing barrier": Mutant(
        "topk.cu",
        "  __syncthreads();\n\n  const int listed",
        "  if (!WRONG) __syncthreads();\n\n  const int listed",
    ),
    "select: off by one": Mutant(
        "topk.cu", "if (maxima[g] >= bound)", "if (maxima[g] >= bound + WRONG)"
    ),
    "select: another digit": Mutant(
        "keys.h", "digit = 248 - 8 * lane + b;", "digit = 248 - 8 * lane + b + WRONG;"
    ),
    "select: overflow unseen": Mutant(
        "topk.cu",
        "if (state[1] > static_cast<uint32_t>(plan.capacity))",
        "if (!WRONG && state[1] > static_cast<uint32_t>(plan.capacity))",
    ),
    "select: dropped overflow": Mutant(
        "topk.cu",
        "state[1] = static_cast<uint32_t>(p.k);",
        "state[1] = WRONG ? 0 : static_cast<uint32_t>(p.k);",
    ),
    "select: capacity ignored": Mutant(
        "topk.cu",
        "if (count + kRound > plan.capacity &&",
        "if (!WRONG && count + kRound > plan.capacity &&",
    ),
    "select: wrong tie order": Mutant(
        "keys.h", "if ((a < b) ==", "if ((WRONG ? a >> 32 < b >> 32 : a < b) =="
    ),
    "select: equal scores share a slot": Mutant(
        "topk.cu",
        "slot += keys[j] > key;",
        "slot += WRONG ? keys[j] >> 32 > key >> 32 : keys[j] > key;",
    ),
    "select: lost tail": Mutant(
        "topk.cu", "if (e >= valid) continue;", "if (e >= valid - WRONG) continue;"
    ),
    "select: lost chunk": Mutant(
        "topk.cu", "if (at[u] < p.F) append(", "if (at[u] < p.F - 4 * WRONG) append("
    ),
    "select: NaN by its sign": Mutant(
        "keys.h", "if (s != s) return", "if (!WRONG && s != s) return"
    ),
    "select: wrong mask": Mutant(
        "topk.cu",
        "m = max(m, __shfl_xor_sync(0xffffffffu, m, o))",
        "m = max(m, __shfl_xor_sync(WRONG ? 0x0000ffffu : 0xffffffffu, m, o))",
    ),
    "select: a lane left out": Mutant(
        "topk.cu",
        "for (int o = 1; o < lanes; o <<= 1) {",
        "for (int o = 1 + WRONG; o < lanes; o <<= 1) {",
    ),
    "select: barrier in a branch": Mutant(
        "topk.cu",
        "  const uint32_t bound = bound_of(",
        "  if (WRONG && threadIdx.x < 100) __syncthreads();\n  const uint32_t bound = bound_of(",
    ),
    "select: listed one late": Mutant(
        "columns.cu", "((1u << lane) - 1)", "((WRONG ? 2u << lane : 1u << lane) - 1)"
    ),
    "select: fills one slot late": Mutant(
        "keys.h", "slot += count - own;", "slot += count - own + WRONG;"
    ),
    "select: scored by no gradient": Mutant(
        "topk.cu", "(!p.informed || p.informed[n])", "(WRONG || !p.informed || p.informed[n])"
    ),
    # ------------------------------------------------------------------------------------- screen
    "screen: no margin below": Mutant(
        "screened_select.cu", "const float low = s - m;", "const float low = s - (WRONG ? 0 : m);"
    ),
    "screen: no margin above": Mutant(
        "screened_select.cu",
        "const uint32_t u = ordered(s + m);",
        "const uint32_t u = ordered(WRONG ? s : s + m);",
    ),
    "screen: groups without a margin": Mutant(
        "screened_select.cu", "list[g] = ordered(s + m);", "list[g] = ordered(WRONG ? s : s + m);"
    ),
    "screen: the row's rounding left out": Mutant(
        "norms.h",
        "of_rounded = lost + g * (rounded + full);",
        "of_rounded = WRONG ? 0 : lost + g * (rounded + full);",
    ),
    "screen: the latent's rounding left out": Mutant(
        "norms.h", "of_lost = full * (1 + g);", "of_lost = WRONG ? 0 : full * (1 + g);"
    ),
    "screen: a lane's norms left out": Mutant(
        "screened_select.cu",
        "  for (int o = 16; o > 0; o >>= 1) {\n    lost = fmaxf",
        "  for (int o = WRONG ? 8 : 16; o > 0; o >>= 1) {\n    lost = fmaxf",
    ),
    "screen: overflow unseen": Mutant(
        "screened_select.cu",
        "if (count > plan.capacity) {",
        "if (!WRONG && count > plan.capacity) {",
    ),
    "screen: missing barrier": Mutant(
        "screened_select.cu",
        "  __syncthreads();\n  const auto count = static_cast<int>(state[1]);",
        "  if (!WRONG) __syncthreads();\n  const auto count = static_cast<int>(state[1]);",
    ),
    "screen: the mask forgotten": Mutant(
        "screened_select.cu",
        "if (i + e >= p.F || (p.mask && !p.mask[i + e])) continue;",
        "if (i + e >= p.F || (!WRONG && p.mask && !p.mask[i + e])) continue;",
    ),
    "screen: rows of the first chunk": Mutant(
        "screened_select.cu",
        "const int64_t n = p.first + blockIdx.x;",
        "const int64_t n = (WRONG ? 0 : p.first) + blockIdx.x;",
    ),
    "screen: a listed row lost": Mutant(
        "screened_redo.cu",
        "const int64_t n = p.list[item / parts], part",
        "const int64_t n = p.list[WRONG ? 0 : item / parts], part",
    ),
    "screen: parts overlap": Mutant(
        "screened_redo.cu",
        "int64_t last = rounds * (part + 1) / parts * kRound;",
        "int64_t last = (WRONG + rounds * (part + 1) / parts) * kRound;",
    ),
    "screen: narrowed to fewer": Mutant(
        "screened_redo.cu", "*least = keys[k - 1] + 1;", "*least = keys[WRONG ? 0 : k - 1] + 1;"
    ),
    "screen: a part not merged": Mutant(
        "screened_redo.cu", "e0 < parts * p.k;", "e0 < (parts - WRONG) * p.k;"
    ),
    "screen: sums of another order": Mutant(
        "screen.h",
        "for (int64_t c = 4 * (threadIdx.x % 32); c < d; c += 128)",
        "for (int64_t c = 4 * (threadIdx.x % 32); c < d - 128 * WRONG; c += 128)",
    ),
    "screen: copies lost": Mutant(
        "bf16_copy.cu", "squares.add(t.x[j]);", "squares.add(WRONG ? 0 : t.x[j]);"
    ),
    # ------------------------------------------------------------------------------------- decode
    "decode: missing barrier": Mutant(
        "sparse_decode.cu",
        "square = block_sum(square, scratch);  // a barrier: the row is complete",
        "square = WRONG ? warp_sum(square) : block_sum(square, scratch);",
    ),
    "decode: off by one": Mutant(
        "sparse_decode.cu",
        "__shfl_sync(0xffffffffu, i, j + b);",
        "__shfl_sync(0xffffffffu, i, j + b - (WRONG && j + b == 31));",
    ),
    "decode: dropped overflow": Mutant(
        "sparse_decode.cu", "rows ? rows + ", "rows ? rows + (WRONG ? 0 : 1) * "
    ),
    "decode: wrong order of slices": Mutant(
        "sparse_decode.cu",
        "(first + at / q.N) * kSlice",
        "(first + (WRONG ? 0 : at / q.N)) * kSlice",
    ),
    "decode: lost tail": Mutant(
        "sparse_decode.cu",
        "return kAligned ? 4 : d - c;",
        "return kAligned ? 4 : d - c - WRONG;",
    ),
    "decode: a zero meets infinity": Mutant(
        "sparse_decode.cu",
        "if (by[b] != 0) w[b] =",
        "if (WRONG) by[b] = by[b] == 0 ? 1e-30f : by[b];\n        if (by[b] != 0) w[b] =",
    ),
    "decode: one unused slot hides 32": Mutant(
        "sparse_decode.cu",
        "j < 32 && used >> j;",
        "j < 32 && used >> j && !(WRONG && ~used);",
    ),
    "decode: product of another slot": Mutant(
        "sparse_decode.cu", "if (lane == from) g =", "if (lane == from + WRONG) g ="
    ),
    "decode: a row's entries end late": Mutant(
        "sparse_decode.cu",
        "to(static_cast<int32_t>(p.row_offsets[n + 1]))",
        "to(static_cast<int32_t>(p.row_offsets[n + 1]) + WRONG)",
    ),
    "decode: product with another row": Mutant(
        "sparse_decode.cu",
        "p.row_of ? p.row_of[at] : at / p.k",
        "p.row_of && !WRONG ? p.row_of[at] : at / p.k",
    ),
    # -------------------------------------------------------------------------------------- group
    "group: missing barrier of the warp": Mutant(
        "group_by_latent.cu",
        "__syncwarp();  // all have read",
        "if (!WRONG) __syncwarp();",
    ),
    "group: missing barrier of the block": Mutant(
        "group_by_latent.cu",
        "  __syncthreads();\n"
        "  for (int digit = threadIdx.x; digit < pass.bins; digit += kThreads) {\n"
        "    int32_t at",
        "  if (!WRONG) __syncthreads();\n"
        "  for (int digit = threadIdx.x; digit < pass.bins; digit += kThreads) {\n"
        "    int32_t at",
    ),
    "group: off by one": Mutant(
        "group_by_latent.cu",
        "if (pass.keys_out[middle] < i)",
        "if (WRONG ? pass.keys_out[middle] <= i : pass.keys_out[middle] < i)",
    ),
    "group: dropped overflow": Mutant(
        "group_by_latent.cu", "at += count;", "at += WRONG ? 0 : count;"
    ),
    "group: wrong tie order": Mutant(
        "group_by_latent.cu",
        "return before + __popc(earlier);",
        "return before + __popc(WRONG ? peers & ~earlier : earlier) - WRONG;",
    ),
    "group: lost tail": Mutant(
        "group_by_latent.cu",
        "used[r] = first + 32 * r < count;",
        "used[r] = first + 32 * r < count - WRONG;",
    ),
    "group: tail begins late": Mutant(
        "group_by_latent.cu", "if (at >= used)", "if (at >= used + WRONG)"
    ),
    # ------------------------------------------------------------------------------------- latent
    "latent: missing barrier": Mutant(
        "row_pass.h",
        "{  // the other columns count as well\n      __syncthreads();",
        "{\n      if (!WRONG) __syncthreads();",
    ),
    "latent: off by one": Mutant(
        "entries.h",
        "if (lane < count) {",
        "if (lane < count - WRONG) {",
    ),
    "latent: dropped overflow": Mutant(
        "row_pass.h",
        "    if (end - begin <= 1 << log) {",
        "    if (WRONG && end - begin > 1 << log) continue;\n    if (end - begin <= 1 << log) {",
    ),
    "latent: wrong order of entries": Mutant(
        "entries.h",
        "n = at / static_cast<uint32_t>(group.k);",
        "n = WRONG ? at % static_cast<uint32_t>(group.k) : at / static_cast<uint32_t>(group.k);",
    ),
    "latent: an entry of another row": Mutant(
        "entries.h", "if (group.row_of)", "if (group.row_of && !WRONG)"
    ),
    "latent: a warp leaves the rest of its share": Mutant(
        "entries.h", "e0 < to; e0 += 32", "e0 < to; e0 += WRONG ? to - from : 32"
    ),
    "latent: lost tail": Mutant(
        "row_pass.h", "if (j >= valid) continue;", "if (j >= valid - WRONG) continue;"
    ),
    "latent: a bf16 copy's lost part is not summed": Mutant(
        "norms.h",
        "lost = fmaf(t - r, t - r, lost);",
        "lost = fmaf(t - r, t - r, WRONG ? 0 : lost);",
    ),
    "latent: a quarter of the norms is missing": Mutant(
        "norms.h",
        "lost)) * (1 + 0x1p-18f);",
        "lost)) * (WRONG ? 0.75f : 1 + 0x1p-18f);",
    ),
    "latent: no floor under the squares": Mutant(
        "norms.h", "static_cast<float>(d) * 0x1p-126f", "(WRONG ? 0 : d) * 0x1p-126f"
    ),
    "latent: a norm that may overflow": Mutant(
        "norms.h", "safe = full <= 0x1p60f;", "safe = WRONG || full <= 0x1p60f;"
    ),
    "latent: a block keeps its first latent's part of b_dec alone": Mutant(
        "row_pass.h",
        "kPass == Pass::kCentre ? p.grad_b_enc[i] : 0;",
        "kPass == Pass::kCentre && !(WRONG && i % 8) ? p.grad_b_enc[i] : 0;",
    ),
    "latent: parts of b_dec begin anywhere": Mutant(
        "row_update.cu",
        "store4(centre + c, Four{}, p.d - c, kAligned);",
        "if (!WRONG) store4(centre + c, Four{}, p.d - c, kAligned);",
    ),
    "latent: the part of b_dec is of another row": Mutant(
        "row_pass.h", "fmaf(of_bias, w.x[j], sum.x[j]);", "fmaf(of_bias, w.x[j] + WRONG, sum.x[j]);"
    ),
    # --------------------------------------------------------------------------------------- sums
    "sums: off by one": Mutant(
        "latent_sums.cu",
        "threadIdx.x % 32); e < to; e += 32",
        "threadIdx.x % 32); e < to - WRONG; e += 32",
    ),
    "sums: dropped overflow": Mutant(
        "latent_sums.cu",
        "const int32_t last = (end - 1) >> log;",
        "const int32_t last = (WRONG ? begin : end - 1) >> log;",
    ),
    "sums: wrong order of pieces": Mutant(
        "latent_sums.cu",
        "u, begin)",
        "u, WRONG ? 0 : begin)",
    ),
    "sums: a unit's second piece forgotten": Mutant(
        "segments.h",
        "if (offsets[j + 1] - later > cut)",
        "if (!WRONG && offsets[j + 1] - later > cut)",
    ),
    "sums: a piece ends with its unit": Mutant(
        "segments.h", "from, end < to ? end : to};", "from, end < to && !WRONG ? end : to};"
    ),
    "sums: another latent is looked up": Mutant(
        "segments.h",
        "at < high && offsets[at] <= entry;",
        "at < high && offsets[at] <= entry - WRONG;",
    ),
    "sums: lost tail": Mutant(
        "latent_sums.cu", "if (i >= p.F) return;", "if (i >= p.F - WRONG) return;"
    ),
    # ------------------------------------------------------------------------- the small ops
    "variance: missing barrier": Mutant(
        "total_variance.cu",
        "of_lane[threadIdx.x] = sum;\n  __syncthreads();",
        "of_lane[threadIdx.x] = sum;\n  if (!WRONG) __syncthreads();",
    ),
    "variance: lost row": Mutant(
        "total_variance.cu", "if (n + b >= last)", "if (n + b >= last - WRONG)"
    ),
    "variance: an earlier block ends": Mutant(
        "total_variance.cu",
        "== static_cast<int>(gridDim.x) - 1;",
        "== static_cast<int>(gridDim.x) - 1 - WRONG;",
    ),
    "variance: lost share": Mutant("total_variance.cu", "s += kLanes)", "s += kLanes + WRONG)"),
    "variance: lost slice": Mutant(
        "total_variance.cu", "i < squares; i += kThreads", "i < squares - WRONG; i += kThreads"
    ),
    "scalars: off by one": Mutant(
        "loss_terms.cu", "n < term.N; n += kThreads", "n < term.N - WRONG; n += kThreads"
    ),
    "scalars: a term without denominator counts": Mutant(
        "loss_terms.cu", "g == 0 || below > 0", "WRONG || g == 0 || below > 0"
    ),
    "scalars: the step before": Mutant("adam_scalars.cu", "*p.t + 1", "*p.t + (WRONG ? 0 : 1)"),
    "scalars: a small gradient is left": Mutant(
        "adam_scalars.cu", "most = p.always ?", "most = p.always && !WRONG ?"
    ),
    "scalars: one rate": Mutant(
        "adam_scalars.cu", "p.hyper[0] * p.decoder_lr;", "p.hyper[0] * (WRONG ? 1 : p.decoder_lr);"
    ),
    "scalars: every step is taken": Mutant(
        "adam_scalars.cu", "= taken ? p.scales[g]", "= taken || WRONG ? p.scales[g]"
    ),
    "tokens: a bound is met": Mutant(
        "count_tokens.cu", "before > p.dead_after;", "before > p.dead_after - WRONG;"
    ),
    "tokens: those before": Mutant(
        "count_tokens.cu", "soon += after >", "soon += (WRONG ? before : after) >"
    ),
    "tokens: a run's end": Mutant(
        "count_tokens.cu",
        "first + run < p.F ? first + run",
        "first + run < p.F ? first + run - WRONG",
    ),
    "tokens: a block's counts": Mutant(
        "count_tokens.cu", "i < blocks; i +=", "i < blocks - WRONG; i +="
    ),
    "vector: lost tail": Mutant("vector_update.cu", "if (i >= p.size", "if (i >= p.size - WRONG"),
    "vector: lost gradient": Mutant(
        "vector_update.cu", "if (n < p.n_grads)", "if (n < p.n_grads - WRONG)"
    ),
}
