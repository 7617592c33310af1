// Causal attention of the documents of a packed row, forward and backward, with nothing padded and no weights held.
//
// Letters: T tokens of all documents, m of one, H query heads, G key/value heads, D head size. A unit of work is a
// document with one key/value head and the query heads that share it. Its m tokens are rounded up to a multiple of 32.

#include <cmath>
#include <cstring>
#include <memory>

#include "numbers.h"

struct Attention {  // tensors (heads, T, D), whose heads and tokens are so many numbers apart
    const bf16 *q, *k, *v;
    bf16* y;             // (T, H, D)
    float* log_sum;      // (H, T): of the exponentials of the scores
    const bf16* dy;      // (H, T, D); this and the next are for the backward pass, and null forward
    bf16 *dq, *dk, *dv;  // (T, H, D), (T, G, D) twice
    const int32_t* starts;  // (documents + 1,)
    Long q_head, q_token, k_head, k_token, v_head, v_token, dy_head, dy_token;
    Long documents, tokens, heads, shared, size, window;
};

constexpr Long ROWS = 8;  // queries, or keys, that go together

// y (8, 32) = the sum over pairs of inputs of x w. The rows of x are `row` apart, its pairs `pair`; w is two strips of 16
// outputs, `strip` apart, of which each holds pairs: two inputs of output 0, of output 1, ...
static inline void product(const bf16* x, Long row, Long pair, const bf16* w, Long strip, Long pairs, float* y,
                           Long y_row) {
    __m512 sum[ROWS][2] = {};
    for (Long p = 0; p < pairs; p++) {
        const __m512bh w0 = ::pairs(w + 32 * p), w1 = ::pairs(w + strip + 32 * p);
#pragma GCC unroll 8
        for (Long i = 0; i < ROWS; i++) {
            int two;
            std::memcpy(&two, x + i * row + p * pair, sizeof two);
            const __m512bh xs = (__m512bh)_mm512_set1_epi32(two);
            sum[i][0] = _mm512_dpbf16_ps(sum[i][0], w0, xs);
            sum[i][1] = _mm512_dpbf16_ps(sum[i][1], w1, xs);
        }
    }
    for (Long i = 0; i < ROWS; i++)
        for (Long s = 0; s < 2; s++) _mm512_storeu_ps(y + i * y_row + 16 * s, sum[i][s]);
}

static inline Long rounded(Long m) { return (m + 31) / 32 * 32; }

using Buffer = std::unique_ptr<bf16[]>;
using Floats = std::unique_ptr<float[]>;

// strips of 16 tokens, each token an output and D the inputs
static void by_token(const bf16* x, Long token, Long m, Long D, bf16* y) {
    const __m512i lanes = _mm512_mullo_epi32(_mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0),
                                             _mm512_set1_epi32(int(token)));
    for (Long s = 0; s < rounded(m); s += 16) {
        const Long left = std::max<Long>(0, std::min<Long>(16, m - s));
        const __mmask16 there = (1u << left) - 1;
        for (Long i = 0; i < D; i += 2) {
            const bf16* from = x + s * token + i;
            const __m512i two = _mm512_mask_i32gather_epi32(_mm512_setzero_si512(), there, lanes, from, 2);
            _mm512_storeu_si512(y + s * D + 16 * i, two);
        }
    }
}

static const __m512i EACH = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                                             21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);

// strips of 16 of the D numbers, each an output and the tokens the inputs
static void by_number(const bf16* x, Long token, Long m, Long D, bf16* y) {
    const Long M = rounded(m);
    for (Long s = 0; s < M; s += 2)
        for (Long i = 0; i < D; i += 16) {
            __m256i one = _mm256_setzero_si256(), next = one;
            if (s < m) one = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + s * token + i));
            if (s + 1 < m) next = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + (s + 1) * token + i));
            const __m512i both = _mm512_inserti64x4(_mm512_castsi256_si512(one), next, 1);
            _mm512_storeu_si512(y + i * M + 16 * s, _mm512_permutexvar_epi16(EACH, both));
        }
}

// y (8, D) = rows of x, zeros after the last
static void rows(const bf16* x, Long token, Long count, Long D, bf16* y) {
    std::memset(y, 0, ROWS * D * sizeof *y);
    for (Long i = 0; i < std::min(ROWS, count); i++) std::memcpy(y + i * D, x + i * token, D * sizeof *y);
}

// which of 16 keys from `key` on a query sees
static inline __mmask16 seen(Long query, Long key, Long window) {
    const auto up_to = [](Long n) { return n <= 0 ? 0u : n >= 16 ? 0xFFFFu : (1u << n) - 1; };  // the first n
    return up_to(query + 1 - key) & ~up_to(query + 1 - window - key);
}

