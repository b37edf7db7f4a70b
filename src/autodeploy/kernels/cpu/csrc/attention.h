// What the two ways to attend over a paged cache share: the call, and which positions a query may see.

#pragma once

#include "simd.h"
#include "team.h"

namespace autodeploy {

enum Status { DONE, OUT_OF_MEMORY, BAD_SLOT, BAD_PAGE, BAD_BORDERS };

template <class T>
struct Call {
    const T *query, *key, *value;
    int64_t query_token_stride, query_head_stride, key_token_stride, key_head_stride, value_token_stride,
        value_head_stride;
    const int32_t *cu_seqlens, *seq_lens, *page_table;
    int64_t page_table_width;
    const int64_t* slot_mapping;
    T *key_cache, *value_cache;
    int64_t num_pages, page_size, num_sequences, num_tokens, num_heads, num_kv_heads, head_dim, value_dim;
    const float* sinks;
    float scale;
    bool causal;
    int64_t window, chunk;
    float softcap;
    T* out;
    int64_t few;           // new tokens of a sequence up to which they are attended one by one
    int64_t value_stride;  // elements from one kept value to the next
    int64_t sinks_stride;  // 0 for one sink per head, else from one token's to the next's
    const float* slopes;
    const T* distance_logits;
    int64_t num_distances;
};

// Positions that the query at `position` of a sequence of `length` tokens may see: `[begin, end)`.
struct Range {
    int64_t begin, end;
};

template <class T>
inline Range visible(const Call<T>& c, int64_t position, int64_t length) {
    Range range = {0, c.causal ? position + 1 : length};
    if (c.window > 0 && position - c.window + 1 > range.begin) range.begin = position - c.window + 1;
    if (c.chunk > 0) {
        const int64_t chunk_begin = position / c.chunk * c.chunk;
        if (chunk_begin > range.begin) range.begin = chunk_begin;
        if (chunk_begin + c.chunk < range.end) range.end = chunk_begin + c.chunk;
    }
    return range;
}

}  // namespace autodeploy
