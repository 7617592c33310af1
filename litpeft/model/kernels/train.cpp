// Memory-bound operations of training, each in one pass over memory: SwiGLU, norms, rotation, loss.

#include <algorithm>
#include <cmath>

#include "numbers.h"

// y = silu(gate) * up, n numbers, a multiple of 16
extern "C" void swiglu(const bf16* gate, const bf16* up, bf16* y, Long n, Long threads) {
#pragma omp parallel for num_threads(threads)
    for (Long i = 0; i < n; i += 16) {
        const __m512 g = widen(gate + i);
        narrow(y + i, _mm512_mul_ps(_mm512_mul_ps(g, sigmoid(g)), widen(up + i)));
    }
}

// the gradients of both: dup = dy silu(gate), dgate = dy up s (1 + gate (1 - s)) with s = sigmoid(gate)
extern "C" void swiglu_backward(const bf16* dy, const bf16* gate, const bf16* up, bf16* dgate, bf16* dup, Long n,
                                Long threads) {
#pragma omp parallel for num_threads(threads)
    for (Long i = 0; i < n; i += 16) {
        const __m512 g = widen(gate + i), d = widen(dy + i), u = widen(up + i), s = sigmoid(g);
        const __m512 silu = _mm512_mul_ps(g, s);
        narrow(dup + i, _mm512_mul_ps(d, silu));
        const __m512 slope = _mm512_fmadd_ps(_mm512_sub_ps(_mm512_set1_ps(1), s), silu, s);
        narrow(dgate + i, _mm512_mul_ps(_mm512_mul_ps(d, u), slope));
    }
}

// y = x / rms(x) * weight for M rows of d numbers, and scale (M,) = 1 / rms(x)
extern "C" void norm(const bf16* x, const float* weight, double eps, bf16* y, float* scale, Long M, Long d,
                     Long threads) {
#pragma omp parallel for num_threads(threads)
    for (Long m = 0; m < M; m++) scale[m] = norm_row(x + m * d, weight, eps, d, y + m * d);
}

// dx = scale (dunit - unit mean(dunit unit)), with unit = x scale and dunit = dy weight; and, unless dweight is null,
// adds to dweight (threads, d) each thread's part of the weight's gradient, the sum of dy unit
extern "C" void norm_backward(const bf16* dy, const bf16* x, const float* weight, const float* scale, bf16* dx,
                              float* dweight, Long M, Long d, Long threads) {
#pragma omp parallel for num_threads(threads)
    for (Long m = 0; m < M; m++) {
        const bf16 *dys = dy + m * d, *xs = x + m * d;
        float* sum = dweight ? dweight + omp_get_thread_num() * d : nullptr;
        const __m512 factor = _mm512_set1_ps(scale[m]);
        __m512 along = _mm512_setzero_ps();
        for (Long i = 0; i < d; i += 16) {
            const __m512 dunit = _mm512_mul_ps(widen(dys + i), _mm512_loadu_ps(weight + i));
            along = _mm512_fmadd_ps(dunit, widen(xs + i), along);
        }
        const __m512 mean = _mm512_set1_ps(_mm512_reduce_add_ps(along) * scale[m] / d);
        for (Long i = 0; i < d; i += 16) {
            const __m512 dunit = _mm512_mul_ps(widen(dys + i), _mm512_loadu_ps(weight + i));
            const __m512 unit = _mm512_mul_ps(widen(xs + i), factor);
            narrow(dx + m * d + i, _mm512_mul_ps(_mm512_fnmadd_ps(unit, mean, dunit), factor));
            if (sum) _mm512_storeu_ps(sum + i, _mm512_fmadd_ps(widen(dys + i), unit, _mm512_loadu_ps(sum + i)));
        }
    }
}

// y (T, H, D) = x (H, T, D), of strides `head` and `token`, with the first R numbers of each head in pairs (i, i + R/2)
// rotated forwards (1) or back (-1); cos and sin are (T, R), sin negated in its first half
extern "C" void rotate(const bf16* x, Long head, Long token, const bf16* cos, const bf16* sin, bf16* y, Long H, Long T,
                       Long D, Long R, Long direction, Long threads) {
    const __m512 sign = _mm512_set1_ps(direction);
#pragma omp parallel for num_threads(threads)
    for (Long t = 0; t < T; t++)
        for (Long h = 0; h < H; h++) {
            const bf16* from = x + h * head + t * token;
            bf16* to = y + (t * H + h) * D;
            for (Long i = 0, j = R / 2; i < R / 2; i += 16, j += 16) {
                const __m512 x0 = widen(from + i), x1 = widen(from + j);
                const __m512 sin0 = _mm512_mul_ps(widen(sin + t * R + i), sign);
                const __m512 sin1 = _mm512_mul_ps(widen(sin + t * R + j), sign);
                narrow(to + i, _mm512_fmadd_ps(x0, widen(cos + t * R + i), _mm512_mul_ps(x1, sin0)));
                narrow(to + j, _mm512_fmadd_ps(x1, widen(cos + t * R + j), _mm512_mul_ps(x0, sin1)));
            }
            std::copy(from + R, from + D, to + R);
        }
}

// losses (N,) = -log softmax(logits (N, V))[target]; overwrites the logits with their gradient: the probabilities, less
// 1 at the target
extern "C" void cross_entropy(bf16* logits, const Long* targets, float* losses, Long N, Long V, Long threads) {
#pragma omp parallel for num_threads(threads)
    for (Long n = 0; n < N; n++) {
        bf16* row = logits + n * V;
        const float target = number(row[targets[n]]);
        __m512 most = _mm512_set1_ps(-INFINITY), sum = _mm512_setzero_ps();
        for (Long i = 0; i < V; i += 16) most = _mm512_max_ps(most, widen(row + i));
        const float top = _mm512_reduce_max_ps(most);
        for (Long i = 0; i < V; i += 16)
            sum = _mm512_add_ps(sum, exponential(_mm512_sub_ps(widen(row + i), _mm512_set1_ps(top))));
        const float log_sum = top + std::log(_mm512_reduce_add_ps(sum));
        losses[n] = log_sum - target;
        for (Long i = 0; i < V; i += 16)
            narrow(row + i, exponential(_mm512_sub_ps(widen(row + i), _mm512_set1_ps(log_sum))));
        const __m512 wrong = _mm512_set1_ps(std::expm1(target - log_sum));  // p - 1, without cancellation
        alignas(32) bf16 rounded[16];
        narrow(rounded, wrong);
        row[targets[n]] = rounded[0];
    }
}