static void forward(const Attention& a, Long document, Long group) {
    const Long start = a.starts[document], m = a.starts[document + 1] - start, M = rounded(m), D = a.size;
    const Buffer keys(new bf16[M * D]), values(new bf16[M * D]), weights(new bf16[ROWS * M]), q(new bf16[ROWS * D]);
    const Floats scores(new float[ROWS * M]), out(new float[ROWS * D]);
    by_token(a.k + group * a.k_head + start * a.k_token, a.k_token, m, D, keys.get());
    by_number(a.v + group * a.v_head + start * a.v_token, a.v_token, m, D, values.get());
    const __m512 factor = _mm512_set1_ps(1 / std::sqrt(float(D)));
    for (Long head = group * (a.heads / a.shared); head < (group + 1) * (a.heads / a.shared); head++)
        for (Long from = 0; from < m; from += ROWS) {
            const Long end = rounded(std::min(m, from + ROWS)), count = std::min(ROWS, m - from);
            rows(a.q + head * a.q_head + (start + from) * a.q_token, a.q_token, count, D, q.get());
            for (Long s = 0; s < end; s += 32) product(q.get(), D, 2, &keys[s * D], 16 * D, D / 2, &scores[s], M);
            float scale[ROWS];
            for (Long i = 0; i < ROWS; i++) {
                __m512 most = _mm512_set1_ps(-INFINITY), sum = _mm512_setzero_ps();
                for (Long s = 0; s < end; s += 16) {
                    const __m512 score = _mm512_loadu_ps(&scores[i * M + s]);
                    most = _mm512_mask_max_ps(most, seen(from + i, s, a.window), most, score);
                }
                const float top = _mm512_reduce_max_ps(most);
                for (Long s = 0; s < end; s += 16) {
                    const __m512 below = _mm512_sub_ps(_mm512_loadu_ps(&scores[i * M + s]), _mm512_set1_ps(top));
                    const __m512 exponentials = exponential(_mm512_mul_ps(below, factor));
                    const __m512 weight = _mm512_maskz_mov_ps(seen(from + i, s, a.window), exponentials);
                    sum = _mm512_add_ps(sum, weight);
                    narrow(&weights[i * M + s], weight);
                }
                const float total = _mm512_reduce_add_ps(sum), log_sum = top / std::sqrt(float(D)) + std::log(total);
                scale[i] = 1 / total;
                if (i < count) a.log_sum[head * a.tokens + start + from + i] = log_sum;
            }
            for (Long n = 0; n < D; n += 32)
                product(weights.get(), M, 2, &values[n * M], 16 * M, end / 2, &out[n], D);
            for (Long i = 0; i < count; i++)
                for (Long n = 0; n < D; n += 16) {
                    bf16* y = a.y + ((start + from + i) * a.heads + head) * D + n;
                    narrow(y, _mm512_mul_ps(_mm512_loadu_ps(&out[i * D + n]), _mm512_set1_ps(scale[i])));
                }
        }
}

// two rows of 16 numbers as pairs
static inline void in_pairs(bf16* y, const float* one, const float* next) {
    const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(_mm512_loadu_ps(next), _mm512_loadu_ps(one));
    _mm512_storeu_si512(y, _mm512_permutexvar_epi16(EACH, both));
}

