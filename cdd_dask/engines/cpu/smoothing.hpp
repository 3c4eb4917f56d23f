// Smoothing across rows, the one operation of which every axis of a step is made, and the
// constraint.
//
// A kernel of radius R with weights w_j is applied in differences,
//
//     a_0 + sum_j 2 w_j ((a_-j + a_+j) / 2 - a_0),
//
// from the outermost pair inwards: a constant field comes back to the bit, and rounding does not
// wear others down. Terms of even j are written w_j ((a_-j + a_+j) - 2 a_0), which only
// differs in the subnormal range, but stored checksums depend on it.
#pragma once
#include "vectors.hpp"

namespace cdd {

constexpr int BATCH = 4;            // rows that are smoothed at once, so that each is loaded less often
constexpr int LARGEST_RADIUS = 16;  // of the kernels that are unrolled

// How values move to the smooth ones: all the way; towards 0, but not across; away from 0; or towards
// 0 and across.
enum Constraint : Index { UNCONSTRAINED, CONSTRAINED, INVERTED, CROSSING };

// The values `old`, a number or a vector of them, moved to `smooth`.
template <class V> inline INLINE V moved(Index constraint, V old, V smooth) {
    if (constraint == UNCONSTRAINED) return smooth;
    if (constraint == CONSTRAINED) {
        const V low = old > 0 ? V{} : old, high = old < 0 ? V{} : old;
        const V less = smooth < high ? smooth : high;
        return less > low ? less : low;
    }
    const V less = smooth < old ? smooth : old, more = smooth > old ? smooth : old;
    const bool sinks = constraint == CROSSING;
    return old > 0 ? (sinks ? less : more) : old < 0 ? (sinks ? more : less) : old;
}

// A smooth value divided by the kernel's weight on voxels that are not blank: `share` is that weight, or
// 1 over it where the field is kept in a shorter type, as a product takes a fraction of the time.
template <class Field, class T> inline INLINE Vector<T> normalised(Vector<T> smooth, Vector<T> share) {
    return sizeof(Field) < sizeof(T) ? smooth * share : smooth / share;
}

// Smooth BATCH vectors, of which value(b, j) is what lies at distance j from the middle of the b-th.
// `taps` are the factors of the differences, 2 w_j or w_j, each in a whole vector. Their sums
// grow together: one alone would wait for its own last addition.
template <class T, int R, class Value>
inline INLINE void smooth(const Vector<T>* taps, Value value, Vector<T>* result) {
    constexpr std::integral_constant<int, 0> middle;
    if constexpr (R == 0)
        for (int b = 0; b < BATCH; ++b) result[b] = Vector<T>{};
    unrolled<R>([&](auto outer) INLINE {
        constexpr std::integral_constant<int, R - outer> j;
        constexpr std::integral_constant<int, -j> minus_j;
        const Vector<T> tap = taps[j - 1];
        for (int b = 0; b < BATCH; ++b) {
            const Vector<T> centre = value(b, middle), pair = value(b, minus_j) + value(b, j);
            const Vector<T> excess = j % 2 ? fma(splat(T(0.5)), pair, -centre) : fma(splat(T(-2)), centre, pair);
            result[b] = j == R ? tap * excess : fma(tap, excess, result[b]);
        }
    });
    for (int b = 0; b < BATCH; ++b) result[b] = value(b, middle) + result[b];
}

// Smooth BATCH rows of `count` values: row b of the target across the rows b to b + 2 R of the
// source. With MOVES the target's values are not replaced but moved to the smooth ones, which are
// normalised by `share` unless it is null; without, what lies `ahead` values further is prefetched.
template <class T, class Source, class Target, int R, bool MOVES>
void smooth_across(const Source* const* source, Target* const* target, const Vector<T>* taps, Index count,
                   Index ahead, Index constraint, const T* const* share) {
    // In arrays of its own, so that the compiler sees that no store changes them.
    const Source* from[2 * R + BATCH];
    const T* by[BATCH];
    Target* to[BATCH];
    for (int i = 0; i < 2 * R + BATCH; ++i) from[i] = source[i] + count;
    for (int b = 0; b < BATCH; ++b) to[b] = target[b] + count;
    for (int b = 0; share && b < BATCH; ++b) by[b] = share[b] + count;
    for (Index x = -count; x < 0; x += LANES<T>) {
        Vector<T> result[BATCH];
        smooth<T, R>(taps, [&](int b, auto j) INLINE { return load_as<T>(from[b + R + j] + x); }, result);
        for (int b = 0; b < BATCH; ++b) {
            if (!MOVES) __builtin_prefetch(from[b + R] + x + ahead);
            if (MOVES && share) result[b] = normalised<Target, T>(result[b], load(by[b] + x));
            store_as<T>(to[b] + x, MOVES ? moved(constraint, load_as<T>(to[b] + x), result[b]) : result[b]);
        }
    }
}
// Smooth a striped row along itself. As BATCH vectors go together, more than `count` values may be
// written.
template <class T, int R> void smooth_along(const T* source, T* target, const Vector<T>* taps, Index count) {
    constexpr Index N = LANES<T>;
    for (Index x = 0; x < count; x += BATCH * N) {
        Vector<T> result[BATCH];
        smooth<T, R>(taps, [&](int b, auto j) INLINE { return load(source + x + (b + j) * N); }, result);
        for (int b = 0; b < BATCH; ++b) store(target + x + b * N, result[b]);
    }
}

template <class T, class Source, class Target>
using SmoothAcross = decltype(&smooth_across<T, Source, Target, 1, false>);
template <class T> using SmoothAlong = decltype(&smooth_along<T, 1>);
// These functions for a radius that is known only now, at most LARGEST_RADIUS; along rows from 1 on.
template <class T, class Source, class Target, bool MOVES = false, int R = LARGEST_RADIUS>
SmoothAcross<T, Source, Target> smooth_across_of(Index radius) {
    if constexpr (R > 0)
        if (radius < R) return smooth_across_of<T, Source, Target, MOVES, R - 1>(radius);
    return &smooth_across<T, Source, Target, R, MOVES>;
}
template <class T, int R = LARGEST_RADIUS> SmoothAlong<T> smooth_along_of(Index radius) {
    if constexpr (R > 1)
        if (radius < R) return smooth_along_of<T, R - 1>(radius);
    return &smooth_along<T, R>;
}

// How a field moves to its smooth copy.
template <class T> struct Move {
    Index constraint;
    const T* share;  // see `normalised`; such that blank voxels become 0; null without any
};

}  // namespace cdd
