// Steps of constrained diffusion of a 3-D field, all axes and the constraint in one pass, in place.
//
// A tile of rows goes along the first axis, z. Every plane of it is smoothed along y and x, and kept
// in a ring of planes, of which BATCH at a time are smoothed along z and *move* the field's values:
//
//     field --across y--> rows --along x--> ring of planes --across z, constraint--> field
//
// The next tile still needs the last rows of this one as they were: they are saved before they
// move. A *visit* of a tile takes `depth` steps while its planes are in the cache, each some planes
// behind the one before and `skew` rows further up, so that it reads nothing that is not there yet:
//
//     step 0   tile 0 | tile 1 | tile 2          rows -->
//     step 1   til| tile 1 | tile 2
//
// Threads take one tile each, in turn, and go along z one after the other: what a tile needs of the
// one before is saved when that one has come as far. So `depth` steps of all tiles are followed by
// the next `depth`, without a pause. One thread alone goes through the tiles in the same order.
//
// Where the cycles of a vector go (AVX-512, one thread, 192³ in float32), counted by hand: an axis of
// radius R takes 3 R operations on two units, three axes and the constraint 4.5 R + 2 cycles. A step,
// timed by `scripts/benchmark.py --before` in a quick minute at 1.85 GHz, takes 8 to 10 more, for the
// ring's planes and the field on their way through the second-level cache.
//
//     radius          2    3    4    7   11
//     arithmetic     11   16   20   34   52
//     step           19   24   28   43   62
#pragma once
#include <new>
#include "smoothing.hpp"
#include "striped.hpp"
#include "team.hpp"

