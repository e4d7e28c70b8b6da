// SPDX-License-Identifier: Apache-2.0
// Python module ksae._cpu over ksae/cpu.h. Pointers are integers; python/ksae/native.py makes them
// from tensors and owns every check. Kernels run without the GIL.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "ksae/cpu.h"

namespace py = pybind11;
using namespace ksae::cpu;

namespace {

using Pointer = uintptr_t;

template <class T>
T* as(Pointer p) {
  return reinterpret_cast<T*>(p);
}

// Where a kernel needs memory, the caller supplies an allocator (torch's): bytes -> address.
template <class Params, class Query, class Run>
void with_workspace(const Params& p, const py::function& allocate, int threads, Query query,
                    Run run) {
  const size_t bytes = query(p, threads);
  void* workspace = as<void>(allocate(bytes).cast<Pointer>());
  py::gil_scoped_release release;
  run(p, workspace, threads);
}

// Indices come with their width in bytes.
struct Indices {
  const int64_t* i64;
  const int32_t* i32;
  Indices(Pointer p, int bytes)
      : i64(bytes == 8 ? as<const int64_t>(p) : nullptr),
        i32(bytes == 4 ? as<const int32_t>(p) : nullptr) {}
};

using Group = std::tuple<Pointer, Pointer, Pointer, Pointer, int64_t>;

LatentParams latent_params(int64_t N, int64_t d_in, int64_t d_out, int64_t F, int dtype, Pointer x,
                           Pointer b_dec, const std::vector<Group>& from,
                           std::vector<LatentGroup>& groups, Pointer scales, Pointer W_enc,
                           Pointer b_enc, Pointer W_dec, bool project, Pointer grad_b_dec) {
  for (const auto& [values, offsets, order, residual, k] : from)
    groups.push_back({as<const void>(values), as<const int32_t>(offsets), as<const int32_t>(order),
                      as<const float>(residual), k});
  LatentParams p{};
  p.N = N;
  p.d_in = d_in;
  p.d_out = d_out;
  p.F = F;
  p.dtype = Dtype(dtype);
  p.x = as<const void>(x);
  p.b_dec = as<const void>(b_dec);
  p.groups = groups.data();
  p.scales = as<const float>(scales);
  p.n_groups = int(groups.size());
  p.W_enc = as<void>(W_enc);
  p.b_enc = as<void>(b_enc);
  p.W_dec = as<void>(W_dec);
  p.project = project;
  p.grad_b_dec = as<float>(grad_b_dec);
  return p;
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "ksae's native CPU kernels.";
  m.def("isa", [] { return std::string(level_name(current_level())); });
  m.def("isas", [] {
    std::vector<std::string> names;
    for (int level = 0; level < kLevels; ++level)
      if (level_available(level)) names.push_back(level_name(level));
    return names;
  });
  m.def("set_isa", [](const std::string& name) {
    for (int level = 0; level < kLevels; ++level)
      if (name == level_name(level) && set_level(level)) return;
    throw std::invalid_argument("set_isa: name must be an instruction set of this machine, got '" +
                                name + "'");
  });
  m.def("openmp", openmp_threads);
  m.def("can_screen", can_screen);

  m.def("topk", [](int64_t N, int64_t F, int64_t k, int dtype, Pointer x, Pointer values,
                   Pointer indices, const py::function& allocate, int threads) {
    const TopkParams p{N, F, k, Dtype(dtype), as<const void>(x), as<void>(values),
                       as<int64_t>(indices)};
    with_workspace(p, allocate, threads, topk_workspace, topk);
  });
  m.def("topk_encode", [](int64_t N, int64_t d, int64_t F, int64_t k, int dtype, Pointer x,
                          Pointer W_enc, Pointer b_enc, Pointer b_dec, Pointer mask, Pointer values,
                          Pointer indices, bool screen, float slack, const py::function& allocate,
                          int threads) {
    EncodeStats stats{};
    const EncodeParams p{N, d, F, k, Dtype(dtype), as<const void>(x), as<const void>(W_enc),
                         as<const void>(b_enc), as<const void>(b_dec), as<const uint8_t>(mask),
                         as<void>(values), as<int64_t>(indices), screen, slack, &stats};
    with_workspace(p, allocate, threads, topk_encode_workspace, topk_encode);
    return std::make_tuple(stats.screened_rows, stats.survivors, stats.redone_rows);
  });
  m.def("sparse_decode", [](int64_t N, int64_t d, int64_t F, int64_t k, int dtype, Pointer values,
                            Pointer indices, int index_bytes, Pointer W_dec, Pointer b_dec,
                            Pointer out, int threads) {
    const Indices i(indices, index_bytes);
    py::gil_scoped_release release;
    sparse_decode({N, d, F, k, Dtype(dtype), as<const void>(values), i.i64, i.i32,
                   as<const void>(W_dec), as<const void>(b_dec), as<void>(out)},
                  threads);
  });
  m.def("sparse_residual", [](int64_t N, int64_t d, int64_t F, int64_t k, int dtype, Pointer values,
                              Pointer indices, int index_bytes, Pointer W_dec, Pointer b_dec,
                              Pointer target, Pointer residual, Pointer sq_error, int threads) {
    const Indices i(indices, index_bytes);
    py::gil_scoped_release release;
    sparse_residual({{N, d, F, k, Dtype(dtype), as<const void>(values), i.i64, i.i32,
                      as<const void>(W_dec), as<const void>(b_dec), nullptr},
                     as<const void>(target), as<float>(residual), as<double>(sq_error)},
                    threads);
  });
  m.def("sparse_decode_backward_values",
        [](int64_t N, int64_t d, int64_t F, int64_t k, int dtype, Pointer grad, Pointer indices,
           int index_bytes, Pointer W_dec, Pointer grad_values, int threads) {
          const Indices i(indices, index_bytes);
          py::gil_scoped_release release;
          sparse_decode_backward_values({N, d, F, k, Dtype(dtype), as<const void>(grad), i.i64,
                                         i.i32, as<const void>(W_dec), as<void>(grad_values)},
                                        threads);
        });
  m.def("sparse_decode_backward_weight",
        [](int64_t N, int64_t d, int64_t F, int64_t k, int dtype, Pointer grad, Pointer values,
           Pointer indices, int index_bytes, Pointer grad_W, Pointer value_sum,
           const py::function& allocate, int threads) {
          const Indices i(indices, index_bytes);
          const DecodeBackwardWeightParams p{
              N,     d,     F,     k, Dtype(dtype), as<const void>(grad), as<const void>(values),
              i.i64, i.i32, as<void>(grad_W), as<void>(value_sum)};
          with_workspace(p, allocate, threads, sparse_decode_backward_weight_workspace,
                         sparse_decode_backward_weight);
        });
  m.def("group_by_latent", [](int64_t N, int64_t F, int64_t k, int dtype, Pointer values,
                              Pointer indices, int index_bytes, Pointer offsets, Pointer order,
                              const py::function& allocate, int threads) {
    const Indices i(indices, index_bytes);
    const GroupParams p{N,     F,     k, Dtype(dtype), as<const void>(values), i.i64,
                        i.i32, as<int32_t>(offsets), as<int32_t>(order)};
    with_workspace(p, allocate, threads, group_by_latent_workspace, group_by_latent);
  });
  m.def("latent_update", [](int64_t N, int64_t d_in, int64_t d_out, int64_t F, int dtype, Pointer x,
                            Pointer b_dec, const std::vector<Group>& from, Pointer scales,
                            Pointer W_enc, Pointer b_enc, Pointer W_dec,
                            const std::vector<Pointer>& masters,
                            const std::vector<Pointer>& moments, Pointer hyper, Pointer grad_b_dec,
                            bool project, bool normalize, const py::function& allocate,
                            int threads) {
    std::vector<LatentGroup> groups;
    LatentParams p = latent_params(N, d_in, d_out, F, dtype, x, b_dec, from, groups, scales, W_enc,
                                   b_enc, W_dec, project, grad_b_dec);
    for (size_t j = 0; j < masters.size(); ++j) p.master[j] = as<float>(masters[j]);
    for (size_t j = 0; j < 6; ++j) p.moments[j] = as<float>(moments.at(j));
    p.hyper = as<const float>(hyper);
    p.normalize = normalize;
    with_workspace(p, allocate, threads, latent_workspace, latent_update);
  });
  m.def("latent_grad_norm", [](int64_t N, int64_t d_in, int64_t d_out, int64_t F, int dtype,
                               Pointer x, Pointer b_dec, const std::vector<Group>& from,
                               Pointer scales, Pointer W_enc, Pointer b_enc, Pointer W_dec,
                               bool project, Pointer grad_sq, Pointer grad_b_dec,
                               const py::function& allocate, int threads) {
    std::vector<LatentGroup> groups;
    LatentParams p = latent_params(N, d_in, d_out, F, dtype, x, b_dec, from, groups, scales, W_enc,
                                   b_enc, W_dec, project, grad_b_dec);
    p.grad_sq = as<double>(grad_sq);
    with_workspace(p, allocate, threads, latent_workspace, latent_grad_norm);
  });
}
