// What address sanitizer cannot see by itself, told to it. Nothing in other builds; tests/sanitize.py makes the one.
#pragma once

#include <cstddef>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>

extern "C" void __asan_loadN(const void* data, size_t bytes);
extern "C" void __asan_storeN(void* data, size_t bytes);
#endif

namespace libmoe_fast {

// check_read, check_write: GCC does not instrument masked vector instructions, so code that uses them says what they
// access. forbid, allow: parts of an allocation that no one may touch, and may touch again.
#if defined(__SANITIZE_ADDRESS__)
inline void check_read(const void* data, size_t bytes) { __asan_loadN(data, bytes); }
inline void check_write(void* data, size_t bytes) { __asan_storeN(data, bytes); }
inline void forbid(const void* data, size_t bytes) { __asan_poison_memory_region(data, bytes); }
inline void allow(const void* data, size_t bytes) { __asan_unpoison_memory_region(data, bytes); }
#else
inline void check_read(const void*, size_t) {}
inline void check_write(void*, size_t) {}
inline void forbid(const void*, size_t) {}
inline void allow(const void*, size_t) {}
#endif

}  // namespace libmoe_fast
