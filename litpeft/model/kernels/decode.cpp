// Decoding on a CPU that multiplies in bfloat16: a LLaMA block in one call.
//
// Letters: M rows (B texts of T new tokens each), d model width, D head size, R of it that rotates, H query heads,
// G key/value heads, S keys.

#include <cmath>

#include "products.h"

struct Block {
    PackedLinears qkv, o, gate_up, down;
    const float *norm1, *norm2;  // (d,)
    double eps1, eps2;
    Long heads, kv_heads, size, rotary_dim, window;  // H, G, D, R; keys that a query sees
};

// 1. a block's operations beside its products

// y = x / rms(x) * weight, for this thread's rows
static void norm(const bf16* x, const float* weight, double eps, Long M, Long d, bf16* y) {
    const auto [from, to] = share(M);
    for (Long m = from; m < to; m++) norm_row(x + m * d, weight, eps, d, y + m * d);
}

// y (D,) = x with pairs (i, i + R/2) of its first R numbers rotated; cos and sin (R,), sin negated in its first half
static void rotate(const float* x, const bf16* cos, const bf16* sin, Long R, Long D, bf16* y) {
    alignas(64) float rotated[256];
    for (Long i = 0; i < R; i++)
        rotated[i] = x[i] * number(cos[i]) + x[i < R / 2 ? i + R / 2 : i - R / 2] * number(sin[i]);
    std::copy(x + R, x + D, rotated + R);
    for (Long i = 0; i < D; i += 16) narrow(y + i, _mm512_load_ps(rotated + i));
}

constexpr Long MOST_HEADS = 4;  // query heads, of those that share a key, that are computed at a time

// y (HEADS, D) = softmax(q k^T / sqrt(D)) v over S keys; q and y may be the same; weights and scores are (HEADS, row)
template <int HEADS>
static void attend(const bf16* q, const bf16* k, const bf16* v, Long S, Long D, Long row, float* scores, bf16* weights,
                   bf16* y) {
    for (Long s = 0; s < S; s++)
        for (Long h = 0; h < HEADS; h++) {
            __m512 sum = _mm512_setzero_ps();
            for (Long i = 0; i < D; i += 32)
                sum = _mm512_dpbf16_ps(sum, load_pairs(q + h * D + i), load_pairs(k + s * D + i));
            scores[h * row + s] = _mm512_reduce_add_ps(sum);
        }
    const __m512 factor = _mm512_set1_ps(1 / std::sqrt(float(D)));
    __m512 scale[HEADS];
    for (Long h = 0; h < HEADS; h++) {
        const __m512 most = _mm512_set1_ps(*std::max_element(scores + h * row, scores + h * row + S));
        __m512 sum = _mm512_setzero_ps();
        for (Long s = 0; s < S; s += 16) {
            const __mmask16 there = S - s < 16 ? (1 << (S - s)) - 1 : 0xFFFF;
            const __m512 below = _mm512_sub_ps(_mm512_maskz_loadu_ps(there, scores + h * row + s), most);
            const __m512 weight = _mm512_maskz_mov_ps(there, exponential(_mm512_mul_ps(below, factor)));
            sum = _mm512_add_ps(sum, weight);
            narrow(weights + h * row + s, weight);
        }
        scale[h] = _mm512_set1_ps(1 / _mm512_reduce_add_ps(sum));
    }
    for (Long i = 0; i < D; i += 32) {
        __m512 left[HEADS] = {}, right[HEADS] = {};
        for (Long s = 0; s < S; s += 2) {
            const bf16 *one = v + s * D + i, *next = s + 1 < S ? one + D : nullptr;
            const __m512bh v0 = (__m512bh)zip(one, next), v1 = (__m512bh)zip(one + 16, next ? next + 16 : nullptr);
            for (Long h = 0; h < HEADS; h++) {
                const __m512bh weight = broadcast(weights + h * row + s);
                left[h] = _mm512_dpbf16_ps(left[h], v0, weight);
                right[h] = _mm512_dpbf16_ps(right[h], v1, weight);
            }
        }
        for (Long h = 0; h < HEADS; h++) {
            narrow(y + h * D + i, _mm512_mul_ps(left[h], scale[h]));
            narrow(y + h * D + i + 16, _mm512_mul_ps(right[h], scale[h]));
        }
    }
}

