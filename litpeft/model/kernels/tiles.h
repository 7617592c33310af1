// Small products in bfloat16, and the layout of their operands: in pairs of inputs, 16 outputs to a strip.

#pragma once

#include <algorithm>
#include <cstring>
#include <memory>

#include "numbers.h"

constexpr Long ROWS = 8;  // of x that are multiplied at a time

using Buffer = std::unique_ptr<bf16[]>;
using Floats = std::unique_ptr<float[]>;

static inline Long rounded(Long m) { return (m + 31) / 32 * 32; }

static inline __m512bh broadcast(const bf16* x) {  // a pair, 16 times
    int pair;
    std::memcpy(&pair, x, sizeof pair);
    return (__m512bh)_mm512_set1_epi32(pair);
}

// 16 pairs, each of a number of one row and the number below it
static inline __m512i zip(__m512i rows) {
    const __m512i each = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8,  //
                                          23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    return _mm512_permutexvar_epi16(each, rows);
}

static inline __m512i zip(const bf16* one, const bf16* next) {  // no next row: zeros
    const __m256i first = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(one));
    const __m256i second = next ? _mm256_loadu_si256(reinterpret_cast<const __m256i*>(next)) : _mm256_setzero_si256();
    return zip(_mm512_inserti64x4(_mm512_castsi256_si512(first), second, 1));
}

static inline __m512i zip(const float* one, const float* next) {
    return zip((__m512i)_mm512_cvtne2ps_pbh(_mm512_loadu_ps(next), _mm512_loadu_ps(one)));
}

// y (8, 16 S) = the sum of x w over pairs of inputs. Strides: `row` and `pair` of the rows and pairs of x, `strip` of
// the S strips of w
template <int S>
static inline void product(const bf16* x, Long row, Long pair, const bf16* w, Long strip, Long pairs, float* y,
                           Long y_row) {
    __m512 sum[ROWS][S] = {};
    for (Long p = 0; p < pairs; p++) {
        __m512bh ws[S];
        for (Long s = 0; s < S; s++) ws[s] = load_pairs(w + s * strip + 32 * p);
#pragma GCC unroll 8
        for (Long i = 0; i < ROWS; i++) {
            const __m512bh xs = broadcast(x + i * row + p * pair);
            for (Long s = 0; s < S; s++) sum[i][s] = _mm512_dpbf16_ps(sum[i][s], ws[s], xs);
        }
    }
    for (Long i = 0; i < ROWS; i++)
        for (Long s = 0; s < S; s++) _mm512_storeu_ps(y + i * y_row + 16 * s, sum[i][s]);
}

// y: strips of x, whose m rows are the outputs and whose D columns are the inputs
static inline void by_row(const bf16* x, Long row, Long m, Long D, bf16* y) {
    const __m512i sixteen = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const __m512i lanes = _mm512_mullo_epi32(sixteen, _mm512_set1_epi32(int(row)));
    for (Long s = 0; s < rounded(m); s += 16) {
        const __mmask16 there = (1u << std::clamp<Long>(m - s, 0, 16)) - 1;
        for (Long i = 0; i < D; i += 2) {
            const bf16* from = x + s * row + i;
            const __m512i pairs = _mm512_mask_i32gather_epi32(_mm512_setzero_si512(), there, lanes, from, 2);
            _mm512_storeu_si512(y + s * D + 16 * i, pairs);
        }
    }
}

// y: strips of x, whose D columns are the outputs and whose m rows, padded with zeros to a multiple of 32, the inputs
static inline void by_column(const bf16* x, Long row, Long m, Long D, bf16* y) {
    const Long M = rounded(m);
    for (Long i = 0; i < D; i += 16)
        for (Long s = 0; s < M; s += 2) {
            const bf16* from = x + s * row + i;
            const __m512i pairs = s < m ? zip(from, s + 1 < m ? from + row : nullptr) : _mm512_setzero_si512();
            _mm512_storeu_si512(y + i * M + 16 * s, pairs);
        }
}

// y (8, D) = `count` rows of x, padded with zeros
static inline void some_rows(const bf16* x, Long row, Long count, Long D, bf16* y) {
    std::memset(y, 0, ROWS * D * sizeof *y);
    for (Long i = 0; i < std::min(ROWS, count); i++) std::memcpy(y + i * D, x + i * row, D * sizeof *y);
}
