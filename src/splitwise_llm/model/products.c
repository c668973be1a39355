/* Products of low-bit weights with a few rows, for processors with AVX-512 VNNI and VBMI; see compiled.py.
 *
 * A row of activations becomes 16 bits a number, in two bytes, each a half of the number, plus 128 where it must not be
 * negative. Products of bytes are summed exactly, and all that is rounded is rounded row by row: a row has the same bits
 * whatever rows are beside it. Weights lie as torch and oneDNN have packed them, in blocks of 64 outputs. */

#include <stdint.h>

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>

#define FAST __attribute__((target("avx512f,avx512bw,avx512vbmi,avx512vnni")))
#define INLINE FAST static inline __attribute__((always_inline))

int can_multiply(void)
{
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw")
        && __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vnni");
}

INLINE __mmask16 within(long at, long count)
{
    return at + 16 <= count ? 0xffff : at < count ? (__mmask16)((1u << (count - at)) - 1) : 0;
}

/* x (rows, columns) to low and high bytes (rows, padded) each, per_unit (rows), and the sums of 32 numbers each,
 * sums (rows, padded / 32). `padded` is a multiple of 32; numbers there are zeros. Where `is_signed`, a byte is the
 * half itself. */
FAST void halves_of(const float *x, long rows, long columns, long padded, uint8_t *low, uint8_t *high,
                    float *per_unit, float *sums, int is_signed)
{
    const __m512i flip = _mm512_set1_epi32(is_signed ? 0x8080 : 0);
    const __m512 shift = _mm512_set1_ps(8388608.0f + 128 * 257);
    const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
    for (long row = 0; row < rows; row++, x += columns) {
        __m512i largest = _mm512_setzero_si512(); /* as bits, of which those of a NaN are the largest */
        for (long at = 0; at < columns; at += 16) {
            __m512i bits = _mm512_maskz_loadu_epi32(within(at, columns), x + at);
            largest = _mm512_max_epu32(largest, _mm512_and_si512(bits, magnitude));
        }
        union { uint32_t bits; float value; } most = {_mm512_reduce_max_epu32(largest)};
        per_unit[row] = 32512.0f / most.value;
        const __m512 unit = _mm512_set1_ps(per_unit[row]);
        for (long at = 0; at < padded; at += 32) {
            __m512i sum = _mm512_setzero_si512();
            for (long next = at; next < at + 32; next += 16) {
                __mmask16 mask = within(next, columns);
                __m512 wide = _mm512_maskz_loadu_ps(mask, x + next);
                __m512i shifted = _mm512_castps_si512(_mm512_mask3_fmadd_ps(wide, unit, shift, mask));
                sum = _mm512_add_epi32(sum, _mm512_and_si512(shifted, _mm512_set1_epi32(0xffff)));
                shifted = _mm512_xor_si512(shifted, flip);
                _mm_storeu_si128((void *)low, _mm512_cvtepi32_epi8(shifted)), low += 16;
                _mm_storeu_si128((void *)high, _mm512_cvtepi32_epi8(_mm512_srli_epi32(shifted, 8))), high += 16;
            }
            *sums++ = (float)(_mm512_reduce_add_epi32(sum) - 32 * 128 * 257);
        }
    }
}

/* The sum of each output's weights, of oneDNN's blocks (blocks, columns / 4, 64, 4). */
FAST void int8_sums(const int8_t *weights, long columns, long blocks, int32_t *sums)
{
    for (long block = 0; block < blocks; block++, sums += 64) {
        for (int part = 0; part < 4; part++)
            _mm512_storeu_si512(sums + 16 * part, _mm512_setzero_si512());
        for (long at = 0; at < columns; at += 4, weights += 256)
            for (int part = 0; part < 4; part++) {
                __m512i four = _mm512_loadu_si512(weights + 64 * part), sum = _mm512_loadu_si512(sums + 16 * part);
                _mm512_storeu_si512(sums + 16 * part, _mm512_dpbusd_epi32(sum, _mm512_set1_epi8(1), four));
            }
    }
}

