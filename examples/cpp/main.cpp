// SPDX-License-Identifier: Apache-2.0
// A forward pass of a TopK sparse autoencoder with ksae's CPU kernels: no torch, no Python.
//
// Every kernel takes a struct of raw pointers and sizes, a workspace that the caller allocates, and
// a thread count. Here: encode N tokens, decode them, and compare with the definition computed in
// float64. Prints the largest difference; the exit code says whether it is small.
#include <ksae/cpu.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

namespace {

constexpr int64_t kTokens = 64, kWidth = 96, kLatents = 1000, kActive = 8;
constexpr int kThreads = 2;

// Workspaces are aligned to 64 bytes; aligned_alloc wants a multiple of that.
struct Free {
  void operator()(void* p) const { std::free(p); }
};
std::unique_ptr<void, Free> workspace(size_t bytes) {
  return std::unique_ptr<void, Free>(std::aligned_alloc(64, (bytes / 64 + 1) * 64));
}

std::vector<float> random(int64_t count, float scale, std::mt19937& generator) {
  std::normal_distribution<float> normal(0.0f, scale);
  std::vector<float> out(count);
  std::generate(out.begin(), out.end(), [&] { return normal(generator); });
  return out;
}

}  // namespace

int main() {
  std::mt19937 generator(0);
  const auto x = random(kTokens * kWidth, 1.0f, generator);       // [N, d]
  const auto W_enc = random(kLatents * kWidth, 0.1f, generator);  // [F, d]
  const auto W_dec = random(kLatents * kWidth, 0.1f, generator);  // [F, d]
  const auto b_enc = random(kLatents, 0.1f, generator);           // [F]
  const auto b_dec = random(kWidth, 0.1f, generator);             // [d]
  std::vector<float> values(kTokens * kActive);                   // [N, k]
  std::vector<int64_t> indices(kTokens * kActive);                // [N, k]
  std::vector<float> recon(kTokens * kWidth);                     // [N, d]

  ksae::cpu::EncodeParams encode{};
  encode.N = kTokens;
  encode.d = kWidth;
  encode.F = kLatents;
  encode.k = kActive;
  encode.dtype = ksae::cpu::Dtype::kFloat32;
  encode.x = x.data();
  encode.W_enc = W_enc.data();
  encode.b_enc = b_enc.data();
  encode.b_dec = b_dec.data();
  encode.values = values.data();
  encode.indices = indices.data();
  encode.slack = 1.0f;
  const auto scratch = workspace(ksae::cpu::topk_encode_workspace(encode, kThreads));
  ksae::cpu::topk_encode(encode, scratch.get(), kThreads);

  ksae::cpu::DecodeParams decode{};
  decode.N = kTokens;
  decode.d = kWidth;
  decode.F = kLatents;
  decode.k = kActive;
  decode.dtype = ksae::cpu::Dtype::kFloat32;
  decode.values = values.data();
  decode.indices64 = indices.data();
  decode.W_dec = W_dec.data();
  decode.b_dec = b_dec.data();
  decode.out = recon.data();
  ksae::cpu::sparse_decode(decode, kThreads);

  double worst = 0;
  for (int64_t n = 0; n < kTokens; ++n) {
    std::vector<double> u(kLatents);
    for (int64_t f = 0; f < kLatents; ++f) {
      u[f] = b_enc[f];
      for (int64_t i = 0; i < kWidth; ++i) {
        u[f] += (double(x[n * kWidth + i]) - b_dec[i]) * W_enc[f * kWidth + i];
      }
    }
    std::vector<int64_t> order(kLatents);
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return u[a] > u[b]; });
    for (int64_t i = 0; i < kWidth; ++i) {
      double sum = b_dec[i];
      for (int64_t j = 0; j < kActive; ++j) {
        sum += std::max(u[order[j]], 0.0) * W_dec[order[j] * kWidth + i];
      }
      worst = std::max(worst, std::abs(sum - recon[n * kWidth + i]));
    }
  }
  std::printf("%s: largest difference from float64: %.2e\n",
              ksae::cpu::level_name(ksae::cpu::current_level()), worst);
  return worst < 1e-5 ? EXIT_SUCCESS : EXIT_FAILURE;
}
