// Products of a few rows with a weight on tiles (amx.h): the weight's rows stand as they do in memory, each read from
// there once, and x is laid out in pairs. A row's sums do not depend on how many others there are.

#pragma once

#include "gemm.h"
#include "team.h"

#if defined(AUTODEPLOY_AMX)

namespace autodeploy {
namespace {

constexpr int64_t PACKED_ROWS = TILED_COLUMNS;  // rows of x that are laid out side by side

inline int64_t rounded_up(int64_t count, int64_t unit) { return (count + unit - 1) / unit * unit; }

// Rows of x as `[depth / 2][rows, rounded up to SIDE][2]`, PACKED_ROWS at a time, in memory of this thread.
struct PackedRows {
    int64_t num_rows, depth;
    bf16* packed;

    PackedRows(const bf16* x, int64_t count, int64_t length) : num_rows(count), depth(length) {
        struct Pair {  // nothing else in this memory
            bf16 even, odd;
        };
        const int64_t size = rounded_up(num_rows, SIDE) * rounded_up(depth, INPUTS<bf16>);
        packed = reinterpret_cast<bf16*>(own_memory<Pair>(size / 2));
        for (int64_t row = 0; row < num_rows; row += SIDE) {
            const int64_t first = row / PACKED_ROWS * PACKED_ROWS;
            pack_outputs<bf16>(x + row * depth, depth, num_rows - row, depth, at(first) + 2 * (row - first),
                               2 * columns(first));
        }
    }
    int64_t columns(int64_t first) const {
        return rounded_up(num_rows - first < PACKED_ROWS ? num_rows - first : PACKED_ROWS, SIDE);
    }
    bf16* at(int64_t first) const { return packed + first * rounded_up(depth, INPUTS<bf16>); }
};

// `count` rows of a weight `[count, depth]` with rows of x: emit(row, output, sums, how many of them exist). What comes
// behind these rows of the weight is fetched: the hardware does not see that they are read side by side. Needs TilesInUse.
template <class Emit>
void multiply_packed_rows(const bf16* weight, int64_t count, const PackedRows& x, const Emit& emit) {
    alignas(64) float sums[SIDE * PACKED_ROWS], lanes[SIDE * SIDE];
    for (int64_t o = 0; o < count; o += SIDE) {
        const int64_t outputs = count - o < SIDE ? count - o : SIDE;
        for (int64_t first = 0; first < x.num_rows; first += PACKED_ROWS) {
            const int64_t columns = x.columns(first);
            multiply_by_tiles<false>(weight + o * x.depth, x.depth, outputs, x.at(first), 2 * columns, columns, x.depth,
                                     sums, PACKED_ROWS, first == 0 ? SIDE * x.depth : 0);
            for (int64_t row = 0; row < columns; row += SIDE) {
                for (int64_t r = 0; r < SIDE; r += INPUTS<float>)
                    pack_whole(sums + row + r, PACKED_ROWS, lanes + r * SIDE, SIDE);
                for (int64_t r = 0; r < SIDE && first + row + r < x.num_rows; ++r)
                    emit(first + row + r, o, load(lanes + r * SIDE), outputs);
            }
        }
    }
}

}  // namespace
}  // namespace autodeploy

#endif
