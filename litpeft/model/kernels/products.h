// Products with weights in strips of 16 outputs, in bfloat16 or in codes.
//
// Letters: M rows, K inputs, N outputs. Every sum has one order, whatever M is: the bits of a row's result do not
// depend on the other rows.

#pragma once

#include "tiles.h"

// what is applied to W x: gain W x + bias + b^T a x
struct Affine {
    const float* gain;    // (N,), or null
    const float* bias;    // (N,), or null
    const float* a;       // (rank, K) and
    const float* b;       // (rank, N): a low-rank update
    Long rank;
};

// W (N, K) of layers that read the same input; generate/cpu/native_weights.py describes the layout
struct PackedLinears {
    const uint8_t* weight;
    const float* scale;   // (K / span, N), or null: factors of the sums over `span` inputs
    const float* shift;   // (K / span, N), or null: what is added to the weights of `span` inputs, a multiple of 32
    const bf16* codes;    // (N / 16, 32): the 16 values of a strip's four-bit codes, twice; null for other kinds
    const Affine* affines;
    Long kind, inputs, outputs, span;
};

// rows of texts, of `tokens` rows each, and which of the affine maps each text has: the first, if that is null
struct Rows {
    Long texts, tokens;
    const Long* affine;  // (texts,), or null
    Long count() const { return texts * tokens; }
};

// A kind of weight: the bytes of two inputs of 16 outputs, and how to load four inputs of each as bfloat16.

struct Bfloat16 {
    static constexpr Long BYTES = 64;
    static inline void load(const uint8_t* p, const bf16*, __m512bh& x, __m512bh& y) {
        x = (__m512bh)_mm512_loadu_si512(p);
        y = (__m512bh)_mm512_loadu_si512(p + BYTES);
    }
};

struct Int8 {
    static constexpr Long BYTES = 32;  // the first inputs of 16 outputs, then the second ones
    static inline __m512i floats(const uint8_t* p) {
        __m128i codes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
        return _mm512_castps_si512(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(codes)));
    }
    static inline __m512bh pair(const uint8_t* p) {  // the upper halves of floats hold integers below 256 exactly
        return (__m512bh)_mm512_or_si512(_mm512_srli_epi32(floats(p), 16), floats(p + 16));
    }
    static inline void load(const uint8_t* p, const bf16*, __m512bh& x, __m512bh& y) {
        x = pair(p);
        y = pair(p + BYTES);
    }
};

struct FourBit {
    static constexpr Long BYTES = 16;  // two inputs in the low halves of 32 bytes, the next two in the high ones
    static inline void load(const uint8_t* p, const bf16* table, __m512bh& x, __m512bh& y) {
        __m512i codes = _mm512_loadu_si512(table);
        __m512i bytes = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
        x = (__m512bh)_mm512_permutexvar_epi16(bytes, codes);  // an index has five bits, so every code is there twice
        y = (__m512bh)_mm512_permutexvar_epi16(_mm512_srli_epi16(bytes, 4), codes);
    }
};

constexpr Long AHEAD = 3072;  // bytes that a strip is prefetched ahead

// y (M, 16 S) = the outputs of S strips from `strip` on, for x (M, K)
template <class Weight, int M, int S>
static void tile(const PackedLinears& linears, const bf16* x, Long strip, float* y) {
    const Long K = linears.inputs, bytes = K / 2 * Weight::BYTES;
    const uint8_t* weight = linears.weight + strip * bytes;
    __m512 total[M][S] = {};
    for (Long from = 0; from < K; from += linears.span) {
        __m512 sum[M][S] = {};
        for (Long k = from; k < std::min(K, from + linears.span); k += 4) {
            __m512bh first[S], second[S];
#pragma GCC unroll 4
            for (int s = 0; s < S; s++) {
                const uint8_t* p = weight + s * bytes + k / 2 * Weight::BYTES;
                Weight::load(p, linears.codes + 32 * (strip + s), first[s], second[s]);
                for (Long line = 0; line < 2 * Weight::BYTES; line += 64) _mm_prefetch(p + AHEAD + line, _MM_HINT_T0);
            }
#pragma GCC unroll 8
            for (int m = 0; m < M; m++) {
                const __m512bh x0 = broadcast(x + m * K + k), x1 = broadcast(x + m * K + k + 2);
#pragma GCC unroll 4
                for (int s = 0; s < S; s++) {
                    sum[m][s] = _mm512_dpbf16_ps(sum[m][s], first[s], x0);
                    sum[m][s] = _mm512_dpbf16_ps(sum[m][s], second[s], x1);
                }
            }
        }
        for (int s = 0; s < S; s++) {
            const Long at = from / linears.span * linears.outputs + 16 * (strip + s);
            const __m512 factor = linears.scale ? _mm512_loadu_ps(linears.scale + at) : _mm512_set1_ps(1);
            for (int m = 0; m < M; m++) total[m][s] = _mm512_fmadd_ps(sum[m][s], factor, total[m][s]);
        }
        for (int m = 0; linears.shift && m < M; m++) {
            __m512 part = _mm512_setzero_ps();
            for (Long k = from; k < from + linears.span; k += 16) part = _mm512_add_ps(part, widen(x + m * K + k));
            const __m512 inputs = _mm512_set1_ps(_mm512_reduce_add_ps(part));
            const float* shift = linears.shift + from / linears.span * linears.outputs + 16 * strip;
            for (int s = 0; s < S; s++)
                total[m][s] = _mm512_fmadd_ps(inputs, _mm512_loadu_ps(shift + 16 * s), total[m][s]);
        }
    }
    for (int m = 0; m < M; m++)
        for (int s = 0; s < S; s++) _mm512_storeu_ps(y + 16 * (m * S + s), total[m][s]);
}

