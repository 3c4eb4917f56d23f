// Threads that work on one field together. They are Python's: each calls the same function, with a
// number of its own, and they meet here.
#pragma once
#include <atomic>
#include <thread>
#include "vectors.hpp"

namespace cdd {

using Counter = std::atomic<Index>;
static_assert(sizeof(Counter) == sizeof(Index) && Counter::is_always_lock_free);

// What all threads of a team share. Python makes it, of zeros but for `size`.
struct Team {
    Index size;
    Counter abandoned;  // a thread could not be started: nobody waits any more
    Counter arrived, passed;

    // Wait until `ready()`; false if that will never be.
    template <class Ready> bool wait(Ready ready) const {
        for (Index tries = 0; !ready(); ++tries) {
            if (abandoned.load(std::memory_order_relaxed)) return false;
            if (tries > 1000) std::this_thread::yield();
        }
        return true;
    }
    // Wait until all threads are here; false if they will never be.
    bool meet() {
        const Index before = passed.load();
        if (arrived.fetch_add(1) + 1 == size) {
            arrived.store(0);
            passed.store(before + 1);
            return true;
        }
        return wait([&] { return passed.load() != before; });
    }
};

// A thread's part of `total`: from `begin` to `end`.
struct Part {
    Index begin, end;
    Part(Index begin_, Index end_) : begin(begin_), end(end_) {}
    Part(Index total, Index thread, Index size) : begin(total * thread / size), end(total * (thread + 1) / size) {}
};

}  // namespace cdd
