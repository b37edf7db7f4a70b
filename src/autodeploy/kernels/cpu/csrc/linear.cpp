// Products of rows with a weight. For a few, each weight row is read from memory once and multiplied with all of them;
// more go by blocks.

#include <algorithm>

#include "amx_rows.h"
#include "few_rows.h"
#include "gemm.h"
#include "team.h"

namespace autodeploy {
namespace {

constexpr int64_t ITEMS_PER_THREAD = 4;  // so that threads end together

#if defined(AUTODEPLOY_AMX)
void few_rows_on_tiles(const bf16* x, const bf16* weight, const bf16* bias, bf16* out, int64_t num_rows,
                       int64_t num_inputs, int64_t num_outputs) {
    const PackedRows rows(x, num_rows, num_inputs);  // every thread for itself, as above
    const TilesInUse tiles;
    const int64_t groups = (num_outputs + SIDE - 1) / SIDE, team = team_size();
#pragma omp for schedule(static)
    for (int64_t share = 0; share < team; ++share) {
        const int64_t first = share * groups / team * SIDE;
        const int64_t end = std::min((share + 1) * groups / team * SIDE, num_outputs);
        multiply_packed_rows(weight + first * num_inputs, end - first, rows,
                             [&](int64_t row, int64_t o, Floats sums, int64_t count) {
                                 const Floats shift = bias == nullptr ? Floats{} : load(bias + first + o, count);
                                 store(out + row * num_outputs + first + o, sums + shift, count);
                             });
    }
}
#endif

template <class T>
void few_rows(const T* x, const T* weight, const T* bias, T* out, int64_t num_rows, int64_t num_inputs,
              int64_t num_outputs) {
#if defined(AUTODEPLOY_AMX)
    if constexpr (std::is_same_v<T, bf16>)
        if (has_tiles && num_rows > 1) return few_rows_on_tiles(x, weight, bias, out, num_rows, num_inputs, num_outputs);
#endif
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
        const int64_t count = first + BLOCK < num_outputs ? BLOCK : num_outputs - first;
        multiply_few_rows(weight + first * num_inputs, count, num_inputs, rows, num_rows,
                          [&](int64_t row, int64_t o, float product) {
                              const float shift = bias == nullptr ? 0.0f : to_float(bias[first + o]);
                              assign(out[row * num_outputs + first + o], product + shift);
                          });
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