using Tile = void (*)(const PackedLinears&, const bf16*, Long, float*);
constexpr Long MOST = 8, CACHE = 192 << 10;  // rows at a time; bytes of weights that stay in the cache for all rows

struct Tiles {  // for 1 to 8 rows: `wide` takes as many strips as registers hold, `narrow` one
    Long bytes, strips[MOST];
    Tile wide[MOST], narrow[MOST];
};

template <class W>
constexpr Tiles TILES = {
    W::BYTES,
    {4, 4, 4, 4, 4, 4, 2, 2},
    {tile<W, 1, 4>, tile<W, 2, 4>, tile<W, 3, 4>, tile<W, 4, 4>,
     tile<W, 5, 4>, tile<W, 6, 4>, tile<W, 7, 2>, tile<W, 8, 2>},
    {tile<W, 1, 1>, tile<W, 2, 1>, tile<W, 3, 1>, tile<W, 4, 1>,
     tile<W, 5, 1>, tile<W, 6, 1>, tile<W, 7, 1>, tile<W, 8, 1>},
};

static const Tiles* const KINDS[] = {&TILES<Bfloat16>, &TILES<Int8>, &TILES<FourBit>};

// h (M, most), of which each row has a x of its own rank first
static std::unique_ptr<float[]> inner(const Affine* const* own, const bf16* x, Long M, Long K, Long most) {
    std::unique_ptr<float[]> h(new float[M * most]);
    for (Long m = 0; m < M; m++)
        for (Long r = 0; r < own[m]->rank; r++) {
            __m512 sum = _mm512_setzero_ps();
            for (Long k = 0; k < K; k += 16)
                sum = _mm512_fmadd_ps(widen(x + m * K + k), _mm512_loadu_ps(own[m]->a + r * K + k), sum);
            h[m * most + r] = _mm512_reduce_add_ps(sum);
        }
    return h;
}

// calls store(m, n, y) for each 16 outputs from n on of gain W x + bias + update, for x (M, K); threads share the outputs
template <class Store>
static void multiply(const PackedLinears& linears, const bf16* x, const Rows& rows, const Store& store) {
    const Tiles& tiles = *KINDS[linears.kind];
    const Long M = rows.count(), K = linears.inputs;
    const Long near = std::max<Long>(4, CACHE / (K / 2 * tiles.bytes) / 4 * 4);
    const std::unique_ptr<const Affine*[]> own(new const Affine*[M]);
    Long most = 0;
    for (Long m = 0; m < M; m++) {
        own[m] = linears.affines + (rows.affine ? rows.affine[m / rows.tokens] : 0);
        most = std::max(most, own[m]->rank);
    }
    const auto h = inner(own.get(), x, M, K, most);
    const auto [begin, end] = share(linears.outputs / 16);
    alignas(64) float y[MOST * 16 * 4];
    for (Long from = begin; from < end; from += near)
        for (Long m = 0; m < M; m += MOST) {
            const Long count = std::min(MOST, M - m), to = std::min(end, from + near);
            Long strips = tiles.strips[count - 1];
            for (Long strip = from; strip < to; strip += strips) {
                if (strip + strips > to) strips = 1;
                (strips == 1 ? tiles.narrow : tiles.wide)[count - 1](linears, x + m * K, strip, y);
                for (Long i = 0; i < count; i++)
                    for (Long s = 0; s < strips; s++) {
                        const Long n = 16 * (strip + s);
                        const Affine& affine = *own[m + i];
                        __m512 sum = _mm512_load_ps(y + 16 * (i * strips + s));
                        if (affine.gain) sum = _mm512_mul_ps(sum, _mm512_loadu_ps(affine.gain + n));
                        if (affine.bias) sum = _mm512_add_ps(sum, _mm512_loadu_ps(affine.bias + n));
                        for (Long r = 0; r < affine.rank; r++) {
                            const __m512 factor = _mm512_set1_ps(h[(m + i) * most + r]);
                            sum = _mm512_fmadd_ps(factor, _mm512_loadu_ps(affine.b + r * linears.outputs + n), sum);
                        }
                        store(m + i, n, sum);
                    }
            }
        }
}
