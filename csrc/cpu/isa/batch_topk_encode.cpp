// SPDX-License-Identifier: Apache-2.0
// batch_topk_encode, serial parts: what happens to the candidates of a batch, of which the wanted
// best are the result (E = N k; scoring and gate: topk_encode.cpp, order of work:
// ../batch_topk_encode.cpp).
//
// A list holds every score above a gate. If E of its scores are at least T and T is above the gate,
// nothing outside can win: the count proves the gate, however it was guessed.
// Screened scores s^ with margins m: T = the E-th largest s^ - m bounds the E-th score from below;
// s^ + m < T loses. The rest is rescored by the float32 chain, so that the result is that of
// float32.
#include "topk_encode.h"

namespace ksae::cpu::KSAE_ISA {
namespace {

void sample(const EncodeChunk& c, int64_t r, BatchList& list) {
  const float* score = c.score + r * c.capacity;
  const int32_t* index = c.index + r * c.capacity;
  const bool screen = c.scoring == Scoring::kScreen;
  for (int64_t i = 0; i < c.count[r]; ++i)
    list.score[list.n++] = screen ? score[i] - margin(c, r, index[i]) : score[i];
}

void collect(const EncodeChunk& c, int64_t r, const float* score, const int32_t* index,
             int64_t count, float tau, BatchList& list) {
  const auto row = int32_t(row_of(c, r));
  int64_t n = list.n;
  for (int64_t i = 0; i < count; ++i) {
    list.score[n] = score[i];
    list.latent[n] = index[i];
    list.row[n] = row;
    const float s = c.scoring == Scoring::kScreen ? score[i] + margin(c, r, index[i]) : score[i];
    n += !(s <= tau);
  }
  list.n = n;
}

float threshold(const BatchList& list, int64_t wanted) {
  for (int64_t i = 0; i < list.n; ++i) list.keys[i] = order_key(list.score[i]);
  return order_score(kth_key(list.keys, list.n, wanted));
}

float margin_of(const EncodeChunk& c, const BatchList& list, int64_t i) {
  return list.exact[list.row[i]] ? 0.0f : margin(c, list.row[i], list.latent[i]);
}

void move(BatchList& list, int64_t to, int64_t from) {
  list.score[to] = list.score[from];
  list.latent[to] = list.latent[from];
  list.row[to] = list.row[from];
}

// `c` has the bounds of all rows.
float prune(const EncodeChunk& c, BatchList& list, int64_t wanted) {
  for (int64_t i = 0; i < list.n; ++i)
    list.keys[i] = order_key(list.score[i] - margin_of(c, list, i));
  const float least = order_score(kth_key(list.keys, list.n, wanted));
  int64_t out = 0;
  for (int64_t i = 0; i < list.n; ++i) {
    move(list, out, i);
    out += !(list.score[i] + margin_of(c, list, i) < least);
  }
  list.n = out;
  return least;
}

float keep(BatchList& list, int64_t wanted) {
  for (int64_t i = 0; i < list.n; ++i) list.keys[i] = order_key(list.score[i]);
  const uint32_t kth = kth_key(list.keys, list.n, wanted);
  int64_t equal = wanted, out = 0;
  for (int64_t i = 0; i < list.n; ++i) equal -= list.keys[i] > kth;
  for (int64_t i = 0; i < list.n; ++i) {
    move(list, out, i);
    out += list.keys[i] > kth || (list.keys[i] == kth && equal-- > 0);
  }
  list.n = out;
  // All are NaN: only NaN will still pass.
  return kth == 0xffffffffu ? __builtin_inff() : order_score(kth);
}

void rescore(const EncodeChunk& c, BatchList& list, int64_t from, int64_t to) {
  const int64_t d = c.p->d;
  const auto* W = static_cast<const float*>(c.p->W_enc);
  const auto* X = static_cast<const float*>(c.p->x);
  const uint32_t* order = list.keys + from;
  const auto place = [&](int64_t i, const float*& w, const float*& x) {
    w = W + list.latent[order[i]] * d;
    x = X + list.row[order[i]] * d;
  };
  rescore_pairs(c, to - from, place, [&](int64_t i, float score) {
    list.score[order[i]] = score + c.bias[list.latent[order[i]]];
  });
}

void write(const BatchList& list, const BatchEncodeParams& p) {
  for (int64_t n = 0; n <= p.encode.N; ++n) p.row_offsets[n] = 0;
  for (int64_t i = 0; i < list.n; ++i) ++p.row_offsets[list.row[i] + 1];
  for (int64_t n = 0; n < p.encode.N; ++n) p.row_offsets[n + 1] += p.row_offsets[n];
  for (int64_t i = 0; i < list.n; ++i) p.encode.indices[i] = list.latent[i];
  with_dtype(p.encode.dtype, [&](auto tag) {
    auto* values = static_cast<typename decltype(tag)::type*>(p.encode.values);
    for (int64_t i = 0; i < list.n; ++i)
      from_float(list.score[i] <= 0 ? 0.0f : list.score[i], values[i]);
  });
}

}  // namespace

void batch_topk_encode_table(Kernels& t) {
  t.batch_encode = {sample, collect, threshold, prune, keep, rescore, write};
}

}  // namespace ksae::cpu::KSAE_ISA
