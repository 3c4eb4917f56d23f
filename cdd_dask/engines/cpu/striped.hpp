// Striped rows: the layout in which fields are diffused.
//
// A row of n voxels is cut into as many stripes as a vector has lanes, each of `length` voxels, and
// vector i holds the i-th voxel of every stripe. Here with 4 lanes, length 3 and n = 10:
//
//     voxel    0 1 2 | 3 4 5 | 6 7 8 | 9 . .        vectors   0 3 6 9 | 1 4 7 . | 2 5 8 .
//
// The neighbour along the row of every voxel in a vector is the same lane of the next vector. So
// smoothing along a row takes no shuffles, rows begin at whole vectors, and none has a remainder.
// (Henretty et al. 2011, doi:10.1007/978-3-642-19861-8_13.) Voxels beyond the n-th are padding:
// they may hold anything finite.
#pragma once
#include <algorithm>
#include <limits>
#include "team.hpp"
#include "vectors.hpp"

namespace cdd {

// What lies beyond the ends of a striped row, whose voxels are those from `first` to `last - 1`.
template <class T> struct Ends {
    Index length;       // vectors of a row
    Index first, last;  // places of the row's own voxels
    // `begin` <= 0: so many places are wanted before the row, up to `end` behind it, and -begin vectors
    // on either side.
    Index begin, end;
    // For each place that is not its own, in order: its position among the row's values (unused if it
    // lies outside), and the position of the value that it takes, or -1 for `outside`.
    const Index *to, *source;
    T outside;          // the value for -1

    // Fill the -begin vectors on either side and the padding; there is room, and for one more value.
    void extend(T* row) const {
        constexpr Index N = LANES<T>;
        const Index before = first - begin, wanted = before + end - last;
        auto value = [&](Index i) { return source[i] < 0 ? outside : row[source[i]]; };
        for (Index i = -begin; i < before; ++i) row[to[i]] = value(i);
        for (Index i = before; i < std::min(wanted, before + N * length - last); ++i) row[to[i]] = value(i);
        for (Index i = -1; i >= begin; --i) {  // vector i is vector i + length, one stripe before
            Vector<T> shifted = load(row + (i + length) * N - 1);
            shifted[0] = value(i - begin);
            store(row + i * N, shifted);
        }
        for (Index i = 0; i < -begin; ++i) {  // and vector i + length is vector i, one stripe after
            Vector<T> shifted = load(row + i * N + 1);
            const Index place = before + N * length + i - last;
            shifted[N - 1] = place < wanted ? value(place) : T(0);
            store(row + (i + length) * N, shifted);
        }
    }
};

// One vector made of two: lanes with the bit WIDTH set come from `high`, WIDTH lanes before.
template <int WIDTH, bool UPPER, class V, int... I>
inline INLINE V mixed(V low, V high, std::integer_sequence<int, I...>) {
    constexpr int N = int(sizeof...(I));
    return __builtin_shufflevector(low, high, (UPPER ? (I & WIDTH ? N + I : I + WIDTH) : (I & WIDTH ? N + I - WIDTH : I))...);
}
// Exchange the rows and columns of as many vectors as one has lanes.
template <class T, int WIDTH = 1> inline INLINE void transpose(Vector<T>* square) {
    constexpr int N = int(LANES<T>);
    if constexpr (WIDTH < N) {
        using Lanes = std::make_integer_sequence<int, N>;
        unrolled<N>([&](auto i) INLINE {
            if constexpr (!(i & WIDTH)) {
                const Vector<T> low = square[i], high = square[i + WIDTH];
                square[i] = mixed<WIDTH, false>(low, high, Lanes{});
                square[i + WIDTH] = mixed<WIDTH, true>(low, high, Lanes{});
            }
        });
        transpose<T, 2 * WIDTH>(square);
    }
}
// A row between its plain and its striped form; a plain row has room for a vector more.
template <class T, class Field> void stripe(const T* plain, Field* row, Index length) {
    constexpr Index N = LANES<T>;
    for (Index i = 0; i < length; i += N) {
        Vector<T> square[N];
        for (Index lane = 0; lane < N; ++lane) square[lane] = load(plain + lane * length + i);
        transpose<T>(square);
        for (Index j = 0; j < std::min(N, length - i); ++j) store_as<T>(row + (i + j) * N, square[j]);
    }
}
template <class T, class Field> void unstripe(const Field* row, T* plain, Index length) {
    constexpr Index N = LANES<T>;
    // What is written too much falls on the next stripe's first values, which come later.
    for (Index i = (length - 1) / N * N; i >= 0; i -= N) {
        Vector<T> square[N];
        for (Index j = 0; j < N; ++j) square[j] = load_as<T>(row + std::min(i + j, length - 1) * N);
        transpose<T>(square);
        for (Index lane = 0; lane < N; ++lane) store(plain + lane * length + i, square[lane]);
    }
}

// Rows of a plain field and of its copy, striped for computing in T.
template <class Field, class T> struct Rows {
    Field *field, *copy;
    Index count, size;    // rows, and voxels of each
    Index length, first;  // vectors of a striped row, and the place of a row's first voxel
    double scale;         // of the copy
    bool mask;            // whether to copy 1 for a number (0 value + 1) instead of its value
    T* scratch;           // LANES * (length + 1) values for each thread

    // Copy the field, with 0 for NaN.
    void to_striped(Index thread, Part part) const {
        constexpr Index N = LANES<T>;
        T* __restrict const plain = scratch + thread * N * (length + 1);
        std::fill_n(plain, N * (length + 1), T(0));
        const T factor = T(mask ? 0 : scale), mark = T(mask ? 1 : 0);
        for (Index row = part.begin; row < part.end; ++row) {
            const Field* __restrict const source = field + row * size;
            for (Index x = 0; x < size; ++x) {
                const T value = T(source[x]) * factor + mark;
                plain[first + x] = value == value ? value : T(0);
            }
            stripe(plain, copy + row * N * length, length);
        }
    }
    // Copy it back, but leave what is NaN.
    void to_plain(Index thread, Part part) const {
        constexpr Index N = LANES<T>;
        T* __restrict const plain = scratch + thread * N * (length + 1);
        const T factor = T(1 / scale);  // a power of two
        for (Index row = part.begin; row < part.end; ++row) {
            unstripe(copy + row * N * length, plain, length);
            Field* __restrict const target = field + row * size;
            for (Index x = 0; x < size; ++x) {
                const Field value = Field(plain[first + x] * factor), old = target[x];
                target[x] = old == old ? value : old;
            }
        }
    }
};

}  // namespace cdd