static void backward(const Attention& a, Long document, Long group) {
    const Long start = a.starts[document], m = a.starts[document + 1] - start, M = rounded(m), D = a.size;
    const Buffer keys(new bf16[M * D]), values(new bf16[M * D]), keys_by_number(new bf16[M * D]);
    const Buffer q_by_number(new bf16[M * D]), dy_by_number(new bf16[M * D]);
    const Buffer weights(new bf16[M * M]), dscores(new bf16[M * M]);  // pairs of queries: (M / 2, M, 2)
    const Buffer q(new bf16[ROWS * D]), dy(new bf16[ROWS * D]), row(new bf16[ROWS * M]);
    const Floats scores(new float[ROWS * M]), dweights(new float[ROWS * M]), out(new float[ROWS * D]);
    const Floats dk(new float[M * D]()), dv(new float[M * D]());
    const bf16* k = a.k + group * a.k_head + start * a.k_token;
    by_token(k, a.k_token, m, D, keys.get());
    by_number(k, a.k_token, m, D, keys_by_number.get());
    by_token(a.v + group * a.v_head + start * a.v_token, a.v_token, m, D, values.get());
    const __m512 scale = _mm512_set1_ps(1 / std::sqrt(float(D)));
    for (Long head = group * (a.heads / a.shared); head < (group + 1) * (a.heads / a.shared); head++) {
        const bf16* head_q = a.q + head * a.q_head + start * a.q_token;
        const bf16* head_dy = a.dy + head * a.dy_head + start * a.dy_token;
        by_number(head_q, a.q_token, m, D, q_by_number.get());
        by_number(head_dy, a.dy_token, m, D, dy_by_number.get());
        for (Long from = 0; from < m; from += ROWS) {
            const Long end = rounded(std::min(m, from + ROWS)), count = std::min(ROWS, m - from);
            rows(head_q + from * a.q_token, a.q_token, count, D, q.get());
            rows(head_dy + from * a.dy_token, a.dy_token, count, D, dy.get());
            for (Long s = 0; s < end; s += 32) {
                product(q.get(), D, 2, &keys[s * D], 16 * D, D / 2, &scores[s], M);
                product(dy.get(), D, 2, &values[s * D], 16 * D, D / 2, &dweights[s], M);
            }
            for (Long i = 0; i < ROWS; i++) {  // scores become weights, dweights the gradients of the scores
                const Long token = start + std::min(m - 1, from + i);
                const __m512 log_sum = _mm512_set1_ps(a.log_sum[head * a.tokens + token]);
                __m512 along = _mm512_setzero_ps();
                for (Long at = i * M; at < i * M + end; at += 16) {
                    const __mmask16 mask = i < count ? seen(from + i, at - i * M, a.window) : 0;
                    const __m512 score = _mm512_fmsub_ps(_mm512_loadu_ps(&scores[at]), scale, log_sum);
                    const __m512 weight = _mm512_maskz_mov_ps(mask, exponential(score));
                    along = _mm512_fmadd_ps(weight, _mm512_loadu_ps(&dweights[at]), along);
                    _mm512_storeu_ps(&scores[at], weight);
                }
                const __m512 mean = _mm512_set1_ps(_mm512_reduce_add_ps(along));
                for (Long at = i * M; at < i * M + end; at += 16) {
                    const __m512 off = _mm512_mul_ps(_mm512_sub_ps(_mm512_loadu_ps(&dweights[at]), mean), scale);
                    const __m512 dscore = _mm512_mul_ps(_mm512_loadu_ps(&scores[at]), off);
                    _mm512_storeu_ps(&dweights[at], dscore);
                    narrow(&row[at], dscore);
                }
            }
            for (Long i = 0; i < ROWS; i += 2)
                for (Long s = 0; s < end; s += 16) {
                    const Long at = i * M + s, pair = ((from + i) / 2 * M + s) * 2;
                    in_pairs(&weights[pair], &scores[at], &scores[at + M]);
                    in_pairs(&dscores[pair], &dweights[at], &dweights[at + M]);
                }
            for (Long n = 0; n < D; n += 32)
                product(row.get(), M, 2, &keys_by_number[n * M], 16 * M, end / 2, &out[n], D);
            for (Long i = 0; i < count; i++)
                for (Long n = 0; n < D; n += 16)
                    narrow(a.dq + ((start + from + i) * a.heads + head) * D + n, _mm512_loadu_ps(&out[i * D + n]));
        }
        const Long pairs = (m + ROWS - 1) / ROWS * ROWS / 2;
        for (Long s = 0; s < m; s += ROWS)  // the queries that see these keys are those from s on
            for (Long n = 0; n < D; n += 32) {
                const Long first = s / 2, from = (first * M + s) * 2, at = n * M + 32 * first;
                const auto add = [&](const Buffer& x, const Buffer& w, float* sum) {
                    product(&x[from], 2, 2 * M, &w[at], 16 * M, pairs - first, out.get(), 32);
                    for (Long i = 0; i < ROWS; i++)
                        for (Long part = 0; part < 32; part += 16) {
                            float* to = sum + (s + i) * D + n + part;
                            const __m512 more = _mm512_loadu_ps(&out[32 * i + part]);
                            _mm512_storeu_ps(to, _mm512_add_ps(_mm512_loadu_ps(to), more));
                        }
                };
                add(weights, dy_by_number, dv.get());
                add(dscores, q_by_number, dk.get());
            }
    }
    for (Long s = 0; s < m; s++)
        for (Long n = 0; n < D; n += 16) {
            const Long to = ((start + s) * a.shared + group) * D + n;
            narrow(a.dk + to, _mm512_loadu_ps(&dk[s * D + n]));
            narrow(a.dv + to, _mm512_loadu_ps(&dv[s * D + n]));
        }
}

extern "C" void attention(const Attention* a, Long threads) {
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (Long unit = 0; unit < a->documents * a->shared; unit++)
        if (a->dy == nullptr)
            forward(*a, unit / a->shared, unit % a->shared);
        else
            backward(*a, unit / a->shared, unit % a->shared);
}