INLINE __m512i four_of(const uint8_t *bytes)
{
    return _mm512_set1_epi32(*(const int32_t *)bytes);
}

INLINE void int8_block(const uint8_t *low, const uint8_t *high, const float *per_unit, const int8_t *weights,
                       const float *scale, const int32_t *sums, float *y, long columns, long outputs, const int rows)
{
    __m512i lows[2][4], highs[2][4];
    for (int row = 0; row < rows; row++)
        for (int part = 0; part < 4; part++)
            lows[row][part] = highs[row][part] = _mm512_setzero_si512();
    for (long at = 0; at < columns; at += 4, weights += 256)
        for (int part = 0; part < 4; part++) {
            __m512i four = _mm512_loadu_si512(weights + 64 * part);
            _mm_prefetch((const char *)weights + 64 * part + 8192, _MM_HINT_T0);
            for (int row = 0; row < rows; row++) {
                lows[row][part] = _mm512_dpbusd_epi32(lows[row][part], four_of(low + row * columns + at), four);
                highs[row][part] = _mm512_dpbusd_epi32(highs[row][part], four_of(high + row * columns + at), four);
            }
        }
    for (int row = 0; row < rows; row++)
        for (int part = 0; part < 4; part++) {
            __m512i less = _mm512_slli_epi32(_mm512_loadu_si512(sums + 16 * part), 7);
            __m512 scales = _mm512_loadu_ps(scale + 16 * part);
            __m512 down = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_sub_epi32(lows[row][part], less)), scales);
            __m512 up = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_sub_epi32(highs[row][part], less)), scales);
            __m512 sum = _mm512_add_ps(down, _mm512_mul_ps(up, _mm512_set1_ps(256)));
            _mm512_storeu_ps(y + row * outputs + 16 * part, _mm512_div_ps(sum, _mm512_set1_ps(per_unit[row])));
        }
}

/* y (rows, outputs) of blocks first to last of weights, with scale and sums (outputs). */
FAST void int8_product(const uint8_t *low, const uint8_t *high, const float *per_unit, const int8_t *weights,
                       const float *scale, const int32_t *sums, float *y, long rows, long columns, long outputs,
                       long first, long last)
{
    for (long block = first; block < last; block++) {
        const int8_t *here = weights + block * columns * 64;
        long row = 0;
        for (; row + 2 <= rows; row += 2)
            int8_block(low + row * columns, high + row * columns, per_unit + row, here, scale + block * 64,
                       sums + block * 64, y + row * outputs + block * 64, columns, outputs, 2);
        if (row < rows)
            int8_block(low + row * columns, high + row * columns, per_unit + row, here, scale + block * 64,
                       sums + block * 64, y + row * outputs + block * 64, columns, outputs, 1);
    }
}

