// SPDX-License-Identifier: Apache-2.0
// An op as data: its name, the parameters of its struct by name, and how it is called. A kernel
// states it once, at the end of its own file, and a binding for another language walks the list:
// what it passes on is known to the op and to its caller alone.
//
// `Where` is what an op runs on: an int, the number of CPU threads, or a cudaStream_t.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

namespace ksae {

enum class Kind : int { kInt64, kInt32, kBool, kFloat, kAddress, kList };

// A parameter. A list is an array of structs, whose fields are in `fields`.
//
// The name is that of an argument or output of the op, or of a size in their shapes, as in the op's
// definition; `dtype` is the storage type, `x_dtype` that of argument x, `x_size` its number of
// elements.
struct Field {
  const char* name;
  Kind kind;
  size_t offset;  // in the struct
  // Of a list: the number of entries is an int at offset `count`.
  const Field* fields = nullptr;
  int n_fields = 0;
  size_t size = 0, count = 0;
};

template <class T>
constexpr Kind kind_of() {
  if constexpr (std::is_pointer_v<T>) {
    return Kind::kAddress;
  } else if constexpr (std::is_same_v<T, bool>) {
    return Kind::kBool;
  } else if constexpr (std::is_same_v<T, float>) {
    return Kind::kFloat;
  } else if constexpr (std::is_same_v<T, int64_t>) {
    return Kind::kInt64;
  } else {
    static_assert(std::is_enum_v<T> || std::is_same_v<T, int>);
    return Kind::kInt32;
  }
}

template <size_t n>
constexpr Field list_field(size_t offset, size_t count, size_t size, const Field (&fields)[n]) {
  return {"", Kind::kList, offset, fields, static_cast<int>(n), size, count};
}

#define KSAE_FIELD_AS(Params, member, name) \
  {name, ::ksae::kind_of<decltype(Params::member)>(), offsetof(Params, member)}
#define KSAE_FIELD(Params, member) KSAE_FIELD_AS(Params, member, #member)
#define KSAE_LIST(Params, member, count, fields)                        \
  ::ksae::list_field(offsetof(Params, member), offsetof(Params, count), \
                     sizeof(*static_cast<Params*>(nullptr)->member), fields)

template <class Where>
struct Op {
  const char* name;
  const Field* fields;
  int n_fields;
  size_t size;                                                // of the struct
  size_t (*workspace)(const void* params, Where on);          // null: it needs none
  int (*run)(const void* params, void* workspace, Where on);  // 0, or CUDA's error code
  const Op* next;
};

template <class Where>
inline const Op<Where>* first_op = nullptr;

// Puts an op on the list. kWorkspace: nullptr, or the query of the bytes that kRun needs.
template <class Where, class Params, auto kRun, auto kWorkspace = nullptr>
struct OpOf : Op<Where> {
  static_assert(std::is_trivially_copyable_v<Params> && std::is_standard_layout_v<Params>);
  static constexpr bool kNeedsMemory = !std::is_null_pointer_v<decltype(kWorkspace)>;

  template <size_t n>
  OpOf(const char* name, const Field (&fields)[n]) : OpOf(name, fields, n) {}
  OpOf(const char* name, const Field* fields, size_t n)
      : Op<Where>{name,
                  fields,
                  static_cast<int>(n),
                  sizeof(Params),
                  kNeedsMemory ? query : nullptr,
                  start,
                  first_op<Where>} {
    first_op<Where> = this;
  }
  OpOf(const OpOf&) = delete;

  static size_t query(const void* params, [[maybe_unused]] Where on) {
    const Params& p = *static_cast<const Params*>(params);
    if constexpr (!kNeedsMemory) {
      return 0;
    } else if constexpr (std::is_invocable_v<decltype(kWorkspace), const Params&>) {
      return kWorkspace(p);
    } else {
      return kWorkspace(p, on);
    }
  }
  static int start(const void* params, [[maybe_unused]] void* workspace, Where on) {
    const Params& p = *static_cast<const Params*>(params);
    const auto call = [&] {
      if constexpr (kNeedsMemory) {
        return kRun(p, workspace, on);
      } else {
        return kRun(p, on);
      }
    };
    if constexpr (std::is_void_v<decltype(call())>) {
      call();
      return 0;
    } else {
      return static_cast<int>(call());
    }
  }
};

}  // namespace ksae
