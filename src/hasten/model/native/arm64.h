// The instruction sets of arm64 (see NEON in neon.h), and which of them the processor has.

#include <arm_neon.h>
#if defined(__linux__)
#include <sys/auxv.h>
#elif defined(__APPLE__)
#include <sys/sysctl.h>
#endif

#define NAME neon
#define LEVEL 0
#define NEON 0
#define MOST 4
#include "kernels.h"

// Older compilers know no instructions beside those that they compile for.
#if defined(__clang__) && __clang_major__ >= 16 || !defined(__clang__) && __GNUC__ >= 11
#define HAS_DOT 1

#ifdef __clang__
#pragma clang attribute push(__attribute__((target("dotprod"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("arch=armv8.2-a+dotprod")
#endif
#define NAME neondot
#define LEVEL 0
#define NEON 1
#define MOST 4
#include "kernels.h"
#ifdef __clang__
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("dotprod,bf16"))), apply_to = function)
#else
#pragma GCC target("arch=armv8.2-a+dotprod+bf16")
#endif
#define NAME neonbf16
#define LEVEL 0
#define NEON 2
#define MOST 4
#include "kernels.h"
#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif

namespace {

#if defined(__linux__)
// Bits that the kernel sets; older headers lack their names.
bool has_dot() { return getauxval(AT_HWCAP) >> 20 & 1; }
bool has_bf16() { return getauxval(AT_HWCAP2) >> 14 & 1; }
#elif defined(__APPLE__)
bool has(const char *feature) {
    int value = 0;
    size_t size = sizeof value;
    return sysctlbyname(feature, &value, &size, nullptr, 0) == 0 && value;
}
bool has_dot() { return has("hw.optional.arm.FEAT_DotProd"); }
bool has_bf16() { return has("hw.optional.arm.FEAT_BF16"); }
#else
bool has_dot() { return false; }
bool has_bf16() { return false; }
#endif

}  // namespace
