// SPDX-License-Identifier: Apache-2.0
// Python module ksae._cuda over ksae/cuda.h. It imports without a GPU or a driver; its functions
// then raise CUDA's reason. Pointers and streams are integers; python/ksae/backends/ makes them.
// An op that states itself (ksae/op.h) needs nothing here.
#include "ksae/cuda.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <variant>
#include <vector>

#include "ops.h"

#ifndef KSAE_CUDA_MODULE
#define KSAE_CUDA_MODULE _cuda
#endif

namespace py = pybind11;
using namespace ksae::cuda;

namespace {

using Pointer = uintptr_t;

template <class T>
T* as(Pointer p) {
  return reinterpret_cast<T*>(p);
}

void check(cudaError_t error, const std::string& what) {
  if (error != cudaSuccess)
    throw std::runtime_error(what + ": CUDA error " + std::to_string(error) + " (" +
                             cudaGetErrorString(error) + ")");
}

int value_or_raise(const char* name, cudaError_t (*function)(int*)) {
  int value = 0;
  check(function(&value), name);
  return value;
}

// The op and those of its sizes that it has: the others are 0.
std::string sizes(const char* op, int64_t N, int64_t d, int64_t F, int64_t k) {
  std::string text = std::string(op) + " with";
  const std::pair<const char*, int64_t> all[] = {{" N=", N}, {" d=", d}, {" F=", F}, {" k=", k}};
  for (const auto& [name, size] : all)
    if (size) text += name + std::to_string(size) + ",";
  text.pop_back();
  return text;
}

// A code's k entries a row, or a tuple of the address of a table in its place: row_offsets, or
// row_of where entries are taken one by one.
struct Code {
  int64_t k = 1;
  const void* table = nullptr;
  using From = std::variant<int64_t, std::tuple<Pointer>>;
  explicit Code(const From& from) {
    if (const auto* address = std::get_if<1>(&from)) {
      table = as<const void>(std::get<0>(*address));
    } else {
      k = std::get<0>(from);
    }
  }
  const int64_t* offsets() const { return static_cast<const int64_t*>(table); }
  const int32_t* row_of() const { return static_cast<const int32_t*>(table); }
};

DecodeParams decode_params(int64_t N, int64_t d, int64_t F, const Code& code, int dtype,
                           Pointer values, Pointer indices, int index_bytes, Pointer W_dec,
                           Pointer b_dec, Pointer out, bool out_float = false) {
  return {N,
          d,
          F,
          code.k,
          Dtype(dtype),
          as<const void>(values),
          index_bytes == 8 ? as<const int64_t>(indices) : nullptr,
          index_bytes == 4 ? as<const int32_t>(indices) : nullptr,
          as<const void>(W_dec),
          as<const void>(b_dec),
          as<void>(out),
          code.offsets(),
          out_float};
}

}  // namespace

