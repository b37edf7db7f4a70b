// Products of many rows with a weight, in blocks that stay in the caches: a block of the weight is laid out as tiles read
// it, and multiplied with a slab of rows (the order of loops of BLIS, doi 10.1145/2764454). Sums are float32, and those of
// a row do not depend on how many others there are.

#pragma once

#include "amx.h"
#include "tiles.h"

namespace autodeploy {
namespace {

constexpr int64_t DEPTH = 256;                      // inputs of a block
constexpr int64_t OUTPUTS = 4 * LANES;              // outputs of a block
constexpr int64_t PANEL_OUTPUTS = COLUMNS * LANES;  // outputs of a tile
constexpr int64_t SLAB = 84 * TILE_ROWS;            // rows that a block is multiplied with, at most

// Sixteen outputs of INPUTS inputs are laid out at a time, as `[INPUTS / STEP][16][STEP]` with `step` elements from one to
// the next: a transposition, whose cost the product of few rows pays too.
#if defined(__AVX2__)
template <class T>
constexpr int64_t INPUTS = 16 / sizeof(T);

// Rows r and r + 8 share a register, so that sixteen columns come out in order.
inline void pack_whole(const bf16* weight, int64_t stride, float* to, int64_t step) {
    const auto eight = [&](int64_t row) {
        return _mm_loadu_si128(reinterpret_cast<const __m128i*>(weight + row * stride));
    };
    __m256i rows[8], other[8];
    for (int r = 0; r < 8; ++r) rows[r] = _mm256_inserti128_si256(_mm256_castsi128_si256(eight(r)), eight(r + 8), 1);
    for (int r = 0; r < 4; ++r) {
        other[2 * r] = _mm256_unpacklo_epi16(rows[r], rows[r + 4]);
        other[2 * r + 1] = _mm256_unpackhi_epi16(rows[r], rows[r + 4]);
    }
    for (int r = 0; r < 4; ++r) {
        rows[2 * r] = _mm256_unpacklo_epi16(other[r], other[r + 4]);
        rows[2 * r + 1] = _mm256_unpackhi_epi16(other[r], other[r + 4]);
    }
    for (int r = 0; r < 4; ++r) {
        other[2 * r] = _mm256_unpacklo_epi16(rows[r], rows[r + 4]);
        other[2 * r + 1] = _mm256_unpackhi_epi16(rows[r], rows[r + 4]);
    }
    for (int i = 0; i < 8; ++i, to += step) {
        const __m256i low = _mm256_cvtepu16_epi32(_mm256_castsi256_si128(other[i]));
        const __m256i high = _mm256_cvtepu16_epi32(_mm256_extracti128_si256(other[i], 1));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm256_slli_epi32(low, 16));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + 8), _mm256_slli_epi32(high, 16));
    }
}

inline void pack_whole(const float* weight, int64_t stride, float* to, int64_t step) {
    for (int64_t half = 0; half < LANES; half += 8, weight += 8 * stride, to += 8) {
        __m256 rows[4], other[4];
        for (int r = 0; r < 4; ++r) {
            const __m128 low = _mm_loadu_ps(weight + r * stride), high = _mm_loadu_ps(weight + (r + 4) * stride);
            rows[r] = _mm256_insertf128_ps(_mm256_castps128_ps256(low), high, 1);
        }
        for (int r = 0; r < 2; ++r) {
            other[2 * r] = _mm256_unpacklo_ps(rows[r], rows[r + 2]);
            other[2 * r + 1] = _mm256_unpackhi_ps(rows[r], rows[r + 2]);
        }
        for (int r = 0; r < 2; ++r) {
            _mm256_storeu_ps(to + 2 * r * step, _mm256_unpacklo_ps(other[r], other[r + 2]));
            _mm256_storeu_ps(to + (2 * r + 1) * step, _mm256_unpackhi_ps(other[r], other[r + 2]));
        }
    }
}

// Pairs of inputs move together, as the bits of a float32 would; their number is even.
inline void pack_whole(const bf16* weight, int64_t stride, bf16* to, int64_t step) {
    pack_whole(reinterpret_cast<const float*>(weight), stride / 2, reinterpret_cast<float*>(to), step / 2);
}
#else
template <class T>
constexpr int64_t INPUTS = LANES;

template <class T>
void pack_whole(const T* weight, int64_t stride, float* to, int64_t step) {
    for (int64_t i = 0; i < INPUTS<T>; ++i, to += step)
        for (int64_t o = 0; o < LANES; ++o) to[o] = to_float(weight[o * stride + i]);
}
#endif

// Up to sixteen outputs; outputs and inputs that do not exist are zero.
template <class T>
void pack_outputs(const T* weight, int64_t stride, int64_t count, int64_t depth, typename Lane<T>::Element* to,
                  int64_t step) {
    constexpr int64_t WIDTH = INPUTS<T>;
    for (int64_t first = 0; first < depth; first += WIDTH, to += WIDTH / Lane<T>::STEP * step) {
        if (count >= LANES && depth - first >= WIDTH && stride % Lane<T>::STEP == 0) {
            pack_whole(weight + first, stride, to, step);
            continue;
        }
        T padded[LANES][WIDTH] = {};
        const size_t size = static_cast<size_t>(depth - first < WIDTH ? depth - first : WIDTH) * sizeof(T);
        for (int64_t o = 0; o < LANES && o < count; ++o) std::memcpy(padded[o], weight + o * stride + first, size);
        pack_whole(padded[0], WIDTH, to, step);
    }
}

