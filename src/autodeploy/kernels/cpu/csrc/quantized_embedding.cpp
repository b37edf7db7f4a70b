// Rows of a matrix of 8 or 4 bits in tiles of 16 rows, by number.

#include "quantized.h"
#include "team.h"

namespace autodeploy {
namespace {

enum Status { DONE, BAD_INDEX };

constexpr int64_t QUAD = 4;  // inputs of an output that follow each other

// With 4 bits a byte holds the inputs of two quads, the earlier in its lower half.
template <class T, int BITS>
void unpack_row(const uint8_t* tile, const fp16* scales, const fp16* offsets, int64_t lane, int64_t num_groups,
                int64_t num_inputs, T* out) {
    const int64_t group_size = num_inputs / num_groups;
    for (int64_t i = 0; i < num_inputs; ++i) {
        const int64_t in_block = i % STEP, quad = in_block / QUAD;
        const uint8_t* block = tile + i / STEP * BITS * VECTOR;
        const int64_t vector = BITS == 8 ? quad : quad / 2;
        const uint8_t byte = block[vector * VECTOR + lane * QUAD + in_block % QUAD];
        const int number = BITS == 8 ? byte : quad % 2 == 0 ? byte & 15 : byte >> 4;
        const int64_t at = i / group_size * TILE + lane;
        const float scale = to_float(scales[at]);
        const float value = offsets == nullptr ? static_cast<float>(number - (1 << (BITS - 1))) * scale
                                               : static_cast<float>(number) * scale + to_float(offsets[at]);
        assign(out[i], value);
    }
}

template <class T>
Status look_up(const int64_t* indices, const uint8_t* weight, const fp16* scales, const fp16* offsets, T* out,
               int64_t num_indices, int64_t num_tiles, int64_t num_inputs, int64_t num_groups, int bits) {
    Status status = DONE;
    const int64_t tile_bytes = (num_inputs + STEP - 1) / STEP * bits * VECTOR;
#pragma omp for schedule(static)
    for (int64_t n = 0; n < num_indices; ++n) {
        const int64_t row = indices[n], tile = row / TILE;
        if (row < 0 || tile >= num_tiles) {
            status = BAD_INDEX;
            continue;
        }
        const int64_t groups = tile * num_groups * TILE;
        (bits == 8 ? unpack_row<T, 8> : unpack_row<T, 4>)(weight + tile * tile_bytes, scales + groups,
                                                          offsets == nullptr ? nullptr : offsets + groups, row % TILE,
                                                          num_groups, num_inputs, out + n * num_inputs);
    }
    return status;
}

}  // namespace
}  // namespace autodeploy

// indices: `[num_indices]`. weight: tiles of 16 rows, each of blocks of 32 inputs, `bits` times 64 bytes long. scales and
// offsets (or null): `[num_tiles, num_groups, 16]`. out: `[num_indices, num_inputs]`. All contiguous. Returns BAD_INDEX
// for a number that no tile has; nothing is read there.
#define DEFINE_QUANTIZED_EMBEDDING(NAME, T)                                                                          \
    extern "C" int NAME(const int64_t* indices, const uint8_t* weight, const autodeploy::fp16* scales,               \
                        const autodeploy::fp16* offsets, T* out, int64_t num_indices, int64_t num_tiles,             \
                        int64_t num_inputs, int64_t num_groups, int bits, int threads) {                             \
        return autodeploy::status_of(threads, [&] {                                                                  \
            return autodeploy::look_up(indices, weight, scales, offsets, out, num_indices, num_tiles, num_inputs,    \
                                       num_groups, bits);                                                            \
        });                                                                                                          \
    }                                                                                                                \
    RECORDABLE(NAME)

DEFINE_QUANTIZED_EMBEDDING(quantized_embedding_float32, float)
DEFINE_QUANTIZED_EMBEDDING(quantized_embedding_bfloat16, autodeploy::bf16)
