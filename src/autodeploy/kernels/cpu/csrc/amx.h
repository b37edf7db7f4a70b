// Products of bfloat16 on a processor's matrix unit (AMX): registers of 16 rows of 64 bytes, called tiles, and an
// instruction that adds the product of two of them to a third, in float32.
//
// One factor stands row by row, the other in pairs along the summed dimension: the layout that gemm.h and
// attention_blocks.h give it for AVX512-BF16. Where few rows meet a weight, the weight is the factor that stands row by
// row, as it does in memory, and only the rows are laid out.

#pragma once

#include "tiles.h"

#if defined(__AMX_BF16__) && defined(__AVX512BF16__) && defined(__linux__)
#define AUTODEPLOY_AMX

#include <sys/syscall.h>
#include <unistd.h>

namespace autodeploy {

constexpr int64_t SIDE = 16;           // rows of a tile, and sums in each
constexpr int64_t SIDE_BYTES = 64;     // bytes of a row
constexpr int64_t TILE_DEPTH = 32;     // what one instruction sums over
constexpr int64_t TILED_COLUMNS = 64;  // four tiles of sums, for as many instructions that do not wait for each other

// What the registers hold: all of them 16 rows of 64 bytes. As the instruction reads it.
struct alignas(64) TileShapes {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
static_assert(sizeof(TileShapes) == 64, "not the layout of the processor");

#if defined(AUTODEPLOY_AMX_INSTRUCTIONS)
using Amx = AUTODEPLOY_AMX_INSTRUCTIONS;  // others in their place, for tests
#else
// The instructions themselves: what compilers offer does not say which memory it reads (gcc 12), and stores to it vanish.
struct Amx {
    static bool ask_permission() {
        constexpr int REQUEST = 0x1023, TILES = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
        return syscall(SYS_arch_prctl, REQUEST, TILES) == 0;
    }
    static void configure(const TileShapes& shapes) { asm volatile("ldtilecfg %0" ::"m"(shapes)); }
    static void release() { asm volatile("tilerelease"); }
    template <int TILE>
    static void zero() {
        asm volatile("tilezero %%tmm%c0" ::"i"(TILE));
    }
    template <int TILE>
    static void load(const void* from, int64_t stride) {
        asm volatile("tileloadd (%1,%2,1), %%tmm%c0" ::"i"(TILE), "r"(from), "r"(stride) : "memory");
    }
    template <int TILE>
    static void store(void* to, int64_t stride) {
        asm volatile("tilestored %%tmm%c0, (%1,%2,1)" ::"i"(TILE), "r"(to), "r"(stride) : "memory");
    }
    template <int SUMS, int ROWS, int PAIRS>
    static void multiply_add() {
        asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(SUMS), "i"(ROWS), "i"(PAIRS));
    }
};
#endif

namespace {

// Whether this process may use tiles. Asked when the library is loaded: a process that uses them unasked is ended.
const bool has_tiles = Amx::ask_permission();

// Tiles of this thread, while this lives: nobody else finds our shapes, and switching threads saves no tiles in vain.
struct TilesInUse {
    const bool are_wanted;
    explicit TilesInUse(bool wanted = true) : are_wanted(wanted && has_tiles) {
        if (are_wanted) Amx::configure(TileShapes{});
    }
    TilesInUse(const TilesInUse&) = delete;
    TilesInUse& operator=(const TilesInUse&) = delete;
    ~TilesInUse() {
        if (are_wanted) Amx::release();
    }
};

template <int TILE>
__attribute__((noinline)) void load_part(const char* from, int64_t stride, int64_t count, int64_t bytes) {
    alignas(64) char padded[SIDE][SIDE_BYTES] = {};
    const size_t size = static_cast<size_t>(bytes < SIDE_BYTES ? bytes : SIDE_BYTES);
    for (int64_t r = 0; r < SIDE && r < count; ++r) std::memcpy(padded[r], from + r * stride, size);
    Amx::load<TILE>(padded, SIDE_BYTES);
}

// Of a tile the `count` rows and `bytes` of each that exist. The rest is zero, and no other memory is read.
template <int TILE>
inline void load_tile(const void* from, int64_t stride, int64_t count, int64_t bytes) {
    if (count >= SIDE && bytes >= SIDE_BYTES)
        Amx::load<TILE>(from, stride);
    else
        load_part<TILE>(static_cast<const char*>(from), stride, count, bytes);
}

// A tile's first `count` rows.
template <int TILE>
inline void store_tile(float* to, int64_t stride, int64_t count) {
    if (count >= SIDE) return Amx::store<TILE>(to, stride * static_cast<int64_t>(sizeof(float)));
    alignas(64) float all[SIDE][SIDE];
    Amx::store<TILE>(all, SIDE_BYTES);
    for (int64_t r = 0; r < count; ++r) std::memcpy(to + r * stride, all[r], sizeof(all[r]));
}

template <int V, bool ADD>
inline void begin_tiles(const float* totals, int64_t stride, int64_t count) {
    if constexpr (V > 0) {
        begin_tiles<V - 1, ADD>(totals, stride, count);
        const float* column = totals + (V - 1) * SIDE;
        if constexpr (ADD)
            load_tile<V - 1>(column, stride * static_cast<int64_t>(sizeof(float)), count, SIDE_BYTES);
        else
            Amx::zero<V - 1>();
    }
}

constexpr int ROWS_TILE = 4, FIRST_PACKED_TILE = 5, PACKED_TILES = 3;  // sums stand before them

// Adds the products of ROWS_TILE with V tiles of columns, of which `pairs` steps exist.
template <int V>
inline void add_to_tiles(const bf16* packed, int64_t step_stride, int64_t pairs) {
    if constexpr (V > 0) {
        add_to_tiles<V - 1>(packed, step_stride, pairs);
        constexpr int PACKED_TILE = FIRST_PACKED_TILE + (V - 1) % PACKED_TILES;
        load_tile<PACKED_TILE>(packed + 2 * (V - 1) * SIDE, step_stride * static_cast<int64_t>(sizeof(bf16)), pairs,
                               SIDE_BYTES);
        Amx::multiply_add<V - 1, ROWS_TILE, PACKED_TILE>();
    }
}

template <int V>
inline void store_tiles(float* totals, int64_t stride, int64_t count) {
    if constexpr (V > 0) {
        store_tiles<V - 1>(totals, stride, count);
        store_tile<V - 1>(totals + (V - 1) * SIDE, stride, count);
    }
}

// As `multiply_tile` for up to SIDE rows. `ahead` elements further on, or nothing for 0, is fetched.
template <int V, bool ADD>
void multiply_side(const bf16* rows, int64_t row_stride, int64_t count, const bf16* packed, int64_t step_stride,
                   int64_t depth, float* totals, int64_t total_stride, int64_t ahead) {
    begin_tiles<V, ADD>(totals, total_stride, count);
    for (int64_t d = 0; d < depth; d += TILE_DEPTH, packed += TILE_DEPTH / 2 * step_stride) {
        if (ahead != 0)
            for (int64_t r = 0; r < SIDE; ++r) __builtin_prefetch(rows + r * row_stride + d + ahead, 0, 2);
        constexpr int64_t BYTES = sizeof(bf16);
        load_tile<ROWS_TILE>(rows + d, row_stride * BYTES, count, (depth - d) * BYTES);
        add_to_tiles<V>(packed, step_stride, (depth - d + 1) / 2);
    }
    store_tiles<V>(totals, total_stride, count);
}

// The same for any number of rows, and of columns a multiple of 16. Needs TilesInUse.
template <bool ADD>
void multiply_by_tiles(const bf16* rows, int64_t row_stride, int64_t count, const bf16* packed, int64_t step_stride,
                       int64_t columns, int64_t depth, float* totals, int64_t total_stride, int64_t ahead) {
    constexpr decltype(&multiply_side<1, ADD>) MULTIPLY[] = {multiply_side<1, ADD>, multiply_side<2, ADD>,
                                                            multiply_side<3, ADD>, multiply_side<4, ADD>};
    for (int64_t row = 0; row < count; row += SIDE) {
        for (int64_t c = 0; c < columns; c += TILED_COLUMNS) {
            const int64_t width = columns - c < TILED_COLUMNS ? columns - c : TILED_COLUMNS;
            MULTIPLY[width / SIDE - 1](rows + row * row_stride, row_stride, count - row, packed + 2 * c, step_stride,
                                       depth, totals + row * total_stride + c, total_stride, ahead);
        }
    }
}

}  // namespace
}  // namespace autodeploy

#endif
