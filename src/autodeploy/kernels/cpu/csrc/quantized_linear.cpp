// Products of any number of rows with a weight of 8 or 4 bits: each tile of outputs goes by all rows of a chunk.

#include "quantized.h"
#include "team.h"

namespace autodeploy {
namespace {

constexpr int64_t CHUNK = 64;  // rows that stay in the second cache while tiles go by

template <class T>
struct QuantizedProduct {
    const uint8_t* weight;
    const fp16 *scales, *offsets;
    const T* bias;
    T* out;
    int64_t num_outputs, num_groups;
};

// Rows `row` to `end` of a tile's outputs, M at a time; the last rows in ever smaller steps.
template <class T, int BITS, bool OFFSETS, int M>
void rows_of_tile(const QuantizedProduct<T>& p, const Tile& tile, const RoundedRows& x, int64_t first, int64_t row,
                  int64_t end) {
    const int64_t count = p.num_outputs - first;
    const Floats shift = p.bias == nullptr ? Floats{} : load(p.bias + first, count);
    for (; row + M <= end; row += M) {
        Floats totals[M];
        tile_products<BITS, OFFSETS, M>(tile, x.at<BITS>(row), x.width, totals);
        for (int m = 0; m < M; ++m) store(p.out + (row + m) * p.num_outputs + first, totals[m] + shift, count);
    }
    if constexpr (M > 1) {
        if (row < end) rows_of_tile<T, BITS, OFFSETS, M / 2>(p, tile, x, first, row, end);
    }
}

template <class T, int BITS, bool OFFSETS>
void multiply(const QuantizedProduct<T>& p, const T* x, int64_t num_rows, int64_t num_inputs, void* scratch) {
    const int64_t num_tiles = (p.num_outputs + TILE - 1) / TILE;
    const RoundedRows rounded{scratch, (num_inputs + STEP - 1) / STEP, num_rows < PANEL ? num_rows : PANEL};
    const int64_t blocks_each = rounded.blocks / p.num_groups;
#pragma omp for schedule(static)
    for (int64_t row = 0; row < num_rows; ++row)
        rounded.round_row<BITS>(row, x + row * num_inputs, num_inputs, OFFSETS ? 0 : 1 << (BITS - 1));
    for (int64_t row = 0; row < num_rows; row += CHUNK) {
        const int64_t end = row + CHUNK < num_rows ? row + CHUNK : num_rows;
#pragma omp for schedule(static) nowait
        for (int64_t t = 0; t < num_tiles; ++t) {
            const int64_t at = t * p.num_groups * TILE;
            const Tile tile{p.weight + t * rounded.blocks * BITS * VECTOR, p.scales + at,
                            OFFSETS ? p.offsets + at : nullptr, p.num_groups, blocks_each};
            rows_of_tile<T, BITS, OFFSETS, PANEL>(p, tile, rounded, t * TILE, row, end);
        }
    }
#pragma omp barrier
}

template <class T>
void multiply(const QuantizedProduct<T>& p, int bits, const T* x, int64_t num_rows, int64_t num_inputs, void* scratch) {
    const auto chosen = bits == 8 ? (p.offsets == nullptr ? multiply<T, 8, false> : multiply<T, 8, true>)
                                  : (p.offsets == nullptr ? multiply<T, 4, false> : multiply<T, 4, true>);
    chosen(p, x, num_rows, num_inputs, scratch);
}

}  // namespace
}  // namespace autodeploy

// x: `[num_rows, num_inputs]`. weight: tiles of 16 outputs, each of blocks of 32 inputs, `bits` times 64 bytes long.
// scales and offsets (or null): `[tiles, num_groups, 16]`. bias: `[num_outputs]` or null. out: `[num_rows, num_outputs]`.
// scratch: a Block per row, rows beyond PANEL filled up to a multiple of it, and block of inputs. All contiguous.
#define DEFINE_QUANTIZED_LINEAR(NAME, T)                                                                             \
    extern "C" void NAME(const T* x, const uint8_t* weight, const autodeploy::fp16* scales,                          \
                         const autodeploy::fp16* offsets, const T* bias, T* out, int64_t num_rows,                   \
                         int64_t num_inputs, int64_t num_outputs, int64_t num_groups, int bits, int threads,         \
                         void* scratch) {                                                                            \
        const autodeploy::QuantizedProduct<T> product = {weight,      scales,    offsets, bias, out,                 \
                                                         num_outputs, num_groups};                                   \
        autodeploy::with_team(                                                                                       \
            threads, [&] { autodeploy::multiply<T>(product, bits, x, num_rows, num_inputs, scratch); });             \
    }                                                                                                                \
    RECORDABLE(NAME)

DEFINE_QUANTIZED_LINEAR(quantized_linear_float32, float)
DEFINE_QUANTIZED_LINEAR(quantized_linear_bfloat16, autodeploy::bf16)
