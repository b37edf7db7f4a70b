// Products of tiles that fit in registers: a few rows with a few vectors of columns.

#pragma once

#include "simd.h"

namespace autodeploy {
namespace {

// TILE_ROWS x COLUMNS sums of 16 fill the vector registers, and leave some for what is multiplied.
constexpr int TILE_ROWS = 6;
constexpr int COLUMNS = REGISTER_BYTES == 64 ? 4 : 1;

// What is multiplied: STEP neighbouring elements along the summed dimension stand in one 32-bit lane.
template <class T>
struct Lane {
    using Element = float;
    static constexpr int STEP = 1;
    static void set(float* to, T from) { *to = to_float(from); }
    template <class V>
    static void set(float* to, V from) {
        store_vector(to, from);
    }
    static Floats multiply_add(Floats total, const float* row, const float* packed) {
        return splat(*row) * load(packed) + total;
    }
};

#if defined(__AVX512BF16__)
template <>
struct Lane<bf16> {
    using Element = bf16;
    static constexpr int STEP = 2;
    static void set(bf16* to, bf16 from) { *to = from; }
    static void set(bf16* to, Floats from) { store(to, from); }
    static Floats multiply_add(Floats total, const bf16* row, const bf16* packed) {
        int32_t pair;
        std::memcpy(&pair, row, sizeof(pair));
        return bit_cast<Floats>(_mm512_dpbf16_ps(bit_cast<__m512>(total), bit_cast<__m512bh>(_mm512_set1_epi32(pair)),
                                                 Product<bf16>::pack(packed)));
    }
};
#endif

// totals[r][v] = or += (ADD) sum over `depth` of rows[r][d] · packed[d][v], for one tile of R rows and V vectors. Rows are
// `row_stride` elements apart, steps of `packed` are `step_stride` elements apart. By itself, so that sums stay in
// registers: in a larger function, compilers keep some of them in memory.
template <class T, int R, int V, bool ADD = true>
__attribute__((noinline)) void multiply_tile(const typename Lane<T>::Element* rows, int64_t row_stride,
                          const typename Lane<T>::Element* packed, int64_t step_stride, int64_t depth,
                          float* totals, int64_t total_stride) {
    using L = Lane<T>;
    Floats sums[R][V];
    EACH(r, R) EACH(v, V) sums[r][v] = ADD ? load(totals + r * total_stride + v * LANES) : Floats{};
    for (int64_t d = 0; d < depth; d += L::STEP, packed += step_stride)
        EACH(r, R)
            EACH(v, V)
                sums[r][v] = L::multiply_add(sums[r][v], rows + r * row_stride + d, packed + v * LANES * L::STEP);
    EACH(r, R) EACH(v, V) store(totals + r * total_stride + v * LANES, sums[r][v]);
}

}  // namespace
}  // namespace autodeploy
