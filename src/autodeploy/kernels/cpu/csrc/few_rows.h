// Products of a few rows with a weight: each weight row is read from memory once and multiplied with all of them.

#pragma once

#include "tiles.h"

namespace autodeploy {
namespace {

constexpr int64_t BLOCK = 8;  // weight rows that stay in cache while rows of x go by, a few at a time

// For M rows: emit(row, o, product) for weight rows `[0, count)`, W at a time and the last by themselves; `ahead`: a block
// further on is fetched, as the hardware does not see that rows are read side by side.
template <class T, int W, int M, class X, class Emit>
void multiply_together(const T* weight, int64_t count, int64_t length, const X* x, int64_t o, bool ahead, Emit emit) {
    float products[W][M];
    for (; o + W <= count; o += W) {
        if (ahead) prefetch<2>(weight + (o + BLOCK) * length, W * length);
        multiply_rows_of<T, W, M>(weight + o * length, x, length, products);
        for (int w = 0; w < W; ++w)
            for (int m = 0; m < M; ++m) emit(m, o + w, products[w][m]);
    }
    if constexpr (W > 1) {
        if (o < count) multiply_together<T, 1, M>(weight, count, length, x, o, false, emit);
    }
}

// The same for `num_rows` rows, 1 to M.
template <class T, int M, class X, class Emit>
void multiply_tile_of_rows(const T* weight, int64_t count, int64_t length, const X* x, int64_t num_rows, bool ahead,
                           Emit emit) {
    if (num_rows == M)
        multiply_together<T, 2, M>(weight, count, length, x, 0, ahead, emit);
    else if constexpr (M > 1)
        multiply_tile_of_rows<T, M - 1>(weight, count, length, x, num_rows, ahead, emit);
}

// emit(row, o, product) for the products of rows of x, `length` apart, with up to BLOCK weight rows. One row alone goes in
// one unbroken stream, and its sums are in another order than with more rows.
template <class T, class X, class Emit>
void multiply_few_rows(const T* weight, int64_t count, int64_t length, const X* x, int64_t num_rows, Emit emit) {
    if (num_rows == 1) {
        for (int64_t o = 0; o < count; ++o) {
            float product[1];
            dot_products<T, 1>(weight + o * length, &x, length, product);
            emit(0, o, product[0]);
        }
        return;
    }
    const int64_t tiles = (num_rows + TILE_ROWS - 1) / TILE_ROWS;
    for (int64_t t = 0; t < tiles; ++t) {
        const int64_t row = t * num_rows / tiles;
        multiply_tile_of_rows<T, TILE_ROWS>(
            weight, count, length, x + row * length, (t + 1) * num_rows / tiles - row, t == 0,
            [&](int64_t m, int64_t o, float product) { emit(row + m, o, product); });
    }
}

}  // namespace
}  // namespace autodeploy