// The memory of one thread.
template <class T>
struct Workspace {
    alignas(64) typename Lane<T>::Element weight[OUTPUTS * DEPTH];
    alignas(64) typename Lane<T>::Element rows[LANES * DEPTH];  // of a tile, however large
    alignas(64) float totals[SLAB * OUTPUTS];
};

// The sums of one tile, added to `totals` (ADD) or in their place.
template <class T, int R, bool ADD>
inline void multiply_rows(int64_t rows, const typename Lane<T>::Element* x, int64_t stride,
                          const typename Lane<T>::Element* panel, int64_t depth, float* totals) {
    if (rows == R)
        multiply_tile<T, R, COLUMNS, ADD>(x, stride, panel, PANEL_OUTPUTS * Lane<T>::STEP, depth, totals, OUTPUTS);
    else if constexpr (R > 1)
        multiply_rows<T, R - 1, ADD>(rows, x, stride, panel, depth, totals);
}

// Rows of x as tiles read them, one after the other in memory.
template <class T>
struct Consecutive {
    using E = typename Lane<T>::Element;
    const E* x;
    int64_t stride;
    const E* operator()(int64_t row, int64_t, int64_t input, int64_t, E*) const { return x + row * stride + input; }
};

// Rows `order[row] / each` of x, copied where they are to be multiplied.
template <class T>
struct Gathered {
    using E = typename Lane<T>::Element;
    const T* x;
    int64_t num_inputs;
    const int64_t* order;
    int64_t each;
    static constexpr int64_t stride = DEPTH;
    const E* operator()(int64_t row, int64_t count, int64_t input, int64_t depth, E* own) const {
        for (int64_t r = 0; r < count; ++r)
            to_operands(x + order[row + r] / each * num_inputs + input, depth, own + r * DEPTH);
        return own;
    }
};

// A block of outputs of `weight` `[count, num_inputs]`, for rows `[begin, end)`, at most SLAB:
// emit(row, output, sums, how many of them exist).
template <class T, class Rows, class Emit>
void multiply_block(const Rows& rows, int64_t begin, int64_t end, const T* weight, int64_t count, int64_t num_inputs,
                    const Emit& emit) {
    static thread_local Workspace<T> own;
    Workspace<T>& mine = own;  // looked up once
    count = count < OUTPUTS ? count : OUTPUTS;
#if defined(AUTODEPLOY_AMX)
    const TilesInUse tiles(std::is_same_v<T, bf16>);
#endif
    for (int64_t input = 0; input < num_inputs; input += DEPTH) {
        const int64_t depth = num_inputs - input < DEPTH ? num_inputs - input : DEPTH;
        const auto multiply = input == 0 ? multiply_rows<T, TILE_ROWS, false> : multiply_rows<T, TILE_ROWS, true>;
        for (int64_t o = 0; o < OUTPUTS; o += LANES)
            pack_outputs<T>(weight + o * num_inputs + input, num_inputs, count - o, depth,
                            mine.weight + o / PANEL_OUTPUTS * PANEL_OUTPUTS * DEPTH + o % PANEL_OUTPUTS * Lane<T>::STEP,
                            PANEL_OUTPUTS * Lane<T>::STEP);
#if defined(AUTODEPLOY_AMX)
        if constexpr (std::is_same_v<T, bf16>) {
            static_assert(OUTPUTS == PANEL_OUTPUTS, "one panel");
            if (tiles.are_wanted) {
                const auto multiply_side = input == 0 ? multiply_by_tiles<false> : multiply_by_tiles<true>;
                for (int64_t row = begin; row < end; row += SIDE) {
                    const int64_t side = end - row < SIDE ? end - row : SIDE;
                    multiply_side(rows(row, side, input, depth, mine.rows), rows.stride, side, mine.weight,
                                  OUTPUTS * Lane<T>::STEP, OUTPUTS, depth, mine.totals + (row - begin) * OUTPUTS,
                                  OUTPUTS, 0);
                }
                continue;
            }
        }
#endif
        for (int64_t row = begin; row < end; row += TILE_ROWS) {
            const int64_t tile = end - row < TILE_ROWS ? end - row : TILE_ROWS;
            const auto* x = rows(row, tile, input, depth, mine.rows);
            for (int64_t o = 0; o < count; o += PANEL_OUTPUTS)
                multiply(tile, x, rows.stride, mine.weight + o * DEPTH, depth,
                         mine.totals + (row - begin) * OUTPUTS + o);
        }
    }
    for (int64_t row = begin; row < end; ++row)
        for (int64_t o = 0; o < count; o += LANES)
            emit(row, o, load(mine.totals + (row - begin) * OUTPUTS + o), count - o < LANES ? count - o : LANES);
}

}  // namespace
}  // namespace autodeploy
