// Products of many rows with a weight, in blocks that stay in the caches: a block of the weight is laid out as tiles read
// it, and multiplied with a slab of rows (the order of loops of BLIS, doi 10.1145/2764454). Sums are float32, and those of
// a row do not depend on how many others there are.

#pragma once

#include "team.h"
#include "tiles.h"

namespace autodeploy {
namespace {

constexpr int64_t DEPTH = 256;                      // inputs of a block
constexpr int64_t OUTPUTS = 4 * LANES;              // outputs of a block
constexpr int64_t PANEL_OUTPUTS = COLUMNS * LANES;  // outputs of a tile
constexpr int64_t SLAB = 84 * TILE_ROWS;            // rows that a block is multiplied with, at most
constexpr int64_t ITEMS_PER_THREAD = 4;             // so that threads end together

template <int UPPER, class V>
inline V interleave(V a, V b) {
    if constexpr (is_pair<V>::value) {
        // Each half of the result comes from one quarter of either.
        const auto from_a = UPPER ? a.high : a.low, from_b = UPPER ? b.high : b.low;
        return {interleave<0>(from_a, from_b), interleave<1>(from_a, from_b)};
    } else if constexpr (SIZE<V> == 16) {
        return UPPER ? __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31)
                     : __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    } else if constexpr (SIZE<V> == 8) {
        return UPPER ? __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15)
                     : __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
    } else {
        return UPPER ? __builtin_shufflevector(a, b, 2, 6, 3, 7) : __builtin_shufflevector(a, b, 0, 4, 1, 5);
    }
}

// Sixteen rows of sixteen become columns.
template <class V>
inline void transpose(V rows[LANES]) {
    V other[LANES];
    for (int round = 0; round < 2; ++round) {
        for (int i = 0; i < 8; ++i) {
            other[2 * i] = interleave<0>(rows[i], rows[i + 8]);
            other[2 * i + 1] = interleave<1>(rows[i], rows[i + 8]);
        }
        for (int i = 0; i < 8; ++i) {
            rows[2 * i] = interleave<0>(other[i], other[i + 8]);
            rows[2 * i + 1] = interleave<1>(other[i], other[i + 8]);
        }
    }
}

// What stands in one lane: STEP neighbouring inputs, whose bits move together.
template <class T>
using Unit = std::conditional_t<sizeof(T) * Lane<T>::STEP == 4, uint32_t, uint16_t>;

inline void store_units(float* to, Vector<uint32_t, LANES> x) { store(to, bit_cast<Floats>(x)); }
inline void store_units(float* to, Vector<uint16_t, LANES> x) { store(to, bit_cast<Floats>(widened<Words>(x) << 16)); }
inline void store_units(bf16* to, Vector<uint32_t, LANES> x) { store_vector(reinterpret_cast<uint32_t*>(to), x); }

// Up to sixteen outputs of a block, `[depth / STEP][16][STEP]` with `step` elements from one to the next; outputs and
// inputs that do not exist are zero.
template <class T>
void pack_outputs(const T* weight, int64_t stride, int64_t count, int64_t depth, typename Lane<T>::Element* to,
                  int64_t step) {
    constexpr int64_t WIDTH = LANES * Lane<T>::STEP;
    using Row = Vector<Unit<T>, LANES>;
    for (int64_t first = 0; first < depth; first += WIDTH) {
        Row rows[LANES];
        const int64_t inputs = depth - first < WIDTH ? depth - first : WIDTH;
        if (count >= LANES && inputs == WIDTH) {
            for (int64_t o = 0; o < LANES; ++o)
                rows[o] = load_vector<Row>(reinterpret_cast<const Unit<T>*>(weight + o * stride + first));
        } else {
            for (int64_t o = 0; o < LANES; ++o) {
                Unit<T> units[LANES] = {};
                if (o < count) std::memcpy(units, weight + o * stride + first, static_cast<size_t>(inputs) * sizeof(T));
                rows[o] = load_vector<Row>(units);
            }
        }
        transpose(rows);
        for (int64_t i = 0; i < LANES; ++i, to += step) store_units(to, rows[i]);
    }
}

