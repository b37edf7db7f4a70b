// Choosing tokens: the most likely one of each row of logits, or one drawn from what temperature, min-p, top-k and top-p
// leave of it. A token's weight is its probability relative to the most likely one's.
//
// A row is read once for its greatest logit, which notes those of its blocks, and once more for the sum of all weights,
// where that matters: not with top-k or min-p. What filters leave is looked for among likely tokens, gathered from the
// blocks that have any.

#include <cmath>
#include <limits>

#include "simd.h"
#include "team.h"

namespace autodeploy {
namespace {

constexpr int64_t BLOCK = 512;  // elements that are looked at together, a multiple of LANES
constexpr float INFINITE = std::numeric_limits<float>::infinity(), LOG2_E = 1.44269504f;

// How often weights halve down to those that are looked at first, where nothing tells; by how much further each time; and
// down to where all are looked at.
constexpr float REACH = 10.0f, FURTHER = 5.0f, LAST_REACH = 60.0f;

struct Parameters {
    const float *temperature, *top_p, *min_p;
    const int64_t *top_k, *keys, *positions;
};

struct Filters {
    int64_t top_k;
    float top_p, min_p;
    bool cuts() const { return top_k > 0 || min_p > 0.0f; }
};

struct Best {
    float value;  // NaN if there is one in the row
    int64_t token;
};

inline int64_t block_end(int64_t block, int64_t width) { return block + BLOCK < width ? block + BLOCK : width; }

// The greatest of some elements. Adds to `odd` if one is NaN.
float greatest_of(const float* from, int64_t count, float& odd) {
    Floats most = splat(-INFINITE), not_numbers = {};
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) {
        const Floats x = load(from + i);
        most = select(x > most, x, most);
        not_numbers = not_numbers + select(x == x, splat(0.0f), splat(1.0f));
    }
    float greatest = greatest_lane(most);
    odd += sum(not_numbers);
    for (; i < count; ++i) {
        greatest = from[i] > greatest ? from[i] : greatest;
        odd += from[i] == from[i] ? 0.0f : 1.0f;
    }
    return greatest;
}

// By comparing bits as whole numbers, twice as many at a time. Those of numbers without a sign are in the order of the
// numbers, with NaN above infinity; those of numbers with one are below them, and in reverse order. By itself, as compilers
// make slower loops of it within others.
__attribute__((noinline)) float greatest_of(const bf16* from, int64_t count, float& odd) {
    constexpr int16_t INFINITE_BITS = 0x7f80;
    constexpr uint16_t MINUS_INFINITE_BITS = 0xff80;
    int16_t most = std::numeric_limits<int16_t>::min();
    uint16_t largest = 0;
    for (int64_t i = 0; i < count; ++i) {
        const int16_t bits = static_cast<int16_t>(from[i].bits);
        most = bits > most ? bits : most;
        largest = from[i].bits > largest ? from[i].bits : largest;
    }
    if (most > INFINITE_BITS || largest > MINUS_INFINITE_BITS) odd += 1.0f;
    if (most < 0) {  // all have a sign
        most = 0;
        for (int64_t i = 0; i < count; ++i) {
            const int16_t bits = static_cast<int16_t>(from[i].bits);
            most = bits < most ? bits : most;
        }
    }
    return to_float(bf16{static_cast<uint16_t>(most)});
}

// Puts the greatest of each block into `most`.
template <class T>
Best best_of(const T* row, int64_t width, float* most) {
    Best best = {-INFINITE, 0};
    float odd = 0.0f;
    int64_t best_block = 0;
    for (int64_t block = 0; block < width; block += BLOCK) {
        const float greatest = greatest_of(row + block, block_end(block, width) - block, odd);
        most[block / BLOCK] = greatest;
        if (greatest > best.value) best.value = greatest, best_block = block;
    }
    if (odd > 0.0f) return {std::numeric_limits<float>::quiet_NaN(), 0};
    for (best.token = best_block; to_float(row[best.token]) != best.value;) ++best.token;
    return best;
}

// Number `position` of the generator `key`, in [0, 1): SplitMix64 (Steele, Lea and Flood, 2014).
double uniform_number(int64_t key, int64_t position) {
    uint64_t bits = static_cast<uint64_t>(key) + static_cast<uint64_t>(position + 1) * 0x9E3779B97F4A7C15u;
    bits = (bits ^ bits >> 30) * 0xBF58476D1CE4E5B9u;
    bits = (bits ^ bits >> 27) * 0x94D049BB133111EBu;
    return static_cast<double>((bits ^ bits >> 31) >> 11) * 0x1p-53;
}

// A row of logits, and what it takes to weigh them.
template <class T>
struct Row {
    const T* logits;
    int64_t width;
    const float* most;  // the greatest logit of each block
    float best, scale;

    Floats weights(Floats x) const { return exp2_below_one((x - best) * scale); }

