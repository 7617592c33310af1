// Causal attention of the documents of a packed row, forward and backward, without padding or keeping the weights.
//
// Letters: T tokens of all documents, m of one, H query heads, G key/value heads, D head size. A unit of work is a
// document with one key/value head and the query heads that share it. Its m tokens are rounded up to a multiple of 32.

#include <cmath>
#include <memory>

#include "tiles.h"

struct Attention {  // tensors (heads, T, D), with strides of heads and tokens
    const bf16 *q, *k, *v;
    bf16* y;             // (T, H, D)
    float* log_sum;      // (H, T): log-sum-exp of the scores
    const bf16* dy;      // (H, T, D); dy, dq, dk and dv are null in the forward pass
    bf16 *dq, *dk, *dv;  // (T, H, D), (T, G, D) twice
    const int32_t* starts;  // (documents + 1,)
    Long q_head, q_token, k_head, k_token, v_head, v_token, dy_head, dy_token;
    Long documents, tokens, heads, kv_heads, size, window;
};

// which of the 16 keys from `key` on a query sees
static inline __mmask16 seen(Long query, Long key, Long window) {
    const auto up_to = [](Long n) { return n <= 0 ? 0u : n >= 16 ? 0xFFFFu : (1u << n) - 1; };  // the first n
    return up_to(query + 1 - key) & ~up_to(query + 1 - window - key);
}

static void forward(const Attention& a, Long document, Long group) {
    const Long start = a.starts[document], m = a.starts[document + 1] - start, M = rounded(m), D = a.size;
    const Buffer keys(new bf16[M * D]), values(new bf16[M * D]), weights(new bf16[ROWS * M]), q(new bf16[ROWS * D]);
    const Floats scores(new float[ROWS * M]), out(new float[ROWS * D]);
    by_row(a.k + group * a.k_head + start * a.k_token, a.k_token, m, D, keys.get());
    by_column(a.v + group * a.v_head + start * a.v_token, a.v_token, m, D, values.get());
    const __m512 factor = _mm512_set1_ps(1 / std::sqrt(float(D)));
    for (Long head = group * (a.heads / a.kv_heads); head < (group + 1) * (a.heads / a.kv_heads); head++)
        for (Long from = 0; from < m; from += ROWS) {
            const Long end = rounded(std::min(m, from + ROWS)), count = std::min(ROWS, m - from);
            some_rows(a.q + head * a.q_head + (start + from) * a.q_token, a.q_token, count, D, q.get());
            for (Long s = 0; s < end; s += 32) product<2>(q.get(), D, 2, &keys[s * D], 16 * D, D / 2, &scores[s], M);
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
                product<2>(weights.get(), M, 2, &values[n * M], 16 * M, end / 2, &out[n], D);
            for (Long i = 0; i < count; i++)
                for (Long n = 0; n < D; n += 16) {
                    bf16* y = a.y + ((start + from + i) * a.heads + head) * D + n;
                    narrow(y, _mm512_mul_ps(_mm512_loadu_ps(&out[i * D + n]), _mm512_set1_ps(scale[i])));
                }
        }
}