// The memory of one thread.
template <class T>
struct Workspace {
    alignas(64) typename Lane<T>::Element weight[OUTPUTS * DEPTH];
    alignas(64) float totals[SLAB * OUTPUTS];
};

template <class T, int R>
inline void multiply_rows(int64_t rows, const typename Lane<T>::Element* x, int64_t stride,
                          const typename Lane<T>::Element* panel, int64_t depth, float* totals) {
    if (rows == R)
        multiply_tile<T, R, COLUMNS>(x, stride, panel, PANEL_OUTPUTS * Lane<T>::STEP, depth, totals, OUTPUTS);
    else if constexpr (R > 1)
        multiply_rows<T, R - 1>(rows, x, stride, panel, depth, totals);
}

// What is multiplied: x `[num_rows, num_inputs]`, weight `[num_outputs, num_inputs]`, bias `[num_outputs]` or null.
template <class T>
struct Gemm {
    const typename Lane<T>::Element* x;
    const T *weight, *bias;
    T* out;
    int64_t num_rows, num_inputs, num_outputs;
};

// Rows `[begin, end)`, at most SLAB, of the block of outputs from `first` on.
template <class T>
void multiply_block(const Gemm<T>& g, int64_t begin, int64_t end, int64_t first) {
    static thread_local Workspace<T> mine;
    const int64_t count = g.num_outputs - first < OUTPUTS ? g.num_outputs - first : OUTPUTS;
    std::memset(mine.totals, 0, sizeof(float) * static_cast<size_t>((end - begin) * OUTPUTS));
    for (int64_t input = 0; input < g.num_inputs; input += DEPTH) {
        const int64_t depth = g.num_inputs - input < DEPTH ? g.num_inputs - input : DEPTH;
        const T* weight = g.weight + first * g.num_inputs + input;
        for (int64_t o = 0; o < OUTPUTS; o += LANES)
            pack_outputs<T>(weight + o * g.num_inputs, g.num_inputs, count - o, depth,
                            mine.weight + o / PANEL_OUTPUTS * PANEL_OUTPUTS * DEPTH + o % PANEL_OUTPUTS * Lane<T>::STEP,
                            PANEL_OUTPUTS * Lane<T>::STEP);
        for (int64_t row = begin; row < end; row += TILE_ROWS)
            for (int64_t o = 0; o < count; o += PANEL_OUTPUTS)
                multiply_rows<T, TILE_ROWS>(end - row < TILE_ROWS ? end - row : TILE_ROWS,
                                            g.x + row * g.num_inputs + input, g.num_inputs, mine.weight + o * DEPTH,
                                            depth, mine.totals + (row - begin) * OUTPUTS + o);
    }
    for (int64_t o = 0; o < count; o += LANES) {
        const Floats shift = g.bias == nullptr ? Floats{} : load(g.bias + first + o, count - o);
        for (int64_t row = begin; row < end; ++row)
            store(g.out + row * g.num_outputs + first + o,
                  load(mine.totals + (row - begin) * OUTPUTS + o) + shift, count - o);
    }
}

// All of it, shared by the team.
template <class T>
void multiply(const Gemm<T>& g) {
    const int64_t blocks = (g.num_outputs + OUTPUTS - 1) / OUTPUTS, wanted = ITEMS_PER_THREAD * team_size();
    const int64_t least = (wanted + blocks - 1) / blocks;  // slabs
    const int64_t tiles = (g.num_rows + least * TILE_ROWS - 1) / (least * TILE_ROWS);
    const int64_t slab = tiles * TILE_ROWS < SLAB ? tiles * TILE_ROWS : SLAB;
    const int64_t slabs = (g.num_rows + slab - 1) / slab;
#pragma omp for schedule(dynamic)
    for (int64_t item = 0; item < blocks * slabs; ++item) {
        const int64_t begin = item % slabs * slab, end = begin + slab;
        multiply_block(g, begin, end < g.num_rows ? end : g.num_rows, item / slabs * OUTPUTS);
    }
}

}  // namespace
}  // namespace autodeploy
