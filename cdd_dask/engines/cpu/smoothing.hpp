// Smoothing across rows, the one operation of which every axis of a step is made, and the
// constraint.
//
// A kernel of radius R with weights w_j is applied in differences,
//
//     a_0 + sum_j 2 w_j ((a_-j + a_+j) / 2 - a_0),
//
// from the outermost pair inwards: a constant field comes back to the bit, and rounding does not
// wear others down. Terms of even j are written w_j ((a_-j + a_+j) - 2 a_0): the same but in the
// subnormal range, where their bits differ.
#pragma once
#include "vectors.hpp"

namespace cdd {

constexpr int BATCH = 4;            // rows that are smoothed at once, so that each is loaded less often
constexpr int LARGEST_RADIUS = 16;  // of the kernels that are unrolled

// How values move to the smooth ones: all the way, only towards 0, or only away from it.
enum Constraint : Index { UNCONSTRAINED, CONSTRAINED, INVERTED };

// The value `old` moved to `smooth`, where `sign` is 1 if values sink towards 0, -1 if they rise.
template <class T> inline INLINE Vector<T> moved(Vector<T> old, Vector<T> smooth, Vector<T> sign) {
    const Vector<T> less = smooth < old ? smooth : old, more = smooth > old ? smooth : old;
    const Vector<T> height = old * sign;
    return height > 0 ? less : height < 0 ? more : old;
}

// Smooth BATCH rows: row b is the mean of the rows b to b + 2 R of `source` around b + R. Vectors
// from 0 to `count` values are computed, `stride` values apart. Rows `soon` are wanted next. With
// MOVES the target's values are not replaced but moved to the smooth ones.
template <class T, int R, bool MOVES>
void smooth_across(const T* const* source, T* const* target, const T* const* soon, const T* weights,
                   Index count, Index stride, T sign) {
    Vector<T> taps[R + 1], signs = splat(sign);
    for (int j = 1; j <= R; ++j) taps[j] = splat((j % 2 ? T(2) : T(1)) * weights[j - 1]);
    for (Index x = 0; x < count; x += stride) {
        Vector<T> sum[BATCH];
        unrolled<R>([&](auto outer) INLINE {  // all rows together: one sum alone waits for itself
            constexpr int j = R - outer;
            for (int b = 0; b < BATCH; ++b) {
                const Vector<T> centre = load(source[b + R] + x);
                const Vector<T> pair = load(source[b + R - j] + x) + load(source[b + R + j] + x);
                const Vector<T> excess = j % 2 ? fma(splat(T(0.5)), pair, -centre) : fma(splat(T(-2)), centre, pair);
                sum[b] = j == R ? taps[j] * excess : fma(taps[j], excess, sum[b]);
            }
        });
        for (int b = 0; b < BATCH; ++b) __builtin_prefetch(soon[b] + x);
        for (int b = 0; b < BATCH; ++b) {
            const Vector<T> smooth = load(source[b + R] + x) + sum[b];
            store(target[b] + x, MOVES ? moved<T>(load(target[b] + x), smooth, signs) : smooth);
        }
    }
}

template <class T> using SmoothAcross = decltype(&smooth_across<T, 1, false>);
template <class T, bool MOVES, int R = LARGEST_RADIUS> SmoothAcross<T> smooth_across_of(Index radius) {
    if constexpr (R == 0) return nullptr;
    else return radius == R ? &smooth_across<T, R, MOVES> : smooth_across_of<T, MOVES, R - 1>(radius);
}

template <class T> inline INLINE Vector<T> rounded_to_float(Vector<T> value) {
    typedef float Floats __attribute__((vector_size(LANES<T> * sizeof(float))));
    return __builtin_convertvector(__builtin_convertvector(value, Floats), Vector<T>);
}

// How a row of a field moves to its smooth copy.
template <class T> struct Move {
    Index constraint;
    // What blanks leave of the kernel, like the field, and infinite where blank; null without blanks.
    // Where the field `rounds` to float, 1 over it: a product is a fraction of a division's time.
    const T* share;
    bool rounds;

    // `place` is that of the row in the field.
    void row(T* field, const T* smooth, Index place, Index count) const {
        if (!share) with<false, false>(field, smooth, place, count);
        else if (!rounds) with<true, false>(field, smooth, place, count);
        else with<true, true>(field, smooth, place, count);
    }
    T sign() const { return constraint == INVERTED ? T(-1) : T(1); }

private:
    template <bool BLANKS, bool ROUNDS> void with(T* field, const T* smooth, Index place, Index count) const {
        const Vector<T> signs = splat(sign());
        for (Index x = 0; x < count; x += LANES<T>) {
            Vector<T> value = load(smooth + x);
            if (BLANKS && !ROUNDS) value /= load(share + place + x);
            if (BLANKS && ROUNDS) value = rounded_to_float<T>(value * load(share + place + x));
            if (constraint != UNCONSTRAINED) value = moved<T>(load(field + place + x), value, signs);
            store(field + place + x, value);
        }
    }
};

}  // namespace cdd
