// Choosing tokens: the most likely one of each row of logits, or one drawn from what temperature, min-p, top-k and top-p
// leave of it. A token's weight is its probability relative to the most likely one's.

#include <cmath>
#include <limits>

#include "simd.h"
#include "team.h"

namespace autodeploy {
namespace {

// How far, times the temperature, below the greatest logit tokens are looked at first; then as much further each time.
constexpr float REACH = 3.5f, LAST_REACH = 40.0f;

struct Parameters {
    const float *temperature, *top_p, *min_p;
    const int64_t *top_k, *keys, *positions;
};

struct Filters {
    int64_t top_k;
    float top_p, min_p;
    bool cuts() const { return top_k > 0 || min_p > 0.0f; }
};

constexpr int64_t BLOCK = 8 * LANES;  // elements that are looked at together

struct Best {
    float value;  // NaN if there is one in the row
    int64_t token;
};

template <class T>
Best best_of(const T* row, int64_t width) {
    Best best = {-std::numeric_limits<float>::infinity(), 0};
    Floats not_numbers = {};
    float odd = 0.0f;
    int64_t best_block = 0;
    for (int64_t block = 0; block < width; block += BLOCK) {
        const int64_t end = block + BLOCK < width ? block + BLOCK : width;
        Floats most = splat(best.value);
        int64_t i = block;
        for (; i + LANES <= end; i += LANES) {
            const Floats x = load(row + i);
            most = select(x > most, x, most);
            not_numbers = not_numbers + select(x == x, splat(0.0f), splat(1.0f));
        }
        float greatest = greatest_lane(most);
        for (; i < end; ++i) {
            const float x = to_float(row[i]);
            greatest = x > greatest ? x : greatest;
            odd += x == x ? 0.0f : 1.0f;
        }
        if (greatest > best.value) best.value = greatest, best_block = block;
    }
    if (sum(not_numbers) + odd > 0.0f) return {std::numeric_limits<float>::quiet_NaN(), 0};
    for (best.token = best_block; to_float(row[best.token]) != best.value;) ++best.token;
    return best;
}

// Whole numbers in the order of bfloat16 numbers: NaN at either end, and -0 below 0.
inline int16_t key_of(bf16 x) {
    const int16_t bits = static_cast<int16_t>(x.bits);
    return bits ^ ((bits >> 15) & 0x7fff);
}

// By comparing whole numbers, twice as many at a time.
Best best_of(const bf16* row, int64_t width) {
    constexpr int64_t KEYS = 512;  // looked at together
    constexpr int16_t INFINITE = 0x7f80, MINUS_INFINITE = static_cast<int16_t>(0xff80 ^ 0x7fff);
    int16_t greatest = std::numeric_limits<int16_t>::min(), least = std::numeric_limits<int16_t>::max();
    int64_t best_block = 0;
    for (int64_t block = 0; block < width; block += KEYS) {
        const int64_t end = block + KEYS < width ? block + KEYS : width;
        int16_t most = std::numeric_limits<int16_t>::min();
        for (int64_t i = block; i < end; ++i) {
            const int16_t key = key_of(row[i]);
            most = key > most ? key : most;
            least = key < least ? key : least;
        }
        if (most > greatest) greatest = most, best_block = block;
    }
    if (greatest > INFINITE || least < MINUS_INFINITE) return {std::numeric_limits<float>::quiet_NaN(), 0};
    const bf16 bits = {static_cast<uint16_t>(greatest ^ ((greatest >> 15) & 0x7fff))};
    const float value = to_float(bits);
    Best best = {value, value == 0.0f ? 0 : best_block};  // 0 is no greater than -0
    while (to_float(row[best.token]) != best.value) ++best.token;
    return best;
}

// Number `position` of the generator `key`, in [0, 1): SplitMix64 (Steele, Lea and Flood, 2014).
double uniform_number(int64_t key, int64_t position) {
    uint64_t bits = static_cast<uint64_t>(key) + static_cast<uint64_t>(position + 1) * 0x9E3779B97F4A7C15u;
    bits = (bits ^ bits >> 30) * 0xBF58476D1CE4E5B9u;
    bits = (bits ^ bits >> 27) * 0x94D049BB133111EBu;
    return static_cast<double>((bits ^ bits >> 31) >> 11) * 0x1p-53;
}

// The sum of the block's weights that are at least `least`.
inline float block_sum(const float* weights, int64_t count, float least) {
    const auto kept = [least](Floats x) { return select(x < least, splat(0.0f), x); };
    Floats total = {};
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) total = total + kept(load(weights + i));
    if (i < count) total = total + kept(load(weights + i, count - i));
    return sum(total);
}

// Added up in float64 between blocks: rounding of a float32 sum over 10^5 tokens is as large as a rare one.
double total_of(const float* weights, int64_t width, float least) {
    double total = 0.0;
    for (int64_t i = 0; i < width; i += BLOCK)
        total += block_sum(weights + i, width - i < BLOCK ? width - i : BLOCK, least);
    return total;
}

int64_t count_of(const float* weights, int64_t width, float least) {
    const int64_t whole = width / LANES * LANES;
    Floats counts = {};
    for (int64_t i = 0; i < whole; i += LANES)
        counts = counts + select(load(weights + i) < least, splat(0.0f), splat(1.0f));
    int64_t count = static_cast<int64_t>(sum(counts));
    for (int64_t i = whole; i < width; ++i) count += !(weights[i] < least);
    return count;
}

// The greatest number from `low` on, for which `holds`, as it does for `low` and does not beyond 1. Numbers from 0 on are
// in the order of their bits.
template <class Condition>
float greatest_where(float low, Condition holds) {
    uint32_t yes = bit_cast<uint32_t>(low), no = bit_cast<uint32_t>(1.0f) + 1;
    while (no - yes > 1) {
        const uint32_t middle = yes + (no - yes) / 2;
        (holds(bit_cast<float>(middle)) ? yes : no) = middle;
    }
    return bit_cast<float>(yes);
}

// The least weight that filters leave. Candidates are all weights from `floor` on. Negative where they do not tell.
float least_of(const float* candidates, int64_t count, float floor, double total, const Filters& filters) {
    const bool is_all = floor == 0.0f;
    float least = filters.min_p;
    if (least > 0.0f && least < floor) return -1.0f;
    if (filters.top_k > 0 && !(least > 0.0f && count_of(candidates, count, least) <= filters.top_k)) {
        const bool reaches = count >= filters.top_k;
        if (!reaches && !is_all) return -1.0f;
        if (reaches)
            least = greatest_where(floor, [&](float x) { return count_of(candidates, count, x) >= filters.top_k; });
    }
    if (filters.top_p >= 1.0f) return least;
    if (filters.cuts()) {
        total = total_of(candidates, count, least);
        // Of equals at the end of top-k, those beyond k are kept but not part of what top-p is a share of.
        const int64_t left = count_of(candidates, count, least);
        if (filters.top_k > 0 && left > filters.top_k) total -= static_cast<double>(left - filters.top_k) * least;
    }
    const double wanted = filters.top_p * total;
    const auto reaches = [&](float x) { return total_of(candidates, count, x) >= wanted; };
    if (!reaches(floor)) return is_all ? least : -1.0f;
    const float enough = greatest_where(floor, reaches);
    return enough > least ? enough : least;
}

// Puts weights from `floor` on side by side; returns how many there are.
int64_t gather(const float* weights, int64_t width, float floor, float* candidates) {
    int64_t count = 0;
    for (int64_t block = 0; block < width; block += BLOCK) {
        const int64_t end = block + BLOCK < width ? block + BLOCK : width;
        Floats most = {};
        for (int64_t i = block; i < end; i += LANES) {
            const Floats x = load(weights + i, end - i);
            most = select(x > most, x, most);
        }
        if (greatest_lane(most) < floor) continue;
        for (int64_t i = block; i < end; ++i) {
            candidates[count] = weights[i];
            count += weights[i] >= floor;
        }
    }
    return count;
}

// `candidates` has room for `width` weights.
float least_weight(const float* weights, int64_t width, const Filters& filters, float* candidates) {
    const double total = filters.cuts() ? 0.0 : total_of(weights, width, 0.0f);
    for (float reach = REACH;; reach += REACH) {
        const float floor = reach > LAST_REACH ? 0.0f : std::exp(-reach);
        const int64_t count = gather(weights, width, floor, candidates);
        const float least = least_of(candidates, count, floor, total, filters);
        if (least >= 0.0f) return least;
    }
}

// The token at which the sum of weights from `least` on, in the order of tokens, passes `number` times all of it.
int64_t invert(const float* weights, int64_t width, float least, double number) {
    const double total = total_of(weights, width, least);
    const double target = std::fmin(number * total, std::nextafter(total, 0.0));
    double sum_before = 0.0;
    int64_t block = 0, last = 0;
    for (;; block += BLOCK) {
        const double here = block_sum(weights + block, width - block < BLOCK ? width - block : BLOCK, least);
        if (sum_before + here > target || block + BLOCK >= width) break;
        sum_before += here;
    }
    for (int64_t i = block; i < width && i < block + BLOCK; ++i) {
        if (weights[i] < least || weights[i] == 0.0f) continue;
        sum_before += weights[i];
        last = i;
        if (sum_before > target) break;
    }
    return last;  // of equal sums in another order, the last one may stay just below
}

template <class T>
int64_t draw(const T* row, int64_t width, float best, float temperature, const Filters& filters, double number) {
    float* weights = own_memory<float>(2 * width + LANES);
    const float inverse = 1.0f / temperature;
    for (int64_t i = 0; i < width; i += LANES)
        store(weights + i, exp_below_one((load(row + i, width - i) - best) * inverse), width - i);
    float least = 0.0f;
    if (filters.cuts() || filters.top_p < 1.0f) least = least_weight(weights, width, filters, weights + width);
    return invert(weights, width, least, number);
}

template <class T>
void choose(const T* logits, const Parameters& p, int64_t* tokens, float* best, int64_t num_rows, int64_t width) {
#pragma omp for schedule(dynamic)
    for (int64_t r = 0; r < num_rows; ++r) {
        const T* row = logits + r * width;
        const Best found = best_of(row, width);
        best[r] = found.value, tokens[r] = found.token;
        if (p.temperature == nullptr || !(p.temperature[r] > 0.0f) || !std::isfinite(found.value)) continue;
        Filters filters = {0, 1.0f, 0.0f};
        if (p.top_k != nullptr) filters = {p.top_k[r], p.top_p[r], p.min_p[r]};
        const double number = uniform_number(p.keys[r], p.positions[r]);
        tokens[r] = draw(row, width, best[r], p.temperature[r], filters, number);
    }
}

}  // namespace
}  // namespace autodeploy

// logits: `[num_rows, width]`. temperature (0 for the most likely token, null for it everywhere), top_k, top_p, min_p (all
// or none null), keys, positions: `[num_rows]`. tokens, best: `[num_rows]`. All contiguous.
#define DEFINE_CHOOSE_TOKENS(NAME, T)                                                                                \
    extern "C" void NAME(const T* logits, const float* temperature, const int64_t* top_k, const float* top_p,        \
                         const float* min_p, const int64_t* keys, const int64_t* positions, int64_t* tokens,         \
                         float* best, int64_t num_rows, int64_t width, int threads) {                                \
        const autodeploy::Parameters parameters = {temperature, top_p, min_p, top_k, keys, positions};               \
        autodeploy::with_team(                                                                                       \
            threads, [&] { autodeploy::choose<T>(logits, parameters, tokens, best, num_rows, width); });             \
    }                                                                                                                \
    RECORDABLE(NAME)

DEFINE_CHOOSE_TOKENS(choose_tokens_float32, float)
DEFINE_CHOOSE_TOKENS(choose_tokens_bfloat16, autodeploy::bf16)
