// Products of rows with a weight. For a few, each weight row is read from memory once and multiplied with all of them;
// more go by blocks.

#include "gemm.h"
#include "team.h"

namespace autodeploy {
namespace {

constexpr int64_t BLOCK = 8;             // weight rows that stay in cache while rows of x go by, a few at a time
constexpr int64_t ITEMS_PER_THREAD = 4;  // so that threads end together

template <class T>
struct Outputs {
    const T *weight, *bias;
    T* out;
    int64_t num_inputs, num_outputs;
};

// Outputs [o, end) for the only row of x, in one unbroken stream. Sums are in another order than with more rows.
template <class T, class X>
void one_row(const Outputs<T>& p, const X* x, int64_t o, int64_t end) {
    for (; o < end; ++o) {
        float product[1];
        dot_products<T, 1>(p.weight + o * p.num_inputs, &x, p.num_inputs, product);
        assign(p.out[o], product[0] + (p.bias == nullptr ? 0.0f : to_float(p.bias[o])));
    }
}

// Outputs [o, end), W at a time and the last by themselves, for M rows of x; `ahead`: a block further on is fetched,
// as the hardware does not see that rows are read side by side.
template <class T, int W, int M, class X>
void some_outputs(const Outputs<T>& p, const X* x, int64_t row, int64_t o, int64_t end, bool ahead) {
    float products[W][M];
    for (; o + W <= end; o += W) {
        if (ahead) prefetch<2>(p.weight + (o + BLOCK) * p.num_inputs, W * p.num_inputs);
        multiply_rows_of<T, W, M>(p.weight + o * p.num_inputs, x + row * p.num_inputs, p.num_inputs, products);
        for (int w = 0; w < W; ++w) {
            const float shift = p.bias == nullptr ? 0.0f : to_float(p.bias[o + w]);
            for (int m = 0; m < M; ++m) assign(p.out[(row + m) * p.num_outputs + o + w], products[w][m] + shift);
        }
    }
    if constexpr (W > 1) {
        if (o < end) some_outputs<T, 1, M>(p, x, row, o, end, false);
    }
}

// The same for `count` rows, 1 to M.
template <class T, int M, class X>
void some_rows(const Outputs<T>& p, const X* x, int64_t row, int64_t count, int64_t o, int64_t end, bool ahead) {
    if (count == M)
        some_outputs<T, 2, M>(p, x, row, o, end, ahead);
    else if constexpr (M > 1)
        some_rows<T, M - 1>(p, x, row, count, o, end, ahead);
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
    const Outputs<T> outputs{weight, bias, out, num_inputs, num_outputs};
    const int64_t tiles = (num_rows + TILE_ROWS - 1) / TILE_ROWS;
#pragma omp for schedule(static)
    for (int64_t o = 0; o < num_outputs; o += BLOCK) {
        const int64_t end = o + BLOCK < num_outputs ? o + BLOCK : num_outputs;
        if (num_rows == 1) one_row(outputs, rows, o, end);
        for (int64_t t = 0; t < tiles && num_rows > 1; ++t) {
            const int64_t row = t * num_rows / tiles;
            some_rows<T, TILE_ROWS>(outputs, rows, row, (t + 1) * num_rows / tiles - row, o, end, t == 0);
        }
    }
}

// `elements`: room for x as it is multiplied, where that is another type.
template <class T>
void many_rows(const T* x, const T* weight, const T* bias, T* out, int64_t num_rows, int64_t num_inputs,
               int64_t num_outputs, float* elements) {
    Consecutive<T> rows;
    if constexpr (std::is_same_v<typename Lane<T>::Element, T>) {
        rows = {x, num_inputs};
    } else {
#pragma omp for schedule(static)
        for (int64_t row = 0; row < num_rows; ++row)
            to_operands(x + row * num_inputs, num_inputs, elements + row * num_inputs);
        rows = {elements, num_inputs};
    }
    const int64_t blocks = (num_outputs + OUTPUTS - 1) / OUTPUTS, wanted = ITEMS_PER_THREAD * team_size();
    const int64_t least = (wanted + blocks - 1) / blocks;  // slabs of rows
    const int64_t tiles = (num_rows + least * TILE_ROWS - 1) / (least * TILE_ROWS);
    const int64_t slab = tiles * TILE_ROWS < SLAB ? tiles * TILE_ROWS : SLAB;
    const int64_t slabs = (num_rows + slab - 1) / slab;
#pragma omp for schedule(dynamic)
    for (int64_t item = 0; item < blocks * slabs; ++item) {
        const int64_t begin = item % slabs * slab, end = begin + slab < num_rows ? begin + slab : num_rows;
        const int64_t first = item / slabs * OUTPUTS;
        multiply_block<T>(rows, begin, end, weight + first * num_inputs, num_outputs - first, num_inputs,
                          [&](int64_t row, int64_t o, Floats sums, int64_t count) {
                              const Floats shift = bias == nullptr ? Floats{} : load(bias + first + o, count);
                              store(out + row * num_outputs + first + o, sums + shift, count);
                          });
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