PYBIND11_MODULE(KSAE_CUDA_MODULE, module) {
  module.attr("architectures") = KSAE_CUDA_ARCHITECTURES;
  module.def("runtime_version", [] { return value_or_raise("runtime_version", runtime_version); });
  module.def("driver_version", [] { return value_or_raise("driver_version", driver_version); });
  module.def("device_count", [] { return value_or_raise("device_count", device_count); });

  module.def("select", [](int64_t rows, int64_t F, int64_t k, int score_dtype, int dtype,
                          Pointer scores, Pointer second, int mode, float beta, Pointer informed,
                          Pointer bias, Pointer scale, Pointer columns, bool relu, Pointer values,
                          Pointer indices, const py::function& allocate, Pointer stream) {
    const SelectParams p{rows,
                         F,
                         k,
                         Dtype(score_dtype),
                         Dtype(dtype),
                         as<const void>(scores),
                         as<const void>(second),
                         Mode(mode),
                         beta,
                         as<const uint8_t>(informed),
                         as<const void>(bias),
                         as<const float>(scale),
                         as<const int32_t>(columns),
                         relu,
                         as<void>(values),
                         as<int64_t>(indices)};
    void* workspace = as<void>(allocate(select_workspace(p)).cast<Pointer>());
    check(select(p, workspace, as<CUstream_st>(stream)), sizes("select", rows, 0, F, k));
  });
  module.def("list_columns", [](int64_t F, Pointer mask, Pointer columns, Pointer stream) {
    check(list_columns(F, as<const uint8_t>(mask), as<int32_t>(columns), as<CUstream_st>(stream)),
          sizes("list_columns", 0, 0, F, 0));
  });
  module.def("bf16_copy",
             [](int64_t rows, int64_t d, Pointer t, Pointer copy, Pointer norms, Pointer stream) {
               check(bf16_copy({rows, d, as<const float>(t), as<void>(copy), as<float>(norms)},
                               as<CUstream_st>(stream)),
                     sizes("bf16_copy", rows, d, 0, 0));
             });
  module.def("screened_groups", [](int64_t F, int64_t k) {
    ScreenedSelectParams p{};
    p.F = F;
    p.k = k;
    return screened_groups(p);
  });
  // The steps of a screened selection, in order; `given` are the pointers of ScreenedSelectParams,
  // from x on.
  module.def("screened",
             [](const std::string& step, int64_t N, int64_t d, int64_t F, int64_t k, int64_t first,
                int64_t rows, int capacity, Pointer scores, const std::array<Pointer, 12>& given,
                const py::function& allocate, Pointer stream) {
               const ScreenedSelectParams p{N,
                                            d,
                                            F,
                                            k,
                                            first,
                                            rows,
                                            as<const float>(scores),
                                            as<const float>(given[0]),
                                            as<const float>(given[1]),
                                            as<const float>(given[2]),
                                            as<const float>(given[3]),
                                            as<const float>(given[4]),
                                            as<const uint8_t>(given[5]),
                                            as<float>(given[6]),
                                            as<uint32_t>(given[7]),
                                            as<int32_t>(given[8]),
                                            as<int32_t>(given[9]),
                                            as<float>(given[10]),
                                            as<int64_t>(given[11]),
                                            capacity};
               auto* on = as<CUstream_st>(stream);
               cudaError_t error = cudaErrorInvalidValue;
               if (step == "begin") error = screened_begin(p, on);
               if (step == "select") error = screened_select(p, on);
               if (step == "redo") {
                 void* workspace = as<void>(allocate(screened_redo_workspace(p)).cast<Pointer>());
                 error = screened_redo(p, workspace, on);
               }
               check(error, sizes(("screened " + step).c_str(), N, d, F, k));
             });
  module.def("sparse_decode", [](int64_t N, int64_t d, int64_t F, const Code::From& from, int dtype,
                                 Pointer values, Pointer indices, int index_bytes, Pointer W_dec,
                                 Pointer b_dec, Pointer out, bool out_float, Pointer stream) {
    const Code code(from);
    const auto p = decode_params(N, d, F, code, dtype, values, indices, index_bytes, W_dec, b_dec,
                                 out, out_float);
    check(sparse_decode(p, as<CUstream_st>(stream)), sizes("sparse_decode", N, d, F, code.k));
  });
  module.def("sparse_residual", [](int64_t N, int64_t d, int64_t F, const Code::From& from,
                                   int dtype, Pointer values, Pointer indices, int index_bytes,
                                   Pointer W_dec, Pointer b_dec, Pointer target, bool target_float,
                                   int64_t start, int64_t columns, Pointer residual,
                                   Pointer sq_error, Pointer grad_values, Pointer column_sums,
                                   Pointer rounded, const py::function& allocate, Pointer stream) {
    const Code code(from);
    const ResidualParams p{
        decode_params(N, d, F, code, dtype, values, indices, index_bytes, W_dec, b_dec, 0),
        as<const void>(target),
        target_float,
        start,
        columns,
        as<float>(residual),
        as<double>(sq_error),
        as<float>(grad_values),
        as<float>(column_sums),
        as<void>(rounded)};
    void* workspace = as<void>(allocate(sparse_residual_workspace(p)).cast<Pointer>());
    check(sparse_residual(p, workspace, as<CUstream_st>(stream)),
          sizes("sparse_residual", N, d, F, code.k));
  });
  module.def("sparse_decode_backward_values", [](int64_t N, int64_t d, int64_t F,
                                                 const Code::From& from, int dtype, Pointer grad,
                                                 Pointer indices, int index_bytes, Pointer W_dec,
                                                 Pointer out, bool grad_float, Pointer stream) {
    const Code code(from);
    const DecodeBackwardValuesParams p{N,
                                       d,
                                       F,
                                       code.k,
                                       Dtype(dtype),
                                       as<const void>(grad),
                                       index_bytes == 8 ? as<const int64_t>(indices) : nullptr,
                                       index_bytes == 4 ? as<const int32_t>(indices) : nullptr,
                                       as<const void>(W_dec),
                                       as<void>(out),
                                       code.row_of(),
                                       grad_float};
    check(sparse_decode_backward_values(p, as<CUstream_st>(stream)),
          sizes("sparse_decode_backward_values", N, d, F, code.k));
  });
  module.def("group_by_latent", [](int64_t N, int64_t F, int64_t k, int dtype, Pointer values,
                                   Pointer indices, int index_bytes, Pointer offsets, Pointer order,
                                   const py::function& allocate, Pointer stream) {
    const GroupParams p{N,
                        F,
                        k,
                        Dtype(dtype),
                        as<const void>(values),
                        index_bytes == 8 ? as<const int64_t>(indices) : nullptr,
                        index_bytes == 4 ? as<const int32_t>(indices) : nullptr,
                        as<int32_t>(offsets),
                        as<int32_t>(order)};
    void* workspace = as<void>(allocate(group_by_latent_workspace(p)).cast<Pointer>());
    check(group_by_latent(p, workspace, as<CUstream_st>(stream)),
          sizes("group_by_latent", N, 0, F, k));
  });
  module.def("sparse_decode_backward_weight",
             [](int64_t N, int64_t d, int64_t F, const Code::From& from, int dtype, Pointer grad,
                Pointer values, Pointer offsets, Pointer order, Pointer grad_W, Pointer value_sum,
                const py::function& allocate, Pointer stream) {
               const Code code(from);
               const DecodeBackwardWeightParams p{N,
                                                  d,
                                                  F,
                                                  code.k,
                                                  Dtype(dtype),
                                                  as<const void>(grad),
                                                  as<const void>(values),
                                                  as<const int32_t>(offsets),
                                                  as<const int32_t>(order),
                                                  as<void>(grad_W),
                                                  as<void>(value_sum),
                                                  code.row_of()};
               const size_t bytes = sparse_decode_backward_weight_workspace(p);
               void* workspace = as<void>(allocate(bytes).cast<Pointer>());
               check(sparse_decode_backward_weight(p, workspace, as<CUstream_st>(stream)),
                     sizes("sparse_decode_backward_weight", N, d, F, code.k));
             });
  module.def("total_variance", [](int64_t N, int64_t d, int dtype, Pointer y, Pointer variance,
                                  const py::function& allocate, Pointer stream) {
    const TotalVarianceParams p{N, d, Dtype(dtype), as<const void>(y), as<float>(variance)};
    void* workspace = as<void>(allocate(total_variance_workspace(p)).cast<Pointer>());
    check(total_variance(p, workspace, as<CUstream_st>(stream)),
          sizes("total_variance", N, d, 0, 0));
  });
  module.def("loss_terms", [](const std::vector<std::tuple<int64_t, Pointer, Pointer, float>>& from,
                              Pointer errors, Pointer terms, Pointer loss, Pointer scales,
                              Pointer stream) {
    std::vector<LossTerm> of_terms;
    for (const auto& [N, sq_error, denominator, share] : from)
      of_terms.push_back({N, as<const double>(sq_error), as<const float>(denominator), share});
    const LossTermsParams p{of_terms.data(),   static_cast<int>(of_terms.size()),
                            as<float>(errors), as<float>(terms),
                            as<float>(loss),   as<float>(scales)};
    check(loss_terms(p, as<CUstream_st>(stream)), "loss_terms");
  });
  module.def("adam_scalars", [](Pointer loss, Pointer norm, float clip_norm, Pointer scales,
                                int n_scales, Pointer lr, Pointer t, Pointer constants,
                                float decoder_lr, bool always, Pointer hyper, Pointer taken,
                                Pointer taken_scales, Pointer of_decoder, Pointer stream) {
    const AdamScalarsParams p{as<const float>(loss),
                              as<const float>(norm),
                              clip_norm,
                              as<const float>(scales),
                              n_scales,
                              as<const double>(lr),
                              as<const double>(t),
                              as<const double>(constants),
                              decoder_lr,
                              always,
                              as<float>(hyper),
                              as<bool>(taken),
                              as<float>(taken_scales),
                              as<float>(of_decoder)};
    check(adam_scalars(p, as<CUstream_st>(stream)), "adam_scalars");
  });
  module.def("vector_update",
             [](int64_t size, int dtype, const std::vector<Pointer>& from, Pointer scales,
                Pointer minus, Pointer taken, Pointer hyper, Pointer parameter, Pointer master,
                Pointer m, Pointer v, Pointer stream) {
               std::vector<const float*> grads;
               for (Pointer grad : from) grads.push_back(as<const float>(grad));
               const VectorUpdateParams p{size,
                                          Dtype(dtype),
                                          grads.data(),
                                          static_cast<int>(grads.size()),
                                          as<const float>(scales),
                                          as<const float>(minus),
                                          as<const bool>(taken),
                                          as<const float>(hyper),
                                          as<void>(parameter),
                                          as<float>(master),
                                          as<float>(m),
                                          as<float>(v)};
               check(vector_update(p, as<CUstream_st>(stream)), "vector_update");
             });
  ksae::add_ops<cudaStream_t>(
      module, [](const py::handle& stream) { return as<CUstream_st>(stream.cast<Pointer>()); },
      [](const auto& op, const ksae::Params& p, void* workspace, cudaStream_t stream) {
        const auto size = [&](const char* name) { return ksae::number_of(op, p, name); };
        check(static_cast<cudaError_t>(op.run(p.get(), workspace, stream)),
              sizes(op.name, size("N"), size("d"), size("F"), size("k")));
      });
}