INLINE void int4_block(const uint8_t *low, const uint8_t *high, const float *sums, const float *per_unit,
                       const uint8_t *weights, const uint16_t *scale_zero, float *y, long columns, long outputs,
                       const __m512i front, const __m512i back, const int rows)
{
    const __m512i nibble = _mm512_set1_epi8(15);
    __m512 total[2][4];
    for (int row = 0; row < rows; row++)
        for (int part = 0; part < 4; part++)
            total[row][part] = _mm512_setzero_ps();
    for (long group = 0; group < columns; group += 32, scale_zero += 2 * outputs) {
        __m512i lows[2][4], highs[2][4];
        for (int row = 0; row < rows; row++)
            for (int part = 0; part < 4; part++)
                lows[row][part] = highs[row][part] = _mm512_setzero_si512();
#pragma GCC unroll 8
        for (long at = group; at < group + 32; at += 4, weights += 128) {
            __m512i two = _mm512_loadu_si512(weights), next = _mm512_loadu_si512(weights + 64);
            _mm_prefetch((const char *)weights + 4096, _MM_HINT_T0);
            _mm_prefetch((const char *)weights + 4160, _MM_HINT_T0);
            __m512i a = _mm512_permutex2var_epi8(two, front, next), b = _mm512_permutex2var_epi8(two, back, next);
            const __m512i four[4] = {
                _mm512_and_si512(a, nibble), _mm512_and_si512(b, nibble),
                _mm512_and_si512(_mm512_srli_epi16(a, 4), nibble), _mm512_and_si512(_mm512_srli_epi16(b, 4), nibble),
            };
            for (int row = 0; row < rows; row++) {
                __m512i down = four_of(low + row * columns + at), up = four_of(high + row * columns + at);
                for (int part = 0; part < 4; part++) {
                    lows[row][part] = _mm512_dpbusd_epi32(lows[row][part], four[part], down);
                    highs[row][part] = _mm512_dpbusd_epi32(highs[row][part], four[part], up);
                }
            }
        }
        for (int part = 0; part < 4; part++) {
            __m512i both = _mm512_loadu_si512(scale_zero + 32 * part); /* bf16: the upper half of a float */
            __m512 scale = _mm512_castsi512_ps(_mm512_slli_epi32(both, 16));
            __m512 zero = _mm512_castsi512_ps(_mm512_and_si512(both, _mm512_set1_epi32((int)0xffff0000)));
            zero = _mm512_fnmadd_ps(_mm512_set1_ps(8), scale, zero); /* what a value of 0 stands for */
            for (int row = 0; row < rows; row++) {
                __m512 sum = _mm512_set1_ps(sums[row * (columns / 32) + group / 32]);
                __m512i exact = _mm512_add_epi32(_mm512_slli_epi32(highs[row][part], 8), lows[row][part]);
                total[row][part] = _mm512_fmadd_ps(scale, _mm512_cvtepi32_ps(exact), total[row][part]);
                total[row][part] = _mm512_fmadd_ps(zero, sum, total[row][part]);
            }
        }
    }
    for (int row = 0; row < rows; row++)
        for (int part = 0; part < 4; part++)
            _mm512_storeu_ps(y + row * outputs + 16 * part,
                             _mm512_div_ps(total[row][part], _mm512_set1_ps(per_unit[row])));
}

/* y (rows, outputs) of blocks first to last of weights as torch packs them where a block has 64 outputs, each column
 * 32 bytes, the first 32 outputs in the low halves; scale_zero (columns / 32, outputs, 2) in bf16. */
FAST void int4_product(const uint8_t *low, const uint8_t *high, const float *sums, const float *per_unit,
                       const uint8_t *weights, const uint16_t *scale_zero, float *y, long rows, long columns,
                       long outputs, long first, long last)
{
    uint8_t places[2][64]; /* in two columns and two more: the four columns of 16 bytes, side by side */
    for (int half = 0; half < 2; half++)
        for (int place = 0; place < 64; place++)
            places[half][place] = (uint8_t)(place % 4 / 2 * 64 + place % 2 * 32 + half * 16 + place / 4);
    const __m512i front = _mm512_loadu_si512(places[0]), back = _mm512_loadu_si512(places[1]);
    for (long block = first; block < last; block++) {
        const uint8_t *here = weights + block * columns * 32;
        long row = 0;
        for (; row + 2 <= rows; row += 2)
            int4_block(low + row * columns, high + row * columns, sums + row * (columns / 32), per_unit + row, here,
                       scale_zero + block * 128, y + row * outputs + block * 64, columns, outputs, front, back, 2);
        if (row < rows)
            int4_block(low + row * columns, high + row * columns, sums + row * (columns / 32), per_unit + row, here,
                       scale_zero + block * 128, y + row * outputs + block * 64, columns, outputs, front, back, 1);
    }
}

#else

int can_multiply(void)
{
    return 0;
}

#endif
