// Vectors of numbers, as long as the hardware's: longer ones are many times slower.
//
// Arithmetic on `Vector<T>` is the compiler's (GCC's and Clang's vector extensions). What it lacks
// is here: loads, stores, and a product and a sum that are rounded once. Nothing else may be fused,
// so everything is compiled with -ffp-contract=off, and every instruction set gives the same bits.
#pragma once
#include <cmath>
#include <cstdint>
#include <type_traits>
#include <utility>
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#define INLINE __attribute__((always_inline))

namespace cdd {

using Index = std::int64_t;

#if defined(__AVX512F__)
constexpr int VECTOR_BYTES = 64;
#elif defined(__AVX2__)
constexpr int VECTOR_BYTES = 32;
#else
constexpr int VECTOR_BYTES = 16;
#endif

template <class T> constexpr Index LANES = VECTOR_BYTES / Index(sizeof(T));
template <class T> struct VectorOf {
    typedef T type __attribute__((vector_size(VECTOR_BYTES)));
    typedef T anywhere __attribute__((vector_size(VECTOR_BYTES), aligned(sizeof(T)), may_alias));
};
template <class T> using Vector = typename VectorOf<T>::type;

template <class T> inline INLINE Vector<T> load(const T* from) {
    return *reinterpret_cast<const typename VectorOf<T>::anywhere*>(from);
}
template <class T> inline INLINE void store(T* to, Vector<T> value) {
    *reinterpret_cast<typename VectorOf<T>::anywhere*>(to) = value;
}
// The same for fields that are kept in a shorter type than they are computed in.
template <class T, class Field> inline INLINE Vector<T> load_as(const Field* from) {
    typedef Field Kept __attribute__((vector_size(LANES<T> * sizeof(Field)), aligned(sizeof(Field)), may_alias));
    return __builtin_convertvector(*reinterpret_cast<const Kept*>(from), Vector<T>);
}
template <class T, class Field> inline INLINE void store_as(Field* to, Vector<T> value) {
    typedef Field Kept __attribute__((vector_size(LANES<T> * sizeof(Field)), aligned(sizeof(Field)), may_alias));
    *reinterpret_cast<Kept*>(to) = __builtin_convertvector(value, Kept);
}
template <class T> inline INLINE Vector<T> splat(T value) { return value - Vector<T>{}; }

// a b + c, rounded once.
#if defined(__AVX512F__)
inline INLINE __m512 fma(__m512 a, __m512 b, __m512 c) { return _mm512_fmadd_ps(a, b, c); }
inline INLINE __m512d fma(__m512d a, __m512d b, __m512d c) { return _mm512_fmadd_pd(a, b, c); }
#elif defined(__AVX2__)
inline INLINE __m256 fma(__m256 a, __m256 b, __m256 c) { return _mm256_fmadd_ps(a, b, c); }
inline INLINE __m256d fma(__m256d a, __m256d b, __m256d c) { return _mm256_fmadd_pd(a, b, c); }
#elif defined(__aarch64__)
inline INLINE float32x4_t fma(float32x4_t a, float32x4_t b, float32x4_t c) { return vfmaq_f32(c, a, b); }
inline INLINE float64x2_t fma(float64x2_t a, float64x2_t b, float64x2_t c) { return vfmaq_f64(c, a, b); }
#else
template <class V> V fma(V a, V b, V c) {
    for (unsigned lane = 0; lane < sizeof(V) / sizeof(c[0]); ++lane) c[lane] = std::fma(a[lane], b[lane], c[lane]);
    return c;
}
#endif

// Call `work` with the constants 0, 1, ... COUNT - 1.
template <int COUNT, class Work> inline INLINE void unrolled(Work work) {
    if constexpr (COUNT > 0) {
        unrolled<COUNT - 1>(work);
        work(std::integral_constant<int, COUNT - 1>{});
    }
}

}  // namespace cdd
