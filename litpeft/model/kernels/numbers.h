// Sixteen numbers at a time: bfloat16 in memory, float32 in a register (AVX-512 BF16).

#pragma once

#include <immintrin.h>
#include <omp.h>

#include <cmath>
#include <cstdint>
#include <utility>

using bf16 = uint16_t;
using Long = int64_t;

static inline __m512 widen(const bf16* x) {
    __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

static inline void narrow(bf16* x, __m512 y) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(x), (__m256i)_mm512_cvtneps_pbh(y));
}

static inline __m512bh load_pairs(const bf16* x) { return (__m512bh)_mm512_loadu_si512(x); }  // 16, for a product

static inline float number(bf16 x) { return _mm_cvtss_f32(_mm_castsi128_ps(_mm_cvtsi32_si128(uint32_t(x) << 16))); }

// e^x = 2^n e^r, |r| <= ln 2 / 2, by Taylor's series, to a relative error of some 2e-7. Beyond 200 it is infinite or 0.
static inline __m512 exponential(__m512 x) {
    x = _mm512_min_ps(_mm512_set1_ps(200), _mm512_max_ps(_mm512_set1_ps(-200), x));  // in this order nan stays nan
    __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), _MM_FROUND_TO_NEAREST_INT);
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
    r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
    __m512 y = _mm512_set1_ps(1.f / 720);
    for (float factor : {1.f / 120, 1.f / 24, 1.f / 6, 1.f / 2, 1.f, 1.f})
        y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(factor));
    return _mm512_scalef_ps(y, n);
}

static inline __m512 sigmoid(__m512 x) {
    const __m512 one = _mm512_set1_ps(1);
    return _mm512_div_ps(one, _mm512_add_ps(one, exponential(_mm512_sub_ps(_mm512_setzero_ps(), x))));
}

// y = x / rms(x) * weight for one row of d numbers; returns 1 / rms(x)
static inline float norm_row(const bf16* x, const float* weight, double eps, Long d, bf16* y) {
    __m512 squares = _mm512_setzero_ps();
    for (Long i = 0; i < d; i += 16) {
        const __m512 part = widen(x + i);
        squares = _mm512_fmadd_ps(part, part, squares);
    }
    const float scale = 1 / std::sqrt(_mm512_reduce_add_ps(squares) / d + eps);
    const __m512 factor = _mm512_set1_ps(scale);
    for (Long i = 0; i < d; i += 16)
        narrow(y + i, _mm512_mul_ps(_mm512_mul_ps(widen(x + i), factor), _mm512_loadu_ps(weight + i)));
    return scale;
}

// this thread's part of n things
static inline std::pair<Long, Long> share(Long n) {
    Long thread = omp_get_thread_num(), threads = omp_get_num_threads();
    return {n * thread / threads, n * (thread + 1) / threads};
}
