// The interface of all compiled code: plain C functions, which `library.py` calls. A name ends with
// the types of the field and of what is computed from it: f for float, d for double.
//
// Memory is the caller's, who has checked its sizes. Nothing here throws or keeps anything.
#include "fused_step.hpp"
#include "grid_transfer.hpp"
#include "separable_step.hpp"
#if defined(__x86_64__)
#include <cpuid.h>
#endif

#if defined(_WIN32)
#define EXPORT extern "C" __declspec(dllexport)
#else
#define EXPORT extern "C" __attribute__((visibility("default")))
#endif

using namespace cdd;

// A function that takes a structure `it`, the number of a `thread`, and the `size` of the team. The type
// comes last, as it may hold a comma.
#define FUNCTION(NAME, WORK, ...)                                                                        \
    EXPORT Index cdd_##NAME(const __VA_ARGS__* it, [[maybe_unused]] Index thread, [[maybe_unused]] Index size) { \
        WORK;                                                                                            \
        return 0;                                                                                        \
    }
#define OF_TYPES(SUFFIX, FIELD, T)                                                                       \
    FUNCTION(fused_scratch_##SUFFIX, return it->scratch_size(), FusedSteps<T, FIELD>)                    \
    FUNCTION(fused_saved_##SUFFIX, return it->saved_size(), FusedSteps<T, FIELD>)                        \
    FUNCTION(fused_tiles_##SUFFIX, return it->visits() * it->tiles(), FusedSteps<T, FIELD>)              \
    FUNCTION(fused_##SUFFIX, it->run(thread), FusedSteps<T, FIELD>)                                      \
    FUNCTION(pyramid_scratch_##SUFFIX, return it->scratch_size(), Pyramid<T, FIELD>)                     \
    FUNCTION(pyramid_##SUFFIX, it->run(thread), Pyramid<T, FIELD>)                                       \
    FUNCTION(to_striped_##SUFFIX, it->to_striped(thread, {it->count, thread, size}), Rows<FIELD, T>)     \
    FUNCTION(to_plain_##SUFFIX, it->to_plain(thread, {it->count, thread, size}), Rows<FIELD, T>)         \
    FUNCTION(smooth_axis_##SUFFIX, it->run(thread, {it->lines, thread, size}), SmoothAxis<FIELD, T>)     \
    FUNCTION(move_##SUFFIX, it->run({it->count, thread, size}), MovePlain<FIELD, T>)

OF_TYPES(ff, float, float)
OF_TYPES(fd, float, double)
OF_TYPES(dd, double, double)
EXPORT Index cdd_vector_bytes() { return VECTOR_BYTES; }

// Whether this processor runs code for that instruction set. (Zig lacks __builtin_cpu_supports.)
EXPORT Index cdd_runs(const char* name) {
#if defined(__x86_64__)
    unsigned a, b, c = 0, d, basic, extended = 0, kept = 0;
    __get_cpuid(1, &a, &b, &c, &d);
    basic = c;
    if (basic >> 27 & 1) __asm__("xgetbv" : "=a"(kept), "=d"(d) : "c"(0));  // registers that the system keeps
    __get_cpuid_count(7, 0, &a, &extended, &c, &d);
    auto is = [&](const char* other) { return __builtin_strcmp(name, other) == 0; };
    auto has = [](unsigned bits, unsigned all) { return (bits & all) == all; };
    const bool avx2 = has(kept, 0x6) && has(basic, 1u << 12) && has(extended, 1u << 5);  // and FMA
    if (is("avx512")) return avx2 && has(kept, 0xe6) && has(extended, 0xc0030000);       // F, DQ, BW, VL
    if (is("avx2")) return avx2;
#endif
    return name[0] != 'a';  // any other than avx… is the processor's baseline
}
