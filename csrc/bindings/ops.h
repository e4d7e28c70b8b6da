// SPDX-License-Identifier: Apache-2.0
// The ops of a module (ksae/op.h) as Python functions: called by position, with a value for each
// field, an allocator (bytes -> address) and what the op runs on. Addresses are integers.
#pragma once

#include <pybind11/pybind11.h>

#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "ksae/op.h"

namespace ksae {

namespace py = pybind11;

// The struct of a call, and the arrays that it points to.
class Params {
 public:
  template <class Where>
  Params(const Op<Where>& op, const py::args& values) : memory_(take(op.size)) {
    fill(op.fields, op.n_fields, values, memory_.get());
  }
  const void* get() const { return memory_.get(); }

 private:
  using Memory = std::unique_ptr<char[]>;
  static Memory take(size_t bytes) { return std::make_unique<char[]>(bytes + 1); }

  template <class T>
  static void put(char* at, T value) {
    std::memcpy(at, &value, sizeof(T));
  }

  void fill(const Field* fields, int n, const py::tuple& values, char* at) {
    if (static_cast<int>(values.size()) < n)
      throw std::invalid_argument("expected " + std::to_string(n) + " parameters, got " +
                                  std::to_string(values.size()));
    for (int i = 0; i < n; ++i) fill(fields[i], values[i], at);
  }

  void fill(const Field& field, const py::handle& value, char* at) {
    char* here = at + field.offset;
    switch (field.kind) {
      case Kind::kInt64:
        return put(here, value.cast<int64_t>());
      case Kind::kInt32:
        return put(here, value.cast<int>());
      case Kind::kBool:
        return put(here, value.cast<bool>());
      case Kind::kFloat:
        return put(here, value.cast<float>());
      case Kind::kAddress:
        return put(here, value.cast<uintptr_t>());
      case Kind::kList:
        break;
    }
    const auto entries = py::reinterpret_borrow<py::list>(value);
    lists_.push_back(take(entries.size() * field.size));
    char* entry = lists_.back().get();
    put(here, entry);
    put(at + field.count, static_cast<int>(entries.size()));
    for (const py::handle& each : entries) {
      fill(field.fields, field.n_fields, py::reinterpret_borrow<py::tuple>(each), entry);
      entry += field.size;
    }
  }

  Memory memory_;
  std::vector<Memory> lists_;
};

// The number that a call has for a field; 0 where it has no such field.
template <class Where>
int64_t number_of(const Op<Where>& op, const Params& p, const std::string& name) {
  int64_t value = 0;
  for (int i = 0; i < op.n_fields; ++i)
    if (name == op.fields[i].name && op.fields[i].kind == Kind::kInt64)
      std::memcpy(&value, static_cast<const char*>(p.get()) + op.fields[i].offset, sizeof value);
  return value;
}

inline py::tuple names_of(const Field* fields, int n) {
  py::tuple names(n);
  for (int i = 0; i < n; ++i) {
    const Field& field = fields[i];
    if (field.kind == Kind::kList) {
      names[i] = names_of(field.fields, field.n_fields);
    } else {
      names[i] = py::str(field.name);
    }
  }
  return names;
}

// Gives the module a function for each op, and `fields`: by op, their names in order, those of a
// list as a tuple. call(op, params, workspace, on) runs it; `on_of` makes `Where` of an integer.
template <class Where, class From, class Call>
void add_ops(py::module_& module, From on_of, Call call) {
  py::dict fields;
  for (const Op<Where>* op = first_op<Where>; op; op = op->next) {
    fields[op->name] = names_of(op->fields, op->n_fields);
    module.def(op->name, [op, on_of, call](const py::args& values) {
      if (static_cast<int>(values.size()) != op->n_fields + 2)
        throw std::invalid_argument(std::string(op->name) + " takes " +
                                    std::to_string(op->n_fields) +
                                    " parameters, an allocator and what it runs on");
      const Params p(*op, values);
      const Where on = on_of(values[op->n_fields + 1]);
      void* workspace = nullptr;
      if (op->workspace) {
        const size_t bytes = op->workspace(p.get(), on);
        workspace = reinterpret_cast<void*>(values[op->n_fields](bytes).template cast<uintptr_t>());
      }
      call(*op, p, workspace, on);
    });
  }
  module.attr("fields") = fields;
}

}  // namespace ksae