constexpr decltype(&attend<1>) ATTEND[MOST_HEADS] = {attend<1>, attend<2>, attend<3>, attend<4>};

// 2. called from Python

// y (M, N) = W x with the first of the affine maps, for x (M, K)
extern "C" void product(const PackedLinears* linears, const bf16* x, bf16* y, Long M, Long threads) {
#pragma omp parallel num_threads(threads)
    multiply(*linears, x, {M, 1, nullptr}, [&](Long m, Long n, __m512 sum) { narrow(y + m * linears->outputs + n, sum); });
}

// y (B, T, d) = a block's output for x (B, T, d), whose tokens are at `positions` (B, T); cos and sin are (B, T, R).
// Their keys and values are written into the cache, k and v (B, G, length, D). `affine` (B,) are the numbers of the texts'
// affine maps in each product, or null.
extern "C" void block(const Block* b, const bf16* x, bf16* y, bf16* k, bf16* v, const Long* positions, const bf16* cos,
                      const bf16* sin, const Long* affine, Long B, Long T, Long length, Long threads) {
    const Rows rows{B, T, affine};
    const Long M = B * T, H = b->heads, G = b->kv_heads, D = b->size, R = b->rotary_dim;
    const Long d = b->qkv.inputs, all = b->qkv.outputs, middle = b->down.inputs;
    const Floats wide(new float[M * std::max(all, 2 * middle)]);
    const Buffer normed(new bf16[M * d]), heads(new bf16[M * H * D]), inside(new bf16[M * middle]);
    const Long most = *std::max_element(positions, positions + M) + 1;
    const auto keep = [&](Long N) {
        return [&wide, N](Long m, Long n, __m512 sum) { _mm512_storeu_ps(&wide[m * N + n], sum); };
    };
#pragma omp parallel num_threads(threads)
    {
        norm(x, b->norm1, b->eps1, M, d, normed.get());
#pragma omp barrier
        multiply(b->qkv, normed.get(), rows, keep(all));
#pragma omp barrier
        const auto [first, last] = share(M * (H + 2 * G));
        for (Long i = first; i < last; i++) {
            const Long m = i / (H + 2 * G), head = i % (H + 2 * G), group = (head - H) % G;
            const Long key = ((m / T * G + group) * length + positions[m]) * D;
            bf16* to = head < H ? &heads[(m * H + head) * D] : head < H + G ? k + key : v + key;
            rotate(&wide[m * all + head * D], cos + m * R, sin + m * R, head < H + G ? R : 0, D, to);
        }
#pragma omp barrier
        const Long row = rounded(most);
        const Floats scores(new float[MOST_HEADS * row]);
        const Buffer weights(new bf16[MOST_HEADS * row]);
        const auto [from, until] = share(M * G);
        for (Long i = from; i < until; i++) {
            const Long m = i / G, keys = std::min(positions[m] + 1, b->window);
            const Long at = ((m / T * G + i % G) * length + positions[m] + 1 - keys) * D;
            for (Long head = i * (H / G); head < (i + 1) * (H / G); head += MOST_HEADS) {
                const Long count = std::min(MOST_HEADS, (i + 1) * (H / G) - head);
                bf16* y = &heads[head * D];
                ATTEND[count - 1](y, k + at, v + at, keys, D, row, scores.get(), weights.get(), y);
            }
        }
#pragma omp barrier
        multiply(b->o, heads.get(), rows, [&](Long m, Long n, __m512 sum) {
            narrow(y + m * d + n, _mm512_add_ps(widen(x + m * d + n), sum));
        });
#pragma omp barrier
        norm(y, b->norm2, b->eps2, M, d, normed.get());
#pragma omp barrier
        multiply(b->gate_up, normed.get(), rows, keep(2 * middle));
#pragma omp barrier
        const auto [start, stop] = share(M * middle / 16);
        for (Long i = start; i < stop; i++) {
            const float* gate = &wide[16 * i + 16 * i / middle * middle];
            const __m512 g = _mm512_loadu_ps(gate), up = _mm512_loadu_ps(gate + middle);
            narrow(&inside[16 * i], _mm512_mul_ps(_mm512_mul_ps(g, sigmoid(g)), up));
        }
#pragma omp barrier
        multiply(b->down, inside.get(), rows, [&](Long m, Long n, __m512 sum) {
            narrow(y + m * d + n, _mm512_add_ps(widen(y + m * d + n), sum));
        });
    }
}