namespace cdd {

constexpr Index LARGEST_DEPTH = 8;  // at least `SAVED_ROWS` in Python
constexpr Index ALL = std::numeric_limits<Index>::max();

// Steps of a field that is kept as Field and computed with in T.
template <class T, class Field = T> struct FusedSteps {
    Field* field;          // striped, of nz planes of ny rows
    Index nz, ny;
    Ends<T> ends;              // of the rows, `begin` and `end` as the radius along x wants them
    const Index* z_from;       // the planes that stand for -radius ... nz + radius - 1, or -1
    const Index* y_from;       // and the rows
    Index radius[3];           // of the kernels along z, y and x, at most LARGEST_RADIUS
    const Vector<T>* taps[3];  // of `smooth_across`, at distances 1 ... radius
    Move<T> move;
    Index count;         // of steps
    Index depth;         // steps of a visit; 1 where an axis wraps around
    Index skew;          // rows; a multiple of BATCH, at least the radius along y
    Index rows;          // of a tile, a multiple of `skew`
    bool wraps[2];       // whether planes, and rows, beyond one end are those of the other end
    T* scratch;          // `scratch_size()` values for each thread
    Field* saved;        // `saved_size()` values
    // For every tile of every visit, how many rounds it has smoothed and saved (a round is one batch of
    // planes in one step): 0 at first, ALL when its last values have moved.
    Counter* progress;
    Team* team;

    Index width() const { return ends.length * LANES<T>; }
    Index ring() const { return 2 * radius[0] + BATCH; }
    Index planes() const { return ring() + (wraps[0] ? radius[0] : 0); }
    // A plane of a tile, with room for what `smooth_along` writes past a row's end, which also keeps
    // planes off the same cache lines.
    Index plane_size() const { return rows * width() + BATCH * LANES<T>; }
    Index row_size() const { return (ends.length - 2 * ends.begin + 2 + BATCH) * LANES<T>; }
    Index scratch_size() const { return BATCH * row_size() + 3 * width() + depth * planes() * plane_size(); }
    // One more if planes wrap around: a tile then saves the last ones before its slot's reader is done.
    Index saved_slots() const { return std::min(team->size, visits() * tiles()) + (wraps[0] ? 1 : 0); }
    Index slot_size() const { return nz * radius[1] * width(); }
    Index saved_size() const { return (saved_slots() * depth + (wraps[1] ? 1 : 0)) * slot_size(); }
    Index tiles() const { return (ny + (depth - 1) * skew + rows - 1) / rows; }
    Index visits() const { return (count + depth - 1) / depth; }

    void run(Index thread) const;
    // Be ready to run again.
    void forget() const {
        for (Index i = 0; i < visits() * tiles(); ++i) progress[i].store(0);
    }
};

// A step of a tile: its place, and the planes that it has smoothed.
template <class T, class Field> class TileStep {
    const FusedSteps<T, Field>& steps;
    const Index step, first, last;  // its number in the visit; rows of the tile
    // Saved rows: those that this tile saves for the next one; those that the one before saved (with
    // one thread in the same slot: each is read before it is replaced); the first tile's, where rows
    // wrap around.
    Field *const saved, *const saved_before, *const saved_first;
    T *const planes, *const rows, *const outside;
    Field *const outside_field, *const spare;
    Index next = 0;  // the plane to smooth next

public:
    TileStep(const FusedSteps<T, Field>& s, T* scratch, Index tile, Index number, Index step_)
        : steps(s), step(step_),
          first(std::clamp(tile * s.rows - step_ * s.skew, Index(0), s.ny)),
          last(std::clamp((tile + 1) * s.rows - step_ * s.skew, Index(0), s.ny)),
          saved(slot(number)), saved_before(slot(number + s.saved_slots() - 1)),
          saved_first(s.saved + s.saved_slots() * s.depth * s.slot_size()),
          planes(scratch + BATCH * s.row_size() + 3 * s.width() + step_ * s.planes() * s.plane_size()),
          rows(scratch - s.ends.begin * LANES<T> + LANES<T>),
          outside(scratch + BATCH * s.row_size()), outside_field(reinterpret_cast<Field*>(outside + s.width())),
          spare(outside_field + s.width()) {
        std::fill_n(outside, s.width(), s.ends.outside);
        std::fill_n(outside_field, s.width(), Field(s.ends.outside));
    }
    bool empty() const { return first >= last; }

    // Smooth the planes that the batch at z is moved by, and keep what the next tile needs of them.
    void smooth_planes(Index z) {
        if (next == 0 && steps.wraps[0])
            for (Index i = 0; i < steps.radius[0]; ++i) {
                smooth_plane(steps.z_from[i], ring_plane(i - steps.radius[0]));
                save(steps.z_from[i]);
            }
        for (; next < std::min(z + BATCH + steps.radius[0], steps.nz); ++next) {
            smooth_plane(next, ring_plane(next));
            // of planes that wrap around, the last ones are saved already
            if (!steps.wraps[0] || next < steps.nz - steps.radius[0]) save(next);
            if (steps.wraps[0] && next < steps.radius[0])
                std::copy_n(ring_plane(next), steps.plane_size(), first_plane(next));
        }
    }
    void move(Index z) const {
        const Index width = steps.width(), ring = steps.ring();
        const T* const share = steps.move.share;
        const auto across = smooth_across_of<T, T, Field, true>(steps.radius[0]);
        const T *plane[2 * LARGEST_RADIUS + BATCH], *source[2 * LARGEST_RADIUS + BATCH], *shares[BATCH];
        Field* target[BATCH];
        for (Index i = 0; i < ring; ++i) plane[i] = smoothed_plane(z + i - steps.radius[0]);
        for (Index y = first; y < last; ++y) {
            for (Index i = 0; i < ring; ++i)
                source[i] = plane[i] == outside ? outside : plane[i] + (y - first) * width;
            for (Index b = 0; b < BATCH; ++b) {
                target[b] = field(std::min(z + b, steps.nz - 1), y);
                if (share) shares[b] = share + (target[b] - steps.field);
                if (z + b >= steps.nz) target[b] = spare;  // for nothing
            }
            across(source, target, steps.taps[0], width, 0, steps.move.constraint, share ? shares : nullptr);
        }
    }

private:
    void save(Index z) const {
        const Index radius = steps.radius[1], size = radius * steps.width();
        if (last < steps.ny) std::copy_n(field(z, last - radius), size, saved_row(saved, z, 0));
        if (steps.wraps[1] && first == 0)
            std::copy_n(field(z, 0), std::min(radius, steps.ny) * steps.width(), saved_row(saved_first, z, 0));
    }
    Field* slot(Index number) const {
        return steps.saved + (number % steps.saved_slots() * steps.depth + step) * steps.slot_size();
    }
    Field* saved_row(Field* from, Index plane, Index i) const { return from + (plane * steps.radius[1] + i) * steps.width(); }
    Field* field(Index z, Index y) const { return steps.field + (z * steps.ny + y) * steps.width(); }
    // A row before this step, y from -radius to ny + radius - 1.
    const Field* row(Index z, Index y) const {
        const Index from = steps.y_from[y + steps.radius[1]];
        if (from < 0) return outside_field;
        if (y >= steps.ny && steps.wraps[1] && first > 0) return saved_row(saved_first, z, from);
        if (from >= first) return field(z, from);
        return saved_row(saved_before, z, from - first + steps.radius[1]);
    }
    T* ring_plane(Index z) const { return planes + (z + steps.ring()) % steps.ring() * steps.plane_size(); }
    T* first_plane(Index z) const { return planes + (steps.ring() + z) * steps.plane_size(); }
    // A plane that has been smoothed, z from -radius on; beyond nz + radius - 1 any will do.
    const T* smoothed_plane(Index z) const {
        z = std::min(z, steps.nz + steps.radius[0] - 1);
        const Index from = steps.z_from[z + steps.radius[0]];
        if (from < 0) return outside;
        if (steps.wraps[0] && z < 0) return ring_plane(z);
        return steps.wraps[0] && z >= steps.nz ? first_plane(from) : ring_plane(from);
    }
    // Smooth the tile's rows of a plane along y and x.
    void smooth_plane(Index z, T* plane) const {
        const Index width = steps.width(), ry = steps.radius[1], rx = steps.radius[2];
        // Prefetch the rows of the plane two further on.
        const Index ahead = step == 0 && z + 2 < steps.nz ? 2 * steps.ny * width : 0;
        const auto across = smooth_across_of<T, Field, T>(ry);
        const auto along = smooth_along_of<T>(rx);
        for (Index y = first; y < last; y += BATCH, plane += BATCH * width) {
            const Field* source[2 * LARGEST_RADIUS + BATCH];
            for (Index i = 0; i < 2 * ry + BATCH; ++i)
                source[i] = row(z, std::min(y + i, steps.ny + 2 * ry - 1) - ry);
            T* target[BATCH];
            for (Index b = 0; b < BATCH; ++b) target[b] = rx ? rows + b * steps.row_size() : plane + b * width;
            across(source, target, steps.taps[1], width, ahead, UNCONSTRAINED, nullptr);
            for (Index b = 0; rx && b < std::min<Index>(BATCH, last - y); ++b) {
                steps.ends.extend(target[b]);
                along(target[b], plane + b * width, steps.taps[2], width);  // the next row replaces what is too much
            }
        }
    }
};

template <class T, class Field> void FusedSteps<T, Field>::run(Index thread) const {
    T* const own = scratch + thread * scratch_size();
    const Index lag = (radius[0] + BATCH - 1) / BATCH, batches = (nz + BATCH - 1) / BATCH;
    for (Index number = thread; number < visits() * tiles(); number += team->size) {  // of all visits
        const Index visit = number / tiles(), tile = number % tiles();
        Counter &mine = progress[number], &before = progress[std::max(number, Index(1)) - 1];
        auto reached = [&](const Counter& counter, Index round) {
            return team->wait([&] { return counter.load(std::memory_order_acquire) > round; });
        };
        if (visit > 0) {  // the rows that this tile reads must have taken all steps of the visit before
            const Index reach = wraps[0] || wraps[1] ? ny : std::min(ny, (tile + 1) * rows + radius[1]);
            const Index last = std::min(tiles() - 1, (reach + (depth - 1) * skew + rows - 1) / rows - 1);
            if (!reached(progress[(visit - 1) * tiles() + last], ALL - 1)) return;
        }
        const Index taken = std::min(depth, count - visit * depth);
        using Step = TileStep<T, Field>;
        alignas(Step) char room[LARGEST_DEPTH * sizeof(Step)];
        Step* const steps = reinterpret_cast<Step*>(room);
        for (Index step = 0; step < taken; ++step) new (steps + step) Step(*this, own, tile, number, step);
        for (Index front = 0; front < batches + (taken - 1) * lag; ++front)
            for (Index step = 0; step < taken; ++step) {
                const Index z = (front - step * lag) * BATCH, round = front * depth + step;
                // Wait until the tile before has passed this round: then it has saved the rows that this
                // one reads, read those that this one moves or replaces, and taken all earlier steps of
                // rows that this one reads.
                if (number > 0 && !reached(before, round)) return;
                const bool works = z >= 0 && z < nz && !steps[step].empty();
                if (works) steps[step].smooth_planes(z);
                mine.store(round + 1, std::memory_order_release);
                if (works) steps[step].move(z);
            }
        if (number > 0 && !reached(before, ALL - 1)) return;
        mine.store(ALL, std::memory_order_release);
    }
}

}  // namespace cdd
