// AMX's tiles in ordinary memory, for machines without them: what csrc/amx.h asks of the processor, as the manual
// describes it (Intel 64 and IA-32 Architectures Software Developer's Manual, TDPBF16PS). Misuse ends the process, as it
// would there. With -DEMULATED_AMX_REFUSED the operating system refuses.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#define __AMX_TILE__ 1
#define __AMX_BF16__ 1
#define AUTODEPLOY_AMX_INSTRUCTIONS EmulatedAmx

struct EmulatedAmx {
    struct Tiles {
        bool are_configured = false;
        alignas(64) char bytes[8][16][64] = {};
    };

    static Tiles& mine() {
        static thread_local Tiles tiles;
        return tiles;
    }

    static void require(bool holds, const char* what) {
        if (holds) return;
        std::fprintf(stderr, "emulated AMX: %s\n", what);
        std::abort();
    }

    static auto& tile(int number) {
        require(mine().are_configured, "a tile is used before tiles are configured, or after their release");
        return mine().bytes[number];
    }

    static bool ask_permission() {
#if defined(EMULATED_AMX_REFUSED)
        return false;
#else
        return true;
#endif
    }

    // Palette 1 with all rows and bytes is the one configuration that is emulated.
    template <class Shapes>
    static void configure(const Shapes& shapes) {
        unsigned char expected[64] = {1}, found[64];
        for (int t = 0; t < 8; ++t) expected[16 + 2 * t] = 64, expected[48 + t] = 16;
        static_assert(sizeof(shapes) == sizeof(found), "a configuration has 64 bytes");
        std::memcpy(found, &shapes, sizeof(found));
        require(std::memcmp(found, expected, sizeof(found)) == 0, "another configuration than eight whole tiles");
        require(!mine().are_configured, "tiles are configured where they are in use");
        mine() = Tiles{true, {}};
    }

    static void release() { mine().are_configured = false; }

    template <int TILE>
    static void zero() {
        std::memset(tile(TILE), 0, sizeof(tile(TILE)));
    }

    template <int TILE>
    static void load(const void* from, int64_t stride) {
        for (int r = 0; r < 16; ++r) std::memcpy(tile(TILE)[r], static_cast<const char*>(from) + r * stride, 64);
    }

    template <int TILE>
    static void store(void* to, int64_t stride) {
        for (int r = 0; r < 16; ++r) std::memcpy(static_cast<char*>(to) + r * stride, tile(TILE)[r], 64);
    }

    // Subnormal numbers count as zero, going in and coming out.
    static float flushed(float x) { return std::fabs(x) < 0x1p-126f ? std::copysign(0.0f, x) : x; }

    static float number(const char* row, int64_t index) {
        uint16_t half;
        std::memcpy(&half, row + 2 * index, sizeof(half));
        const uint32_t bits = static_cast<uint32_t>(half) << 16;
        float x;
        std::memcpy(&x, &bits, sizeof(x));
        return flushed(x);
    }

    // Even and odd inputs are summed by themselves, then both are added to what was there.
    template <int SUMS, int ROWS, int PAIRS>
    static void multiply_add() {
        for (int m = 0; m < 16; ++m) {
            float parts[32] = {};
            for (int k = 0; k < 16; ++k)
                for (int n = 0; n < 32; ++n)
                    parts[n] = flushed(std::fma(number(tile(ROWS)[m], 2 * k + n % 2), number(tile(PAIRS)[k], n), parts[n]));
            for (int n = 0; n < 16; ++n) {
                float sum;
                std::memcpy(&sum, tile(SUMS)[m] + 4 * n, sizeof(sum));
                sum = flushed(flushed(sum) + flushed(parts[2 * n] + parts[2 * n + 1]));
                std::memcpy(tile(SUMS)[m] + 4 * n, &sum, sizeof(sum));
            }
        }
    }
};
