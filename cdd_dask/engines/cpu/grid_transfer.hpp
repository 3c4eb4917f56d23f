// Steps with wide kernels: down to coarse cells, a narrow kernel there, and back up, where the
// constraint acts.
//
// Down, a cell is the mean of four voxels with the weights [1, 3, 3, 1] / 8 along every axis that is
// halved; up, a voxel lies between two cells with the weights 3/4 and 1/4. Both leave a constant
// field as it is, to the bit. Cells of the next step are made of the planes that have just moved,
// while these are in the cache.
#pragma once
#include "fused_step.hpp"

namespace cdd {

// [1, 3, 3, 1] / 8 of four vectors.
template <class T> inline INLINE Vector<T> mean_of_four(const Vector<T>* v) {
    const Vector<T> eighth = splat(T(0.125)), three = splat(T(0.375));
    return fma(three, v[1], eighth * v[0]) + fma(three, v[2], eighth * v[3]);
}
template <class T> inline INLINE Vector<T> between(Vector<T> near, Vector<T> far) {
    return fma(splat(T(0.25)), far - near, near);
}

// Means of 1, 4 or 16 rows; of 16, of each four in turn first.
template <class T, class Field, int COUNT> void mean_across(const Field* const* source, T* target, Index count) {
    for (Index x = 0; x < count; x += LANES<T>) {
        Vector<T> v[COUNT];
        for (int i = 0; i < COUNT; ++i) v[i] = load_as<T>(source[i] + x);
        if constexpr (COUNT == 16)
            for (int i = 0; i < 4; ++i) v[i] = mean_of_four<T>(v + 4 * i);
        store(target + x, COUNT == 1 ? v[0] : mean_of_four<T>(v));
    }
}
// What lies between 1, 2 or 4 rows, each pair being one near and one far.
template <class T, int COUNT> void between_across(const T* const* source, T* target, Index count) {
    for (Index x = 0; x < count; x += LANES<T>) {
        Vector<T> v = load(source[0] + x);
        if constexpr (COUNT > 1) v = between<T>(v, load(source[1] + x));
        if constexpr (COUNT > 2) v = between<T>(v, between<T>(load(source[2] + x), load(source[3] + x)));
        store(target + x, v);
    }
}

// One level of the pyramid: the voxels, or cells that are made of the level before.
template <class T> struct Level {
    void* values;     // striped; voxels are kept as the field's type, cells as T
    Index nz, ny;
    // Of its rows, with one place more beyond either end; and of rows with an even number of vectors,
    // as they are halved.
    Ends<T> ends, even_ends;
    bool halved[3];   // the axes along which the next level is coarser
    // Where the next level's cell i takes its values from: 2 i ... 2 i + 3 along a halved axis,
    // else i; -1 for a value outside.
    const Index *z_from, *y_from;
    // The cells of the next level between which value i lies, twice the same if not halved.
    const Index *z_near, *z_far, *y_near, *y_far;

    Index width() const { return ends.length * LANES<T>; }
    template <class Kept> Kept* row(Index z, Index y) const {
        return static_cast<Kept*>(values) + (z * ny + y) * width();
    }
};

constexpr Index LARGEST_LEVEL = 30;

template <class T, class Field> struct Pyramid {
    const Level<T>* levels;
    Index depth;                     // how often the grid gets coarser: levels - 1
    void* next;                      // like the values of level 1, for the next step
    const FusedSteps<T>* smoothing;  // one step on the coarsest cells
    Move<T> move;
    Index count;                     // of steps
    // Planes of cells of level 1, in the order in which the planes of voxels that they are made of
    // are complete: those from `ready[z]` to `ready[z + 1] - 1` with plane z.
    const Index *order, *ready;
    const Index *first, *last;  // of these planes of voxels, for every plane of cells
    T* scratch;                 // `scratch_size()` values for each thread
    Team* team;

    Index row_size() const { return (levels[0].even_ends.length + 4) * LANES<T>; }
    Index scratch_size() const { return 5 * row_size(); }
    void run(Index thread) const;
};

// A thread's part of the work on a pyramid.
template <class T, class Field> class PyramidPart {
    const Pyramid<T, Field>& pyramid;
    const Index thread;
    Level<T> levels[LARGEST_LEVEL + 1];
    void* next;
    T *const values, *const cells, *const smooth, *const outside, *const plain;  // rows

public:
    PyramidPart(const Pyramid<T, Field>& p, Index thread_)
        : pyramid(p), thread(thread_), next(p.next),
          values(p.scratch + thread_ * p.scratch_size() + 2 * LANES<T>), cells(values + p.row_size()),
          smooth(cells + p.row_size()), outside(smooth + p.row_size()), plain(outside + p.row_size()) {
        std::copy_n(p.levels, p.depth + 1, levels);
    }
    Part part(Index level) const { return {levels[level].nz, thread, pyramid.team->size}; }
    bool meet() const { return pyramid.team->meet(); }

    void run() {
        const Move<T> replace = {UNCONSTRAINED, nullptr};
        const Index depth = pyramid.depth;
        restrict<Field>(0, levels[1].values, part(1));
        for (Index step = 0; step < pyramid.count; ++step) {
            if (!meet()) return;
            for (Index level = 1; level < depth; ++level) {
                restrict<T>(level, levels[level + 1].values, part(level + 1));
                if (!meet()) return;
            }
            FusedSteps<T> smoothing = *pyramid.smoothing;
            smoothing.field = levels[depth].template row<T>(0, 0);
            smoothing.run(thread);
            if (!meet()) return;
            if (thread == 0) smoothing.forget();
            for (Index level = depth - 1; level > 0; --level) {
                prolong<T>(level, part(level), replace);
                if (!meet()) return;
            }
            const bool goes_on = step + 1 < pyramid.count;
            move_voxels(goes_on);
            if (!goes_on) return;
            if (!meet()) return;
            make_other_cells();
            std::swap(levels[1].values, next);
        }
    }

private:
    // Move this thread's voxels, and make the next cells that need no other thread's.
    void move_voxels(bool with_cells) {
        const Part own = part(0);
        for (Index z = own.begin; z < own.end; ++z) {
            prolong<Field>(0, {z, z + 1}, pyramid.move);
            for (Index i = pyramid.ready[z]; with_cells && i < pyramid.ready[z + 1]; ++i) {
                const Index cell = pyramid.order[i];
                if (pyramid.first[cell] >= own.begin) restrict<Field>(0, next, {cell, cell + 1});
            }
        }
    }
    // Make the next cells that need voxels of several threads, or of none.
    void make_other_cells() {
        Index number = 0;
        for (Index cell = 0; cell < levels[1].nz; ++cell) {
            bool shared = true;
            for (Index i = 0; i < pyramid.team->size; ++i) {
                const Part other(levels[0].nz, i, pyramid.team->size);
                if (pyramid.first[cell] >= other.begin && pyramid.last[cell] >= 0 && pyramid.last[cell] < other.end)
                    shared = false;
            }
            if (shared && number++ % pyramid.team->size == thread) restrict<Field>(0, next, {cell, cell + 1});
        }
    }
    // Stripe a row of `length` vectors anew, to one of `other`.
    void restripe(T* row, Index length, Index other) {
        if (length == other) return;
        unstripe(row, plain, length);
        stripe(plain, row, other);
    }
    // Make planes of cells from the level before, whose values are kept as Fine.
    template <class Fine> void restrict(Index level, void* into, Part planes) {
        const Level<T>&fine = levels[level], &coarse = levels[level + 1];
        const Index nz = fine.halved[0] ? 4 : 1, ny = fine.halved[1] ? 4 : 1;  // values of a mean
        const Index stride_z = 1 + fine.halved[0], stride_y = 1 + fine.halved[1];
        Fine* const beyond = reinterpret_cast<Fine*>(outside);
        std::fill_n(beyond, fine.width(), Fine(fine.ends.outside));
        const auto across = nz * ny == 16  ? &mean_across<T, Fine, 16>
                            : nz * ny == 4 ? &mean_across<T, Fine, 4>
                                           : &mean_across<T, Fine, 1>;
        for (Index z = planes.begin; z < planes.end; ++z)
            for (Index y = 0; y < coarse.ny; ++y) {
                const Fine* source[16];
                for (Index j = 0; j < ny; ++j)
                    for (Index i = 0; i < nz; ++i) {
                        const Index plane = fine.z_from[stride_z * z + i], row = fine.y_from[stride_y * y + j];
                        source[j * nz + i] = plane < 0 || row < 0 ? beyond : fine.template row<Fine>(plane, row);
                    }
                T* const result = static_cast<T*>(into) + (z * coarse.ny + y) * coarse.width();
                across(source, fine.halved[2] ? values : result, fine.width());
                if (!fine.halved[2]) continue;
                restripe(values, fine.ends.length, fine.even_ends.length);
                fine.even_ends.extend(values);
                constexpr Index N = LANES<T>;
                for (Index x = 0; x < coarse.width(); x += N) {
                    Vector<T> v[4];
                    for (int i = 0; i < 4; ++i) v[i] = load(values + 2 * x + (i - 1) * N);
                    store(result + x, mean_of_four<T>(v));
                }
            }
    }
    // Make smooth values of planes of a level from cells of the next, and move the level to them.
    template <class Fine> void prolong(Index level, Part planes, const Move<T>& to) {
        const Level<T>&fine = levels[level], &coarse = levels[level + 1];
        const Index nz = fine.halved[0] ? 2 : 1, ny = fine.halved[1] ? 2 : 1;
        const auto across = nz * ny == 4 ? &between_across<T, 4> : nz * ny == 2 ? &between_across<T, 2> : &between_across<T, 1>;
        for (Index z = planes.begin; z < planes.end; ++z)
            for (Index y = 0; y < fine.ny; ++y) {
                const T* source[4];
                for (Index j = 0; j < ny; ++j)
                    for (Index i = 0; i < nz; ++i)
                        source[j * nz + i] = coarse.template row<T>((i ? fine.z_far : fine.z_near)[z], (j ? fine.y_far : fine.y_near)[y]);
                across(source, cells, coarse.width());
                const Index place = (z * fine.ny + y) * fine.width();
                if (fine.halved[2]) {
                    constexpr Index N = LANES<T>;
                    coarse.ends.extend(cells);
                    for (Index x = 0; x < coarse.width(); x += N) {
                        const Vector<T> before = load(cells + x - N), cell = load(cells + x), after = load(cells + x + N);
                        store(smooth + 2 * x, between<T>(cell, before));
                        store(smooth + 2 * x + N, between<T>(cell, after));
                    }
                    restripe(smooth, fine.even_ends.length, fine.ends.length);
                }
                const T* const from = fine.halved[2] ? smooth : cells;
                Fine* const field = fine.template row<Fine>(z, y);
                for (Index x = 0; x < fine.width(); x += LANES<T>) {
                    Vector<T> value = load(from + x);
                    if (to.share) value = normalised<Fine, T>(value, load(to.share + place + x));
                    store_as<T>(field + x, moved(to.constraint, load_as<T>(field + x), value));
                }
            }
    }
};

template <class T, class Field> void Pyramid<T, Field>::run(Index thread) const {
    PyramidPart<T, Field>(*this, thread).run();
}

}  // namespace cdd
