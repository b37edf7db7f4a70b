// Products of a few rows with a weight: each weight row is read from memory once, for all rows of x.

#include "simd.h"
#include "team.h"

namespace autodeploy {
namespace {

constexpr int64_t BLOCK = 8;  // weight rows that stay in cache while rows of x go by, a few at a time

// A block of outputs for rows `row` and later of x, M at a time; the last rows in ever smaller steps.
template <class T, int M>
void block_of(const T* x, const T* weight, const T* bias, T* out, int64_t count, int64_t row, int64_t num_rows,
              int64_t num_inputs, int64_t num_outputs) {
    for (; row + M <= num_rows; row += M) {
        const T* rows[M];
        for (int m = 0; m < M; ++m) rows[m] = x + (row + m) * num_inputs;
        for (int64_t o = 0; o < count; ++o) {
            float products[M];
            dot_products<T, M>(weight + o * num_inputs, rows, num_inputs, products);
            const float shift = bias == nullptr ? 0.0f : to_float(bias[o]);
            for (int m = 0; m < M; ++m) assign(out[(row + m) * num_outputs + o], products[m] + shift);
        }
    }
    if constexpr (M > 1) {
        if (row < num_rows)
            block_of<T, M / 2>(x, weight, bias, out, count, row, num_rows, num_inputs, num_outputs);
    }
}

template <class T>
void linear(const T* x, const T* weight, const T* bias, T* out, int64_t num_rows, int64_t num_inputs,
            int64_t num_outputs) {
#pragma omp for schedule(static)
    for (int64_t first = 0; first < num_outputs; first += BLOCK) {
        const int64_t count = num_outputs - first < BLOCK ? num_outputs - first : BLOCK;
        block_of<T, 4>(x, weight + first * num_inputs, bias == nullptr ? nullptr : bias + first, out + first, count, 0,
                       num_rows, num_inputs, num_outputs);
    }
}

}  // namespace
}  // namespace autodeploy

// x: `[num_rows, num_inputs]`, weight: `[num_outputs, num_inputs]`, bias: `[num_outputs]` or null, all contiguous.
// out: `[num_rows, num_outputs]`.
#define DEFINE_LINEAR(NAME, T)                                                                                       \
    extern "C" void NAME(const T* x, const T* weight, const T* bias, T* out, int64_t num_rows, int64_t num_inputs,   \
                         int64_t num_outputs, int threads) {                                                         \
        autodeploy::with_team(threads, [&] {                                                                         \
            autodeploy::linear<T>(x, weight, bias, out, num_rows, num_inputs, num_outputs);                          \
        });                                                                                                          \
    }                                                                                                                \
    RECORDABLE(NAME)

DEFINE_LINEAR(linear_float32, float)
DEFINE_LINEAR(linear_bfloat16, autodeploy::bf16)
