// SPDX-License-Identifier: Apache-2.0
// Python module ksae._cpu over ksae/cpu.h. Pointers are integers; python/ksae/backends/ makes them
// from tensors and owns every check. Kernels run without the GIL. An op that states itself
// (ksae/op.h) needs nothing here.
#include "ksae/cpu.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <tuple>
#include <variant>
#include <vector>

#include "ops.h"

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

// A code's k entries a row, or a tuple of the address of a table in its place: row_offsets, or
// row_of where entries are taken by latent.
struct Rows {
  int64_t k = 1;
  const void* table = nullptr;
  using From = std::variant<int64_t, std::tuple<Pointer>>;
  explicit Rows(const From& from) {
    if (const auto* address = std::get_if<1>(&from)) {
      table = as<const void>(std::get<0>(*address));
    } else {
      k = std::get<0>(from);
    }
  }
  const int64_t* offsets() const { return static_cast<const int64_t*>(table); }
  const int32_t* row_of() const { return static_cast<const int32_t*>(table); }
};

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
  m.def("indices_in_range", [](Pointer indices, int64_t n, int index_bytes, int64_t F) {
    const Indices i(indices, index_bytes);
    py::gil_scoped_release release;
    return indices_in_range(i.i64, i.i32, n, F);
  });

  m.def("topk", [](int64_t N, int64_t F, int64_t k, int dtype, Pointer x, Pointer values,
                   Pointer indices, const py::function& allocate, int threads) {
    const TopkParams p{
        N, F, k, Dtype(dtype), as<const void>(x), as<void>(values), as<int64_t>(indices)};
    with_workspace(p, allocate, threads, topk_workspace, topk);
  });
  m.def("topk_encode", [](int64_t N, int64_t d, int64_t F, int64_t k, int dtype, Pointer x,
                          Pointer W_enc, Pointer b_enc, Pointer b_dec, Pointer mask, Pointer values,
                          Pointer indices, bool screen, float slack, bool product_only,
                          Pointer scores, const py::function& allocate, int threads) {
    EncodeStats stats{};
    const EncodeParams p{N,
                         d,
                         F,
                         k,
                         Dtype(dtype),
                         as<const void>(x),
                         as<const void>(W_enc),
                         as<const void>(b_enc),
                         as<const void>(b_dec),
                         as<const uint8_t>(mask),
                         as<void>(values),
                         as<int64_t>(indices),
                         screen,
                         slack,
                         &stats,
                         product_only,
                         as<float>(scores)};
    with_workspace(p, allocate, threads, topk_encode_workspace, topk_encode);
    return std::make_tuple(stats.screened_rows, stats.survivors, stats.redone_rows);
  });
  m.def("grad_topk_encode",
        [](int64_t N, int64_t d, int64_t F, int64_t k, int dtype, Pointer x, Pointer W_enc,
           Pointer b_enc, Pointer b_dec, Pointer values, Pointer indices, bool screen, float slack,
           int64_t d_out, Pointer grad, Pointer W_dec, int mode, float beta, int route,
           Pointer scores, const py::function& allocate, int threads) {
          EncodeStats stats{};
          const GradEncodeParams p{
              {N, d, F, k, Dtype(dtype), as<const void>(x), as<const void>(W_enc),
               as<const void>(b_enc), as<const void>(b_dec), nullptr, as<void>(values),
               as<int64_t>(indices), screen, slack, &stats, false, as<float>(scores)},
              d_out,
              as<const void>(grad),
              as<const void>(W_dec),
              GradMode(mode),
              beta,
              GradRoute(route)};
          with_workspace(p, allocate, threads, grad_topk_encode_workspace, grad_topk_encode);
          return std::make_tuple(stats.screened_rows, stats.survivors, stats.redone_rows,
                                 stats.candidates);
        });
  m.def("batch_topk_encode",
        [](int64_t N, int64_t d, int64_t F, int64_t k, int dtype, Pointer x, Pointer W_enc,
           Pointer b_enc, Pointer b_dec, Pointer values, Pointer indices, Pointer row_offsets,
           bool screen, float slack, const py::function& allocate, int threads) {
          EncodeStats stats{};
          const BatchEncodeParams p{
              {N, d, F, k, Dtype(dtype), as<const void>(x), as<const void>(W_enc),
               as<const void>(b_enc), as<const void>(b_dec), nullptr, as<void>(values),
               as<int64_t>(indices), screen, slack, &stats, false, nullptr},
              as<int64_t>(row_offsets)};
          with_workspace(p, allocate, threads, batch_topk_encode_workspace, batch_topk_encode);
          return std::make_tuple(stats.screened_rows, stats.survivors, stats.redone_rows);
        });
  const auto threshold = [](int64_t N, int64_t d, int64_t F, int dtype, Pointer x, Pointer W_enc,
                            Pointer b_enc, Pointer b_dec, Pointer theta, Pointer above,
                            Pointer row_offsets, Pointer values, Pointer latents,
                            bool screen = false, float slack = 1) {
    return ThresholdEncodeParams{N,
                                 d,
                                 F,
                                 Dtype(dtype),
                                 as<const void>(x),
                                 as<const void>(W_enc),
                                 as<const void>(b_enc),
                                 as<const void>(b_dec),
                                 as<const float>(theta),
                                 as<uint32_t>(above),
                                 as<int64_t>(row_offsets),
                                 as<void>(values),
                                 as<int64_t>(latents),
                                 screen,
                                 slack};
  };
  m.def("threshold_encode_count",
        [threshold](int64_t N, int64_t d, int64_t F, int dtype, Pointer x, Pointer W_enc,
                    Pointer b_enc, Pointer b_dec, Pointer theta, Pointer above, Pointer row_offsets,
                    bool screen, float slack, const py::function& allocate, int threads) {
          const auto p = threshold(N, d, F, dtype, x, W_enc, b_enc, b_dec, theta, above,
                                   row_offsets, 0, 0, screen, slack);
          with_workspace(p, allocate, threads, threshold_encode_workspace, threshold_encode_count);
        });
  m.def("threshold_encode_fill",
        [threshold](int64_t N, int64_t d, int64_t F, int dtype, Pointer x, Pointer W_enc,
                    Pointer b_enc, Pointer b_dec, Pointer theta, Pointer above, Pointer row_offsets,
                    Pointer values, Pointer latents, const py::function& allocate, int threads) {
          const auto p = threshold(N, d, F, dtype, x, W_enc, b_enc, b_dec, theta, above,
                                   row_offsets, values, latents);
          with_workspace(p, allocate, threads, threshold_encode_workspace, threshold_encode_fill);
        });
  const auto decode = [](int64_t N, int64_t d, int64_t F, const Rows::From& code, int dtype,
                         Pointer values, Pointer indices, int index_bytes, Pointer W_dec,
                         Pointer b_dec, Pointer out, bool out_float) {
    const Indices i(indices, index_bytes);
    const Rows rows(code);
    return DecodeParams{N,
                        d,
                        F,
                        rows.k,
                        Dtype(dtype),
                        as<const void>(values),
                        i.i64,
                        i.i32,
                        as<const void>(W_dec),
                        as<const void>(b_dec),
                        as<void>(out),
                        rows.offsets(),
                        out_float};
  };
  m.def("sparse_decode", [decode](int64_t N, int64_t d, int64_t F, const Rows::From& code,
                                  int dtype, Pointer values, Pointer indices, int index_bytes,
                                  Pointer W_dec, Pointer b_dec, Pointer out, int threads) {
    const DecodeParams p =
        decode(N, d, F, code, dtype, values, indices, index_bytes, W_dec, b_dec, out, false);
    py::gil_scoped_release release;
    sparse_decode(p, threads);
  });
  m.def("sparse_decode_partial",
        [decode](int64_t N, int64_t d, int64_t F, const Rows::From& code, int dtype, Pointer values,
                 Pointer indices, int index_bytes, Pointer W_dec, Pointer b_dec, Pointer out,
                 int threads) {
          const DecodeParams p =
              decode(N, d, F, code, dtype, values, indices, index_bytes, W_dec, b_dec, out, true);
          py::gil_scoped_release release;
          sparse_decode(p, threads);
        });
  m.def("sparse_residual",
        [decode](int64_t N, int64_t d, int64_t F, const Rows::From& code, int dtype, Pointer values,
                 Pointer indices, int index_bytes, Pointer W_dec, Pointer b_dec, Pointer target,
                 bool target_float, int64_t start, int64_t columns, Pointer residual,
                 Pointer sq_error, Pointer grad_values, const py::function& allocate, int threads) {
          const ResidualParams p{
              decode(N, d, F, code, dtype, values, indices, index_bytes, W_dec, b_dec, 0, false),
              as<const void>(target),
              target_float,
              start,
              columns,
              as<float>(residual),
              as<double>(sq_error),
              as<float>(grad_values)};
          with_workspace(p, allocate, threads, sparse_residual_workspace, sparse_residual);
        });
  m.def("prefix_residual",
        [decode](int64_t N, int64_t d, int64_t F, const Rows::From& code, int dtype, Pointer values,
                 Pointer indices, int index_bytes, Pointer W_dec, Pointer b_dec, Pointer target,
                 bool target_float, Pointer widths, Pointer shares, int n_prefixes, int64_t start,
                 int64_t columns, Pointer residual, Pointer sq_error, Pointer grad_values,
                 const py::function& allocate, int threads) {
          const PrefixResidualParams p{
              {decode(N, d, F, code, dtype, values, indices, index_bytes, W_dec, b_dec, 0, false),
               as<const void>(target), target_float, start, columns, as<float>(residual),
               as<double>(sq_error), as<float>(grad_values)},
              as<const int64_t>(widths),
              as<const float>(shares),
              n_prefixes};
          with_workspace(p, allocate, threads, prefix_residual_workspace, prefix_residual);
        });
  const auto backward_values = [](int64_t N, int64_t d, int64_t F, const Rows::From& code,
                                  int dtype, Pointer grad, Pointer indices, int index_bytes,
                                  Pointer W_dec, Pointer grad_values, bool grad_float,
                                  int threads) {
    const Indices i(indices, index_bytes);
    const Rows rows(code);
    py::gil_scoped_release release;
    sparse_decode_backward_values(
        {N, d, F, rows.k, Dtype(dtype), as<const void>(grad), i.i64, i.i32, as<const void>(W_dec),
         as<void>(grad_values), rows.offsets(), grad_float},
        threads);
  };
  m.def("sparse_decode_backward_values",
        [backward_values](int64_t N, int64_t d, int64_t F, const Rows::From& code, int dtype,
                          Pointer grad, Pointer indices, int index_bytes, Pointer W_dec,
                          Pointer grad_values, int threads) {
          backward_values(N, d, F, code, dtype, grad, indices, index_bytes, W_dec, grad_values,
                          false, threads);
        });
  m.def("residual_products",
        [backward_values](int64_t N, int64_t d, int64_t F, const Rows::From& code, int dtype,
                          Pointer residual, Pointer indices, int index_bytes, Pointer W_dec,
                          Pointer grad_values, int threads) {
          backward_values(N, d, F, code, dtype, residual, indices, index_bytes, W_dec, grad_values,
                          true, threads);
        });
  m.def("sparse_decode_backward_weight",
        [](int64_t N, int64_t d, int64_t F, const Rows::From& code, int dtype, Pointer grad,
           Pointer values, Pointer indices, int index_bytes, Pointer grad_W, Pointer value_sum,
           const py::function& allocate, int threads) {
          const Indices i(indices, index_bytes);
          const Rows rows(code);
          const DecodeBackwardWeightParams p{N,
                                             d,
                                             F,
                                             rows.k,
                                             Dtype(dtype),
                                             as<const void>(grad),
                                             as<const void>(values),
                                             i.i64,
                                             i.i32,
                                             as<void>(grad_W),
                                             as<void>(value_sum),
                                             rows.row_of()};
          with_workspace(p, allocate, threads, sparse_decode_backward_weight_workspace,
                         sparse_decode_backward_weight);
        });
  m.def("group_by_latent", [](int64_t N, int64_t F, int64_t k, int dtype, Pointer values,
                              Pointer indices, int index_bytes, Pointer offsets, Pointer order,
                              const py::function& allocate, int threads) {
    const Indices i(indices, index_bytes);
    const GroupParams p{N,
                        F,
                        k,
                        Dtype(dtype),
                        as<const void>(values),
                        i.i64,
                        i.i32,
                        as<int32_t>(offsets),
                        as<int32_t>(order)};
    with_workspace(p, allocate, threads, group_by_latent_workspace, group_by_latent);
  });
  ksae::add_ops<int>(
      m, [](const py::handle& threads) { return threads.cast<int>(); },
      [](const ksae::Op<int>& op, const ksae::Params& p, void* workspace, int threads) {
        py::gil_scoped_release release;
        op.run(p.get(), workspace, threads);
      });
}
