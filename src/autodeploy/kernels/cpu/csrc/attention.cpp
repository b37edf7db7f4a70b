// Attention over a paged key-value cache: `attention_pieces.h` for sequences that bring few new tokens,
// `attention_blocks.h` for those that bring many.

#include "attention_blocks.h"
#include "attention_pieces.h"

namespace autodeploy {
namespace {

template <class T>
Status write_cache(const Call<T>& c) {
    const int64_t capacity = c.num_pages * c.page_size;
    for (int64_t token = 0; token < c.num_tokens; ++token)
        if (c.slot_mapping[token] < 0 || c.slot_mapping[token] >= capacity) return BAD_SLOT;
#pragma omp for schedule(static)
    for (int64_t token = 0; token < c.num_tokens; ++token) {
        for (int64_t head = 0; head < c.num_kv_heads; ++head) {
            const int64_t entry = c.slot_mapping[token] * c.num_kv_heads + head;
            std::memcpy(c.key_cache + entry * c.head_dim,
                        c.key + token * c.key_token_stride + head * c.key_head_stride,
                        static_cast<size_t>(c.head_dim) * sizeof(T));
            std::memcpy(c.value_cache + entry * c.value_dim,
                        c.value + token * c.value_token_stride + head * c.value_head_stride,
                        static_cast<size_t>(c.value_dim) * sizeof(T));
        }
    }
    return DONE;
}

template <class T>
Status cached_attention(const Call<T>& call) {
    Status status = write_cache(call);
    if (status == DONE) status = attend_all(call);
    for (int64_t s = 0; s < call.num_sequences && status == DONE; ++s)
        if (call.cu_seqlens[s + 1] - call.cu_seqlens[s] > call.few) status = attend_blocks(call, s);
    return status;
}

}  // namespace
}  // namespace autodeploy

// Writes every new token's key and value to its slot, then attends. Shapes as in the op; query, key and value have
// strides in elements for tokens and heads, the last 1; everything else is contiguous. sinks: `[num_heads]` where
// `sinks_stride` is 0, else `[num_tokens, num_heads]`, or null. window, chunk and softcap are 0 when there is none.
// slopes: `[num_heads]` or null. distance_logits: `[num_tokens, num_heads, num_distances]` or null. few: new tokens of a
// sequence up to which they are attended one by one; all have to be where sinks depend on the token or scores on
// distance. Returns 0, or what was wrong by its number in `Status`.
#define DEFINE_CACHED_ATTENTION(NAME, T)                                                                             \
    extern "C" int NAME(                                                                                             \
        const T* query, int64_t query_token_stride, int64_t query_head_stride, const T* key,                         \
        int64_t key_token_stride, int64_t key_head_stride, const T* value, int64_t value_token_stride,               \
        int64_t value_head_stride, const int32_t* cu_seqlens, const int32_t* seq_lens, int64_t num_sequences,        \
        const int32_t* page_table, int64_t page_table_width, const int64_t* slot_mapping, T* key_cache,              \
        T* value_cache, int64_t num_pages, int64_t page_size, int64_t num_tokens, int64_t num_heads,                 \
        int64_t num_kv_heads, int64_t head_dim, int64_t value_dim, const float* sinks, int64_t sinks_stride,         \
        float scale, int causal, int64_t window, int64_t chunk, float softcap, const float* slopes,                  \
        const T* distance_logits, int64_t num_distances, int64_t few, T* out, int threads) {                         \
        const autodeploy::Call<T> call = {                                                                           \
            query, key, value, query_token_stride, query_head_stride, key_token_stride, key_head_stride,             \
            value_token_stride, value_head_stride, cu_seqlens, seq_lens, page_table, page_table_width, slot_mapping, \
            key_cache, value_cache, num_pages, page_size, num_sequences, num_tokens, num_heads, num_kv_heads,        \
            head_dim, value_dim, sinks, scale, causal != 0, window, chunk, softcap, out, few, value_dim,             \
            sinks_stride, slopes, distance_logits, num_distances};                                                   \
        if (threads > 1 && !autodeploy::is_large(call)) threads = 1;                                                 \
        return autodeploy::status_of(threads, [&] { return autodeploy::cached_attention(call); });                   \
    }                                                                                                                \
    RECORDABLE(NAME)

DEFINE_CACHED_ATTENTION(cached_attention_float32, float)
DEFINE_CACHED_ATTENTION(cached_attention_bfloat16, autodeploy::bf16)
