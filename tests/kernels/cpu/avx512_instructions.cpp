// Each AVX-512 instruction that the kernels name, as a function of arrays: `[16]` numbers of 32 bits, `[32]` of 16.

#include <immintrin.h>

#include <cstdint>
#include <cstring>

template <class V>
static V load(const void* from) {
    V x;
    std::memcpy(&x, from, sizeof(x));
    return x;
}

template <class V>
static void store(void* to, V x) {
    std::memcpy(to, &x, sizeof(x));
}

extern "C" {
void reduce_add_ps(const void* x, float* out) { *out = _mm512_reduce_add_ps(load<__m512>(x)); }
void reduce_max_ps(const void* x, float* out) { *out = _mm512_reduce_max_ps(load<__m512>(x)); }
void reduce_add_epi32(const void* x, int32_t* out) { *out = _mm512_reduce_add_epi32(load<__m512i>(x)); }
void reduce_max_epi32(const void* x, int32_t* out) { *out = _mm512_reduce_max_epi32(load<__m512i>(x)); }
void cvtps_epi32(const void* x, void* out) { store(out, _mm512_cvtps_epi32(load<__m512>(x))); }
void cvtph_ps(const void* x, void* out) { store(out, _mm512_cvtph_ps(load<__m256i>(x))); }
void cvtepi32_epi16(const void* x, void* out) { store(out, _mm512_cvtepi32_epi16(load<__m512i>(x))); }
void halves(const void* x, void* out) {
    store(out, _mm512_castps512_ps256(load<__m512>(x)));
    store(static_cast<char*>(out) + 32, _mm512_extractf64x4_pd(load<__m512d>(x), 1));
}
void dpbusd(const void* total, const void* bytes, const void* numbers, void* out) {
    store(out, _mm512_dpbusd_epi32(load<__m512i>(total), load<__m512i>(bytes), load<__m512i>(numbers)));
}
void dpbf16(const void* total, const void* a, const void* b, void* out) {
    store(out, _mm512_dpbf16_ps(load<__m512>(total), load<__m512bh>(a), load<__m512bh>(b)));
}
void cvtepu16_epi32(const void* x, void* out) { store(out, _mm512_cvtepu16_epi32(load<__m256i>(x))); }
void set1_epi32(const int32_t* x, void* out) { store(out, _mm512_set1_epi32(*x)); }
void set1_epi16(const int16_t* x, void* out) { store(out, _mm512_set1_epi16(*x)); }
void set1_epi8(const int8_t* x, void* out) { store(out, _mm512_set1_epi8(*x)); }
void srli_epi16(const void* x, void* out) { store(out, _mm512_srli_epi16(load<__m512i>(x), 4)); }
void add_epi16(const void* a, const void* b, void* out) {
    store(out, _mm512_add_epi16(load<__m512i>(a), load<__m512i>(b)));
}
void add_epi32(const void* a, const void* b, void* out) {
    store(out, _mm512_add_epi32(load<__m512i>(a), load<__m512i>(b)));
}
void madd_epi16(const void* a, const void* b, void* out) {
    store(out, _mm512_madd_epi16(load<__m512i>(a), load<__m512i>(b)));
}
void maddubs_epi16(const void* a, const void* b, void* out) {
    store(out, _mm512_maddubs_epi16(load<__m512i>(a), load<__m512i>(b)));
}
}
