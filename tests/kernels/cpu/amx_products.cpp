// Products on tiles as functions of arrays, for test_amx.py.

#include "amx_rows.h"

using autodeploy::bf16;

extern "C" {
// sums `[16, 16]` += rows `[16, 32]` · pairs `[16, 16, 2]`.
void add_products(const bf16* rows, const bf16* pairs, float* sums) {
    using autodeploy::Amx;
    const autodeploy::TilesInUse tiles;
    Amx::load<0>(sums, 64);
    Amx::load<1>(rows, 64);
    Amx::load<2>(pairs, 64);
    Amx::multiply_add<0, 1, 2>();
    Amx::store<0>(sums, 64);
}

// totals `[count, columns]` = or += (add) rows `[count, depth]` · packed `[depth / 2, columns, 2]`, with these strides.
void multiply_by_tiles(const bf16* rows, int64_t row_stride, int64_t count, const bf16* packed, int64_t step_stride,
                       int64_t columns, int64_t depth, float* totals, int64_t total_stride, int add) {
    const autodeploy::TilesInUse tiles;
    const auto multiply = add ? autodeploy::multiply_by_tiles<true> : autodeploy::multiply_by_tiles<false>;
    multiply(rows, row_stride, count, packed, step_stride, columns, depth, totals, total_stride, 0);
}

// out `[num_rows, count]` = x `[num_rows, depth]` · weight `[count, depth]`, transposed.
void multiply_packed_rows(const bf16* weight, int64_t count, int64_t depth, const bf16* x, int64_t num_rows, float* out) {
    const autodeploy::PackedRows rows(x, num_rows, depth);
    const autodeploy::TilesInUse tiles;
    autodeploy::multiply_packed_rows(weight, count, rows, [&](int64_t row, int64_t o, auto sums, int64_t lanes) {
        autodeploy::store(out + row * count + o, sums, lanes);
    });
}
}
