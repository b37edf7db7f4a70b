// The sequences of a packed row and the slots of their states: what every kernel of a recurrence is given, and how a team
// shares their work.

#pragma once

#include <cstdint>

#include "simd.h"
#include "team.h"

namespace autodeploy {

enum Status { DONE, BAD_BORDERS, BAD_SLOT };

// The sequences of a packed row and the slots of their states.
struct Sequences {
    const int32_t *borders, *slots;
    int64_t count, num_tokens, num_slots;

    Status check() const {
        if (borders[0] != 0 || borders[count] != num_tokens) return BAD_BORDERS;
        for (int64_t s = 0; s < count; ++s) {
            if (borders[s + 1] < borders[s]) return BAD_BORDERS;
            if (slots[s] < 0 || slots[s] >= num_slots) return BAD_SLOT;
        }
        return DONE;
    }
};

// Rows of elements, `stride` elements apart: one per token.
template <class T>
struct Rows {
    const T* data;
    int64_t stride;
    const T* operator[](int64_t token) const { return data + token * stride; }
};

// Numbers that are float32 or bfloat16, whatever the kernel was compiled for: a model's parameters and step sizes.
struct Numbers {
    const void* data;  // null for none
    bool is_bfloat16;

    bool exist() const { return data != nullptr; }
    float operator[](int64_t i) const {
        return is_bfloat16 ? to_float(static_cast<const bf16*>(data)[i]) : static_cast<const float*>(data)[i];
    }
    Floats load(int64_t i, int64_t count) const {
        return is_bfloat16 ? autodeploy::load(static_cast<const bf16*>(data) + i, count)
                           : autodeploy::load(static_cast<const float*>(data) + i, count);
    }
};

template <class T>
inline void widen(const T* from, float* to, int64_t count) {
    for (int64_t i = 0; i < count; i += LANES) store(to + i, load(from + i, count - i), count - i);
}

// The team shares calls of `body(s, part, begin, end)`: one for every sequence that has new tokens, each of its `parts`,
// and each block of `size` of the part's `width` columns. Returns what is wrong with the sequences, before any call.
template <class Body>
inline Status for_each_block(const Sequences& q, int64_t parts, int64_t width, int64_t size, Body body) {
    const Status status = q.check();
    if (status != DONE) return status;
    const int64_t blocks = (width + size - 1) / size;
#pragma omp for schedule(static)
    for (int64_t item = 0; item < q.count * parts * blocks; ++item) {
        const int64_t s = item / (parts * blocks), begin = item % blocks * size;
        if (q.borders[s] < q.borders[s + 1])
            body(s, item / blocks % parts, begin, begin + size < width ? begin + size : width);
    }
    return DONE;
}

constexpr int64_t CHANNELS = 4 * LANES;

// The same for blocks of channels that have nothing to do with each other: `body(s, begin, end)`.
template <class Body>
inline Status for_each_channel_block(const Sequences& q, int64_t channels, Body body) {
    return for_each_block(q, 1, channels, CHANNELS,
                          [&](int64_t s, int64_t, int64_t begin, int64_t end) { body(s, begin, end); });
}

}  // namespace autodeploy

#define SEQUENCES                                                                                                    \
    const int32_t *borders, const int32_t *slots, int64_t num_sequences, int64_t num_tokens, int64_t num_slots
#define GIVEN_SEQUENCES {borders, slots, num_sequences, num_tokens, num_slots}
