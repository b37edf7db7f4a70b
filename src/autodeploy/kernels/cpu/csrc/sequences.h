// The sequences of a packed row and the slots of their states: what every kernel of a recurrence is given.

#pragma once

#include <cstdint>

#include "simd.h"

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

// Rows of `width` elements, `stride` elements apart: one per token.
template <class T>
struct Rows {
    const T* data;
    int64_t stride;
    const T* operator[](int64_t token) const { return data + token * stride; }
};

template <class T>
inline void widen(const T* from, float* to, int64_t count) {
    for (int64_t i = 0; i < count; i += LANES) store(to + i, load(from + i, count - i), count - i);
}

constexpr int64_t CHANNELS = 4 * LANES;

}  // namespace autodeploy

#define SEQUENCES                                                                                                    \
    const int32_t *borders, const int32_t *slots, int64_t num_sequences, int64_t num_tokens, int64_t num_slots
#define CHECKED_SEQUENCES                                                                                            \
    const autodeploy::Sequences sequences = {borders, slots, num_sequences, num_tokens, num_slots};                  \
    if (const int fault = sequences.check()) return fault
