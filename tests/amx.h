// AMX in plain code, for tests on a machine without it: included ahead of kernels.cpp, whose way through the tile
// registers then runs on arrays. What it lacks: time, and what the processor does to a wrong configuration.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <immintrin.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <type_traits>
#include <unistd.h>
#include <vector>

struct Registers {
    alignas(64) uint8_t at[8][16][64];
};
static thread_local Registers registers;

static inline void load_register(int t, const void *from, long stride) {
    for (int r = 0; r < 16; r++) memcpy(registers.at[t][r], (const char *)from + r * stride, 64);
}
static inline void store_register(int t, void *to, long stride) {
    for (int r = 0; r < 16; r++) memcpy((char *)to + r * stride, registers.at[t][r], 64);
}
static inline float without_subnormals(uint16_t bits) { // a bfloat16, as the product reads it
    uint32_t u = (uint32_t)bits << 16;
    if (!(u & 0x7f800000)) u &= 0x80000000;
    float f;
    memcpy(&f, &u, 4);
    return f;
}
template <class S, class M, int PER, class F> static inline void multiply_registers(int c, int a, int b, F as) {
    for (int m = 0; m < 16; m++)
        for (int k = 0; k < 16; k++)
            for (int n = 0; n < 16; n++)
                for (int i = 0; i < PER; i++) {
                    M x, y;
                    S sum;
                    memcpy(&x, &registers.at[a][m][4 * k + i * sizeof(M)], sizeof(M));
                    memcpy(&y, &registers.at[b][k][4 * n + i * sizeof(M)], sizeof(M));
                    memcpy(&sum, &registers.at[c][m][4 * n], 4);
                    sum += as(x) * as(y);
                    memcpy(&registers.at[c][m][4 * n], &sum, 4);
                }
}

#undef _tile_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbf16ps
#undef _tile_dpbssd
#undef _tile_release
#define _tile_loadd(t, p, stride) load_register(t, p, stride)
#define _tile_stored(t, p, stride) store_register(t, p, stride)
#define _tile_zero(t) memset(registers.at[t], 0, TILE)
#define _tile_dpbf16ps(c, a, b) multiply_registers<float, uint16_t, 2>(c, a, b, without_subnormals)
#define _tile_dpbssd(c, a, b) multiply_registers<int32_t, int8_t, 4>(c, a, b, [](int8_t x) { return (int32_t)x; })
#define _tile_release() memset(&registers, 0xff, sizeof registers)

#define __AMX_TILE__ 1
#define __AMX_BF16__ 1
#define __AMX_INT8__ 1
// The kernel grants the registers; threads still wait for each other.
#define syscall(number, ...) ((number) == SYS_arch_prctl ? 0L : (syscall)(number, __VA_ARGS__))
#define asm            // and the configuration is there
#define volatile(...)
