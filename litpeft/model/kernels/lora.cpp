// Low-rank updates of layers that read the same x, y_i += B_i A_i x, forward and backward, in one pass over each y_i.
//
// Letters: N rows, K inputs, O outputs of a layer, r its rank, R the sum of ranks.

#include "tiles.h"

constexpr Long LAYERS = 3, BLOCK = 64;  // layers at most; rows that go through all steps while they are in the cache

struct LowRank {
    const bf16 *x, *a;        // (N, K), (R, K)
    bf16* h;                  // (N, R) = A x: forward written, backward read
    const bf16* b[LAYERS];    // forward (O, r), backward (r, O): with the scale of the update
    bf16* y[LAYERS];          // forward (N, O)
    const bf16* dy[LAYERS];   // backward (N, O)
    bf16* dx;                 // (N, K), or null
    float *da, *db[LAYERS];   // (threads, R, K), (threads, r, O): zeros to which gradients are added; or null
    Long outputs[LAYERS], ranks[LAYERS];
    Long layers, rows, inputs, rank;
};

// this thread's part of the rows, in multiples of BLOCK
static std::pair<Long, Long> blocks(Long rows) {
    const auto [from, to] = share((rows + BLOCK - 1) / BLOCK);
    return {from * BLOCK, std::min(rows, to * BLOCK)};
}

static void forward(const LowRank& u, const bf16* a, const Buffer* b) {
    const Long K = u.inputs, R = rounded(u.rank);
    const Buffer x(new bf16[ROWS * K]), h(new bf16[ROWS * R]());
    const Floats inner(new float[ROWS * R]);
    const auto [from, to] = blocks(u.rows);
    for (Long row = from; row < to; row += ROWS) {
        const Long count = std::min(ROWS, to - row);
        const bf16* xs = u.x + row * K;
        if (count < ROWS) some_rows(xs, K, count, K, x.get()), xs = x.get();
        for (Long s = 0; s < R; s += 32) product<2>(xs, K, 2, a + s * K, 16 * K, K / 2, &inner[s], R);
        for (Long i = 0; i < ROWS * R; i += 16) narrow(&h[i], _mm512_loadu_ps(&inner[i]));
        for (Long i = 0; i < count; i++) std::copy_n(&h[i * R], u.rank, u.h + (row + i) * u.rank);
        const bf16* part = h.get();
        for (Long layer = 0; layer < u.layers; part += u.ranks[layer++]) {
            const Long O = u.outputs[layer], r = u.ranks[layer];
            float update[ROWS * 32];
            for (Long n = 0; n < O; n += 32) {
                product<2>(part, R, 2, &b[layer][n * r], 16 * r, r / 2, update, 32);
                for (Long i = 0; i < count; i++)
                    for (Long s = 0; s < 32; s += 16) {
                        bf16* y = u.y[layer] + (row + i) * O + n + s;
                        narrow(y, _mm512_add_ps(widen(y), _mm512_loadu_ps(update + 32 * i + s)));
                    }
            }
        }
    }
}

// sum (ranks, K) += w^T x over rows of x (count, K); w is (count / 2, R, 2), two rows in pairs
static void outer(const bf16* w, Long R, Long ranks, const bf16* x, Long K, Long count, float* sum) {
    for (Long k = 0; k < K; k += 32)
        for (Long j = 0; j < ranks; j += ROWS) {
            __m512 part[ROWS][2] = {};
            for (Long i = 0; i < count; i += 2) {
                const bf16* row = x + i * K + k;
                const bool last = i + 1 == count;
                const __m512bh x0 = (__m512bh)zip(row, last ? nullptr : row + K);
                const __m512bh x1 = (__m512bh)zip(row + 16, last ? nullptr : row + 16 + K);
#pragma GCC unroll 8
                for (Long n = 0; n < ROWS; n++) {
                    const __m512bh ws = broadcast(w + i * R + 2 * (j + n));
                    part[n][0] = _mm512_dpbf16_ps(part[n][0], x0, ws);
                    part[n][1] = _mm512_dpbf16_ps(part[n][1], x1, ws);
                }
            }
            for (Long n = 0; n < std::min(ROWS, ranks - j); n++)
                for (Long s = 0; s < 2; s++) {
                    float* to = sum + (j + n) * K + k + 16 * s;
                    _mm512_storeu_ps(to, _mm512_add_ps(_mm512_loadu_ps(to), part[n][s]));
                }
        }
}

