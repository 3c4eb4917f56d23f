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

#define OF_TYPES(SUFFIX, FIELD, T)                                                                          \
    EXPORT Index cdd_fused_scratch_##SUFFIX(const FusedSteps<T, FIELD>* steps) {                            \
        return steps->scratch_size();                                                                       \
    }                                                                                                       \
    EXPORT Index cdd_fused_saved_##SUFFIX(const FusedSteps<T, FIELD>* steps) { return steps->saved_size(); } \
    EXPORT Index cdd_fused_tiles_##SUFFIX(const FusedSteps<T, FIELD>* steps) {                              \
        return steps->visits() * steps->tiles();                                                            \
    }                                                                                                       \
    EXPORT void cdd_fused_##SUFFIX(const FusedSteps<T, FIELD>* steps, Index thread) { steps->run(thread); } \
    EXPORT Index cdd_pyramid_scratch_##SUFFIX(const Pyramid<T, FIELD>* steps) {                             \
        return steps->scratch_size();                                                                       \
    }                                                                                                       \
    EXPORT void cdd_pyramid_##SUFFIX(const Pyramid<T, FIELD>* steps, Index thread) { steps->run(thread); }  \
    EXPORT void cdd_to_striped_##SUFFIX(const Rows<FIELD, T>* rows, Index thread, Index size) {             \
        rows->to_striped(thread, Part(rows->count, thread, size));                                          \
    }                                                                                                       \
    EXPORT void cdd_to_plain_##SUFFIX(const Rows<FIELD, T>* rows, Index thread, Index size) {               \
        rows->to_plain(thread, Part(rows->count, thread, size));                                            \
    }                                                                                                       \
    EXPORT void cdd_smooth_axis_##SUFFIX(const SmoothAxis<FIELD, T>* axis, Index thread, Index size) {      \
        axis->run(thread, Part(axis->lines, thread, size));                                                 \
    }                                                                                                       \
    EXPORT void cdd_move_##SUFFIX(const MovePlain<FIELD, T>* move, Index thread, Index size) {              \
        move->run(Part(move->count, thread, size));                                                         \
    }

EXPORT Index cdd_lanes_f() { return LANES<float>; }
EXPORT Index cdd_lanes_d() { return LANES<double>; }
OF_TYPES(ff, float, float)
OF_TYPES(fd, float, double)
OF_TYPES(dd, double, double)

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
