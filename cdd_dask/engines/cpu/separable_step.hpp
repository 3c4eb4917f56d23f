// Smoothing of plain fields along one axis at a time: any number of axes, kernels of any radius.
#pragma once
#include <algorithm>
#include "smoothing.hpp"
#include "team.hpp"

namespace cdd {

// Smooth a field along the middle one of three axes.
template <class Field, class T> struct SmoothAxis {
    const Field* field;
    T* out;          // may be the field
    Index n, inner;  // lengths of the last two axes
    Index radius;
    const Index* source;  // the places that stand for -radius ... n + radius - 1, or -1
    const T* weights;   // at distances 1 ... radius
    Field outside;      // the value for -1
    Field* scratch;     // (n + 2 radius) WIDTH values for each thread
    T* sums;            // CHUNK values for each thread
    Index lines;        // to smooth, `inner` for each place along the first axis

    static constexpr Index WIDTH = 64;   // neighbours whose lines are smoothed together
    static constexpr Index CHUNK = 512;  // values that are summed at once, to stay in the cache

    void run(Index thread, Part part) const {
        Field* const tile = scratch + thread * (n + 2 * radius) * WIDTH;
        T* const sum = sums + thread * CHUNK;
        for (Index line = part.begin; line < part.end;) {
            const Index o = line / inner, column = line % inner;
            const Index wide = std::min({WIDTH, inner - column, part.end - line});
            line += wide;
            for (Index i = 0; i < n + 2 * radius; ++i)
                for (Index x = 0; x < wide; ++x)
                    tile[i * wide + x] = source[i] < 0 ? outside : field[(o * n + source[i]) * inner + column + x];
            // rows of the tile lie side by side: so many values at once as they fill
            const Index step = CHUNK / wide * wide;
            for (Index first = 0; first < n * wide; first += step) {
                const Index width = std::min(step, n * wide - first);
                std::fill_n(sum, CHUNK, T(0));
                const Field* const centre = tile + first + radius * wide;
                for (Index j = radius; j > 0; --j) {
                    const T twice = T(2) * weights[j - 1];
                    for (Index x = 0; x < width; ++x) {
                        const T pair = T(centre[x - j * wide]) + T(centre[x + j * wide]);
                        sum[x] += twice * (T(0.5) * pair - T(centre[x]));
                    }
                }
                for (Index x = 0; x < width; ++x) {
                    const Index i = (first + x) / wide, y = (first + x) % wide;
                    out[(o * n + i) * inner + column + y] = sum[x] + T(centre[x]);
                }
            }
        }
    }
};

// Move the values of a plain field to their smooth copy.
template <class Field, class T> struct MovePlain {
    Field* field;
    const T* smooth;
    const T* share;  // as in Move; never 1 over it
    Index constraint, count;

    void run(Part part) const {
        for (Index x = part.begin; x < part.end; ++x) {
            const Field value = Field(share ? smooth[x] / share[x] : smooth[x]), old = field[x];
            field[x] = moved(constraint, old, value);
        }
    }
};

}  // namespace cdd
