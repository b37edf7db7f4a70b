// The token some places back in each sequence of a packed row; what stands before new tokens comes from a slot.

#include "sequences.h"

namespace autodeploy {
namespace {

// What stands before a sequence's new tokens, oldest first: `distance` rows, or one row for all of them (`stride` 0), or
// zeros.
template <class T>
struct Before {
    const T* rows;
    int64_t stride;
    void copy(int64_t row, int64_t begin, int64_t count, T* to) const {
        const size_t size = static_cast<size_t>(count) * sizeof(T);
        if (rows == nullptr)
            std::memset(static_cast<void*>(to), 0, size);
        else
            std::memmove(to, rows + row * stride + begin, size);
    }
};

template <class T>
Status shift(const Sequences& q, const int32_t* lengths, Rows<T> x, int64_t distance, const T* start, T* recent, T* out,
             int64_t channels) {
    return for_each_channel_block(q, channels, [&](int64_t s, int64_t begin, int64_t end) {
        const int64_t first = q.borders[s], length = q.borders[s + 1] - first, count = end - begin;
        T* state = recent + q.slots[s] * distance * channels;
        const Before<T> before = lengths[s] == length ? Before<T>{start, 0} : Before<T>{state, channels};
        const auto row = [&](int64_t at, T* to) {  // counted from the oldest before the new tokens
            if (at < distance)
                before.copy(at, begin, count, to);
            else
                std::memcpy(to, x[first + at - distance] + begin, static_cast<size_t>(count) * sizeof(T));
        };
        for (int64_t t = 0; t < length; ++t) row(t, out + (first + t) * channels + begin);
        for (int64_t i = 0; i < distance; ++i) row(length + i, state + i * channels + begin);
    });
}

}  // namespace
}  // namespace autodeploy

// lengths: tokens of each sequence, the new ones included; equal to the new ones where it begins. x: rows of `channels`,
// `x_stride` apart. start: `[channels]` or null for zeros. recent: `[num_slots, distance, channels]`.
#define DEFINE_TOKEN_SHIFT(NAME, T)                                                                                  \
    extern "C" int NAME(SEQUENCES, const int32_t* lengths, const T* x, int64_t x_stride, int64_t distance,           \
                        const T* start, T* recent, T* out, int64_t channels, int threads) {                          \
        return autodeploy::status_of(threads, [&] {                                                                  \
            return autodeploy::shift<T>(GIVEN_SEQUENCES, lengths, {x, x_stride}, distance, start, recent, out,       \
                                        channels);                                                                   \
        });                                                                                                          \
    }                                                                                                                \
    RECORDABLE(NAME)

DEFINE_TOKEN_SHIFT(token_shift_float32, float)
DEFINE_TOKEN_SHIFT(token_shift_bfloat16, autodeploy::bf16)