// y (BLOCK / 2, R, 2): pairs of the rows of x (BLOCK, R)
static void in_pairs(const bf16* x, Long R, bf16* y) {
    for (Long i = 0; i < BLOCK; i += 2)
        for (Long j = 0; j < R; j += 16) {
            const bf16* row = x + i * R + j;
            _mm512_storeu_si512(y + i * R + 2 * j, zip(row, row + R));
        }
}

static void backward(const LowRank& u, const bf16* a, const Buffer* b) {
    const Long K = u.inputs, R = rounded(u.rank), thread = omp_get_thread_num();
    const Long widest = *std::max_element(u.outputs, u.outputs + u.layers);
    const Buffer h(new bf16[BLOCK * R]), dh(new bf16[BLOCK * R]), rows(new bf16[ROWS * widest]);
    const Buffer pairs(new bf16[BLOCK * R + 2 * ROWS]());  // the last products read beyond the rows
    const Floats inner(new float[ROWS * R]);
    const auto [from, to] = blocks(u.rows);
    for (Long start = from; start < to; start += BLOCK) {
        const Long count = std::min(BLOCK, to - start);
        std::fill_n(dh.get(), BLOCK * R, 0);
        Long at = 0;
        for (Long layer = 0; layer < u.layers; at += u.ranks[layer++]) {
            const Long O = u.outputs[layer], r = u.ranks[layer];
            for (Long row = 0; row < count; row += ROWS) {
                const bf16* dy = u.dy[layer] + (start + row) * O;
                if (count - row < ROWS) some_rows(dy, O, count - row, O, rows.get()), dy = rows.get();
                for (Long s = 0; s < r; s += 16) product<1>(dy, O, 2, &b[layer][s * O], 0, O / 2, &inner[s], R);
                for (Long i = 0; i < ROWS; i++)
                    for (Long j = 0; j < r; j += 16) {
                        alignas(32) bf16 some[16];
                        narrow(some, _mm512_loadu_ps(&inner[i * R + j]));
                        std::copy_n(some, std::min<Long>(16, r - j), &dh[(row + i) * R + at + j]);
                    }
            }
        }
        if (u.db[0]) {
            std::fill_n(h.get(), BLOCK * R, 0);
            for (Long i = 0; i < count; i++) std::copy_n(u.h + (start + i) * u.rank, u.rank, &h[i * R]);
            in_pairs(h.get(), R, pairs.get());
            at = 0;
            for (Long layer = 0; layer < u.layers; at += u.ranks[layer++]) {
                const Long O = u.outputs[layer], r = u.ranks[layer];
                outer(&pairs[2 * at], R, r, u.dy[layer] + start * O, O, count, u.db[layer] + thread * r * O);
            }
        }
        if (u.dx)
            for (Long row = 0; row < count; row += ROWS)
                for (Long k = 0; k < K; k += 32) {
                    float dx[ROWS * 32];
                    product<2>(&dh[row * R], R, 2, a + k * R, 16 * R, R / 2, dx, 32);
                    for (Long i = 0; i < std::min(ROWS, count - row); i++)
                        for (Long s = 0; s < 32; s += 16)
                            narrow(u.dx + (start + row + i) * K + k + s, _mm512_loadu_ps(dx + 32 * i + s));
                }
        if (u.da) {
            in_pairs(dh.get(), R, pairs.get());
            outer(pairs.get(), R, u.rank, u.x + start * K, K, count, u.da + thread * u.rank * K);
        }
    }
}

extern "C" void low_rank(const LowRank* u, Long backwards, Long threads) {
    const Long K = u->inputs, R = rounded(u->rank);
    const Buffer a(new bf16[R * K]);
    Buffer b[LAYERS];
    (backwards ? by_column : by_row)(u->a, K, u->rank, K, a.get());
    for (Long layer = 0; layer < u->layers; layer++) {
        const Long O = u->outputs[layer], r = u->ranks[layer];
        b[layer].reset(new bf16[backwards ? rounded(r) * O : O * r]);
        if (backwards)
            by_row(u->b[layer], O, r, O, b[layer].get());
        else
            by_row(u->b[layer], r, O, r, b[layer].get());
    }
#pragma omp parallel num_threads(threads)
    if (backwards)
        backward(*u, a.get(), b);
    else
        forward(*u, a.get(), b);
}
