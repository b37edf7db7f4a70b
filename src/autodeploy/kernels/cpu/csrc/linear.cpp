// Products of rows with a weight. For a few, each weight row is read from memory once and multiplied with all of them;
// more go by blocks.

#include "gemm.h"

namespace autodeploy {
namespace {

constexpr int64_t BLOCK = 8;  // weight rows that stay in cache while rows of x go by, a few at a time

// A block of outputs for rows `row` and later of x, M at a time; the last rows in ever smaller steps.
template <class T, int M, class X>
void block_of(const X* x, const T* weight, const T* bias, T* out, int64_t count, int64_t row, int64_t num_rows,
              int64_t num_inputs, int64_t num_outputs) {
    for (; row + M <= num_rows; row += M) {
        const X* rows[M];
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
void few_rows(const T* x, const T* weight, const T* bias, T* out, int64_t num_rows, int64_t num_inputs,
              int64_t num_outputs) {
    using X = typename Product<T>::Operand;
    const X* rows;
    if constexpr (std::is_same_v<X, T>) {
        rows = x;
    } else {
        // Every thread for itself: waiting for each other takes longer.
        X* own = own_memory<X>(num_rows * num_inputs);
        to_operands(x, num_rows * num_inputs, own);
        rows = own;
    }
#pragma omp for schedule(static)
    for (int64_t first = 0; first < num_outputs; first += BLOCK) {
        const int64_t count = num_outputs - first < BLOCK ? num_outputs - first : BLOCK;
        block_of<T, 4>(rows, weight + first * num_inputs, bias == nullptr ? nullptr : bias + first, out + first, count, 0,
                       num_rows, num_inputs, num_outputs);
    }
}

// `elements`: room for x as it is multiplied, where that is another type.
template <class T>
void many_rows(const T* x, const T* weight, const T* bias, T* out, int64_t num_rows, int64_t num_inputs,
               int64_t num_outputs, float* elements) {
    using E = typename Lane<T>::Element;
    if constexpr (std::is_same_v<E, T>) {
        multiply(Gemm<T>{x, weight, bias, out, num_rows, num_inputs, num_outputs});
    } else {
#pragma omp for schedule(static)
        for (int64_t row = 0; row < num_rows; ++row)
            to_operands(x + row * num_inputs, num_inputs, elements + row * num_inputs);
        multiply(Gemm<T>{elements, weight, bias, out, num_rows, num_inputs, num_outputs});
    }
}

}  // namespace
}  // namespace autodeploy

// x: `[num_rows, num_inputs]`, weight: `[num_outputs, num_inputs]`, bias: `[num_outputs]` or null, all contiguous.
// out: `[num_rows, num_outputs]`. elements: `[num_rows, num_inputs]` of scratch to go by blocks, null to go row by row;
// blocks of bfloat16 need an even number of inputs.
#define DEFINE_LINEAR(NAME, T)                                                                                       \
    extern "C" void NAME(const T* x, const T* weight, const T* bias, T* out, int64_t num_rows, int64_t num_inputs,   \
                         int64_t num_outputs, float* elements, int threads) {                                        \
        autodeploy::with_team(threads, [&] {                                                                         \
            if (elements == nullptr)                                                                                 \
                autodeploy::few_rows<T>(x, weight, bias, out, num_rows, num_inputs, num_outputs);                    \
            else                                                                                                     \
                autodeploy::many_rows<T>(x, weight, bias, out, num_rows, num_inputs, num_outputs, elements);         \
        });                                                                                                          \
    }                                                                                                                \
    RECORDABLE(NAME)

DEFINE_LINEAR(linear_float32, float)
DEFINE_LINEAR(linear_bfloat16, autodeploy::bf16)