static void backward(const Attention& a, Long document, Long group) {
    const Long start = a.starts[document], m = a.starts[document + 1] - start, M = rounded(m), D = a.size;
    const Buffer keys(new bf16[M * D]), values(new bf16[M * D]), keys_by_column(new bf16[M * D]);
    const Buffer q_by_column(new bf16[M * D]), dy_by_column(new bf16[M * D]);
    const Buffer weights(new bf16[M * M]), dscores(new bf16[M * M]);  // pairs of queries: (M / 2, M, 2)
    const Buffer q(new bf16[ROWS * D]), dy(new bf16[ROWS * D]), row(new bf16[ROWS * M]);
    const Floats scores(new float[ROWS * M]), dweights(new float[ROWS * M]), out(new float[ROWS * D]);
    const Floats dk(new float[M * D]()), dv(new float[M * D]());
    const bf16* k = a.k + group * a.k_head + start * a.k_token;
    by_row(k, a.k_token, m, D, keys.get());
    by_column(k, a.k_token, m, D, keys_by_column.get());
    by_row(a.v + group * a.v_head + start * a.v_token, a.v_token, m, D, values.get());
    const __m512 scale = _mm512_set1_ps(1 / std::sqrt(float(D)));
    for (Long head = group * (a.heads / a.kv_heads); head < (group + 1) * (a.heads / a.kv_heads); head++) {
        const bf16* head_q = a.q + head * a.q_head + start * a.q_token;
        const bf16* head_dy = a.dy + head * a.dy_head + start * a.dy_token;
        by_column(head_q, a.q_token, m, D, q_by_column.get());
        by_column(head_dy, a.dy_token, m, D, dy_by_column.get());
        for (Long from = 0; from < m; from += ROWS) {
            const Long end = rounded(std::min(m, from + ROWS)), count = std::min(ROWS, m - from);
            some_rows(head_q + from * a.q_token, a.q_token, count, D, q.get());
            some_rows(head_dy + from * a.dy_token, a.dy_token, count, D, dy.get());
            for (Long s = 0; s < end; s += 32) {
                product<2>(q.get(), D, 2, &keys[s * D], 16 * D, D / 2, &scores[s], M);
                product<2>(dy.get(), D, 2, &values[s * D], 16 * D, D / 2, &dweights[s], M);
            }
            for (Long i = 0; i < ROWS; i++) {  // overwrite scores with weights, dweights with the scores' gradients
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
                    _mm512_storeu_si512(&weights[pair], zip(&scores[at], &scores[at + M]));
                    _mm512_storeu_si512(&dscores[pair], zip(&dweights[at], &dweights[at + M]));
                }
            for (Long n = 0; n < D; n += 32)
                product<2>(row.get(), M, 2, &keys_by_column[n * M], 16 * M, end / 2, &out[n], D);
            for (Long i = 0; i < count; i++)
                for (Long n = 0; n < D; n += 16)
                    narrow(a.dq + ((start + from + i) * a.heads + head) * D + n, _mm512_loadu_ps(&out[i * D + n]));
        }
        const Long pairs = (m + ROWS - 1) / ROWS * ROWS / 2;
        for (Long s = 0; s < m; s += ROWS)  // only queries from s on see these keys
            for (Long n = 0; n < D; n += 32) {
                const Long first = s / 2, from = (first * M + s) * 2, at = n * M + 32 * first;
                const auto add = [&](const Buffer& x, const Buffer& w, float* sum) {
                    product<2>(&x[from], 2, 2 * M, &w[at], 16 * M, pairs - first, out.get(), 32);
                    for (Long i = 0; i < ROWS; i++)
                        for (Long part = 0; part < 32; part += 16) {
                            float* to = sum + (s + i) * D + n + part;
                            const __m512 more = _mm512_loadu_ps(&out[32 * i + part]);
                            _mm512_storeu_ps(to, _mm512_add_ps(_mm512_loadu_ps(to), more));
                        }
                };
                add(weights, dy_by_column, dv.get());
                add(dscores, q_by_column, dk.get());
            }
    }
    for (Long s = 0; s < m; s++)
        for (Long n = 0; n < D; n += 16) {
            const Long to = ((start + s) * a.kv_heads + group) * D + n;
            narrow(a.dk + to, _mm512_loadu_ps(&dk[s * D + n]));
            narrow(a.dv + to, _mm512_loadu_ps(&dv[s * D + n]));
        }
}

extern "C" void attention(const Attention* a, Long threads) {
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (Long unit = 0; unit < a->documents * a->kv_heads; unit++)
        if (a->dy == nullptr)
            forward(*a, unit / a->kv_heads, unit % a->kv_heads);
        else
            backward(*a, unit / a->kv_heads, unit % a->kv_heads);
}
