// What has to be known of a field before its first step.
#pragma once
#include <limits>
#include "vectors.hpp"

namespace cdd {

struct Survey {
    double least, most;  // but for NaN; infinite where there is nothing else
    Index blank;         // whether there is any NaN
};

template <class T> Survey survey(const T* values, Index count) {
    constexpr Index N = LANES<T>;
    constexpr T infinity = std::numeric_limits<T>::infinity();
    Vector<T> least = splat(infinity), most = splat(-infinity), odd = {};
    auto take = [&](Vector<T> v) {
        least = v < least ? v : least;
        most = v > most ? v : most;
        odd = v == v ? odd : splat(T(1));
    };
    const Index whole = count / N * N;
    for (Index x = 0; x < whole; x += N) take(load(values + x));
    if (whole < count) {
        Vector<T> rest = splat(values[whole]);
        for (Index x = whole; x < count; ++x) rest[x - whole] = values[x];
        take(rest);
    }
    Survey result = {double(infinity), -double(infinity), 0};
    for (Index lane = 0; lane < N; ++lane) {
        result.least = double(least[lane]) < result.least ? double(least[lane]) : result.least;
        result.most = double(most[lane]) > result.most ? double(most[lane]) : result.most;
        if (odd[lane] > 0) result.blank = 1;
    }
    return result;
}

}  // namespace cdd