    // Puts the weights of logits side by side, maybe in the place of the logits.
    template <class X>
    void weigh(const X* from, int64_t count, float* to) const {
        for (int64_t i = 0; i < count; i += LANES) store(to + i, weights(load(from + i, count - i)), count - i);
    }
};

// Where the sum of weights from `least` on, in their order, passes `target`, with `sum_before` before them.
inline int64_t first_beyond(const float* weights, int64_t count, float least, double sum_before, double target) {
    int64_t last = 0;
    for (int64_t i = 0; i < count; ++i) {
        if (weights[i] < least || weights[i] == 0.0f) continue;
        sum_before += weights[i];
        last = i;
        if (sum_before > target) break;
    }
    return last;  // of equal sums in another order, the last one may stay just below
}

inline double target_of(double number, double total) { return std::fmin(number * total, std::nextafter(total, 0.0)); }

// The sum of all weights up to the end of each block. Added up in float64 between blocks: rounding of a float32 sum over
// 10^5 tokens is as large as a rare one.
template <class T>
double add_up(const Row<T>& row, double* sums) {
    double total = 0.0;
    for (int64_t block = 0; block < row.width; block += BLOCK) {
        const int64_t end = block_end(block, row.width), whole = end - (end - block) % LANES;
        Floats here = {};
        for (int64_t i = block; i < whole; i += LANES) here = here + row.weights(load(row.logits + i));
        if (whole < end) {
            float last[LANES] = {};
            row.weigh(row.logits + whole, end - whole, last);
            here = here + load(last);
        }
        sums[block / BLOCK] = total += sum(here);
    }
    return total;
}

// A token of all, at `number` of their weights' sum.
template <class T>
int64_t draw_from_all(const Row<T>& row, double number) {
    double* sums = own_memory<double>((row.width + BLOCK - 1) / BLOCK);
    const double target = target_of(number, add_up(row, sums));
    int64_t b = 0;
    while (sums[b] <= target) ++b;
    const int64_t block = b * BLOCK, count = block_end(block, row.width) - block;
    float weights[BLOCK];
    row.weigh(row.logits + block, count, weights);
    return block + first_beyond(weights, count, 0.0f, b == 0 ? 0.0 : sums[b - 1], target);
}

// The likely tokens of a row, in their order: all whose weights are at least `floor`.
struct Candidates {
    float* weights;  // `count`, and LANES of -1 behind them
    int32_t* tokens;  // `count`, and room for 4
    int64_t count;
    float floor;
};

void set_end(Candidates& candidates, int64_t count) {
    candidates.count = count;
    store(candidates.weights + count, splat(-1.0f));
}

// A bit for each of up to 64 logits that is at least `least`.
template <class T>
inline uint64_t likely_ones(const T* from, int64_t count, float least) {
    uint64_t found = 0;
    for (int64_t i = 0; i < 64 && i < count; i += LANES)
        found |= static_cast<uint64_t>(~lanes_where(load(from + i, count - i) < least) & ((1u << LANES) - 1)) << i;
    return count < 64 ? found & ((uint64_t{1} << count) - 1) : found;
}

// Those with logits from `least` on.
template <class T>
void gather(const Row<T>& row, float least, Candidates& to) {
    int64_t count = 0;
    for (int64_t block = 0; block < row.width; block += BLOCK) {
        if (row.most[block / BLOCK] < least) continue;
        const int64_t end = block_end(block, row.width);
        for (int64_t i = block; i < end; i += 64) {
            uint64_t found = likely_ones(row.logits + i, end - i, least);
            const int64_t next = count + __builtin_popcountll(found);
            do {  // four at a time, though few are found, as how many is what a processor cannot foresee
                for (int at = 0; at < 4; ++at, found &= found - 1)
                    to.tokens[count + at] = static_cast<int32_t>(i + __builtin_ctzll(found | uint64_t{1} << 63));
                count += 4;
            } while (count < next);
            count = next;
        }
    }
    for (int64_t i = 0; i < count; ++i) to.weights[i] = to_float(row.logits[to.tokens[i]]);
    row.weigh(to.weights, count, to.weights);
    set_end(to, count);
}

// Of the candidates, those whose weights are at least some number.
struct Part {
    int64_t count;
    double total;
    float least, greatest_below;  // of their weights, and of the others; infinite, and -1, without any
};

Part part_from(const Candidates& candidates, float from) {
    Part part = {0, 0.0};
    Floats least = splat(INFINITE), below = splat(-1.0f);
    for (int64_t block = 0; block < candidates.count; block += BLOCK) {
        const int64_t end = block_end(block, candidates.count);
        Floats total = {}, count = {};
        for (int64_t i = block; i < end; i += LANES) {
            const Floats x = load(candidates.weights + i);
            const auto is_below = x < from;
            const Floats kept = select(is_below, splat(INFINITE), x), other = select(is_below, x, splat(-1.0f));
            least = select(kept < least, kept, least);
            below = select(other > below, other, below);
            total = total + select(is_below, splat(0.0f), x);
            count = count + select(is_below, splat(0.0f), splat(1.0f));
        }
        part.total += sum(total);
        part.count += static_cast<int64_t>(sum(count));
    }
    part.least = 0.0f - greatest_lane(0.0f - least);  // no -0, whose bits are in no order
    part.greatest_below = greatest_lane(below);
    return part;
}

// The smallest part that `suffices`, as `part` does. Numbers from 0 on are in the order of their bits, so the least weight
// of what is looked for is found by halves.
template <class Condition>
Part smallest_part(const Candidates& candidates, Part part, Condition suffices) {
    uint32_t low = bit_cast<uint32_t>(part.least), high = bit_cast<uint32_t>(1.0f);
    while (low < high) {
        const uint32_t middle = high - (high - low) / 2;
        const Part found = part_from(candidates, bit_cast<float>(middle));
        if (suffices(found))
            part = found, low = bit_cast<uint32_t>(found.least);
        else
            high = bit_cast<uint32_t>(found.greatest_below);
    }
    return part;
}

// The least weight that filters leave; negative where the candidates do not tell.
float least_of(const Candidates& candidates, double total, const Filters& filters) {
    Part left = part_from(candidates, std::fmax(filters.min_p, candidates.floor));
    bool is_known = filters.min_p >= candidates.floor;
    if (filters.top_k > 0 && left.count >= filters.top_k) {
        left = smallest_part(candidates, left, [&](const Part& part) { return part.count >= filters.top_k; });
        is_known = true;
    }
    if (filters.cuts()) {
        if (!is_known) return -1.0f;
        total = left.total;
        // Of equals at the end of top-k, those beyond k are kept but not part of what top-p is a share of.
        if (filters.top_k > 0 && left.count > filters.top_k)
            total -= static_cast<double>(left.count - filters.top_k) * left.least;
    }
    if (filters.top_p >= 1.0f) return left.least;
    const auto suffices = [wanted = filters.top_p * total](const Part& part) { return part.total >= wanted; };
    if (!suffices(left)) return candidates.floor > 0.0f ? -1.0f : left.least;
    return smallest_part(candidates, left, suffices).least;
}

// How often weights halve down to what filters may leave. Below the greatest logits of k blocks there is nothing for top-k.
template <class T>
float reach_of(const Row<T>& row, const Filters& filters, Candidates blocks) {
    const int64_t num_blocks = (row.width + BLOCK - 1) / BLOCK;
    float floor = filters.min_p;
    if (filters.top_k > 0 && filters.top_k <= num_blocks) {
        row.weigh(row.most, num_blocks, blocks.weights);
        set_end(blocks, num_blocks);
        const auto suffices = [&](const Part& part) { return part.count >= filters.top_k; };
        floor = std::fmax(floor, smallest_part(blocks, part_from(blocks, 0.0f), suffices).least);
    }
    return floor > 0.0f ? -std::log2(floor) : REACH;
}

// A token of those that filters leave. There is room for candidates as many as the row has tokens.
template <class T>
int64_t draw(const Row<T>& row, const Filters& filters, double number, Candidates candidates) {
    const double total = filters.cuts() ? 0.0 : add_up(row, own_memory<double>((row.width + BLOCK - 1) / BLOCK));
    for (float reach = reach_of(row, filters, candidates);; reach += FURTHER) {
        const bool is_all = reach > LAST_REACH;
        gather(row, is_all ? -INFINITE : row.best - (reach + 0.001f) / row.scale, candidates);
        candidates.floor = is_all ? 0.0f : std::exp2(-reach) * 0.9999f;  // between the two, however weights are rounded
        const float least = least_of(candidates, total, filters);
        if (least < 0.0f) continue;
        const double target = target_of(number, part_from(candidates, least).total);
        return candidates.tokens[first_beyond(candidates.weights, candidates.count, least, 0.0, target)];
    }
}

template <class T>
void choose(const T* logits, const Parameters& p, int64_t* tokens, float* best, int64_t num_rows, int64_t width) {
    float* most = own_memory<float>((width + BLOCK - 1) / BLOCK + width + LANES);
    const Candidates candidates = {most + (width + BLOCK - 1) / BLOCK, own_memory<int32_t>(width + 4)};
#pragma omp for schedule(dynamic)
    for (int64_t r = 0; r < num_rows; ++r) {
        const Best found = best_of(logits + r * width, width, most);
        best[r] = found.value, tokens[r] = found.token;
        if (p.temperature == nullptr || !(p.temperature[r] > 0.0f) || !std::isfinite(found.value)) continue;
        Filters filters = {0, 1.0f, 0.0f};
        if (p.top_k != nullptr) filters = {p.top_k[r], p.top_p[r], p.min_p[r]};
        const double number = uniform_number(p.keys[r], p.positions[r]);
        const Row<T> row = {logits + r * width, width, most, found.value, LOG2_E / p.temperature[r]};
        const bool is_filtered = filters.cuts() || filters.top_p < 1.0f;
        tokens[r] = is_filtered ? draw(row, filters, number, candidates) : draw_from_all(row, number);
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
