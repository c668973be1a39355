/* Products of weights with a few rows, and some of what stands between them, for processors with AVX-512 VNNI and VBMI;
 * see compiled.py.
 *
 * For low-bit weights a row of activations becomes 16 bits a number, in two bytes, each a half of the number, plus 128
 * where it must not be negative. Products of bytes are summed exactly, and all that is rounded is rounded row by row: a
 * row has the same bits whatever rows are beside it. So it has with fp32 and bf16, where every sum has its order.
 * Weights lie as torch and oneDNN have packed them, in blocks of 64 outputs, or where that is said of 32. */

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

/* To the nearest bf16, of two equally near to the even one, in the lower half of each number. */
INLINE __m512i rounded_to_bf16(__m512 wide)
{
    __m512i bits = _mm512_castps_si512(wide);
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    /* A NaN stays one: where bf16 was multiplied, its lower half is empty. */
    return _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
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

#define TILE 128 /* steps, each of 64 outputs and four bytes of a row: 32 kB stay near while rows take turns */
#define TURN 6   /* rows at a time, as many as registers hold the sums of */
#define MOST 16  /* rows, for which sums are kept */

/* Where the weights of 64 outputs lie: those of 32 together, the other 32 `far` bytes from them, the next step `next`
 * bytes on. So two blocks of 32 are multiplied as one of 64. */
typedef struct { long far, next; } spacing;

/* Adds to sums (rows, 64) the products of a tile with one to TURN rows, `stride` bytes apart. */
typedef void tile_product(const char *x, long stride, const char *weights, spacing gap, float (*sums)[64], long steps,
                          long rows);

#define TILES(name, target, steps_of)                                                                                  \
    target static inline __attribute__((always_inline)) void name##_spaced(                                            \
        const char *x, long stride, const char *weights, spacing gap, float (*sums)[64], long steps, long rows)        \
    {                                                                                                                  \
        switch (rows) {                                                                                                \
        case 1: steps_of(x, stride, weights, gap, sums, steps, 1); break;                                              \
        case 2: steps_of(x, stride, weights, gap, sums, steps, 2); break;                                              \
        case 3: steps_of(x, stride, weights, gap, sums, steps, 3); break;                                              \
        case 4: steps_of(x, stride, weights, gap, sums, steps, 4); break;                                              \
        case 5: steps_of(x, stride, weights, gap, sums, steps, 5); break;                                              \
        default: steps_of(x, stride, weights, gap, sums, steps, TURN);                                                 \
        }                                                                                                              \
    }                                                                                                                  \
    target static void name(const char *x, long stride, const char *weights, spacing gap, float (*sums)[64],           \
                            long steps, long rows)                                                                     \
    {                                                                                                                  \
        if (gap.next == 256) /* known when it is compiled: 7 % of fp32 with one row */                                 \
            name##_spaced(x, stride, weights, (spacing){128, 256}, sums, steps, rows);                                 \
        else                                                                                                           \
            name##_spaced(x, stride, weights, gap, sums, steps, rows);                                                 \
    }

INLINE const char *part_of(const char *weights, spacing gap, const int part)
{
    return weights + (part >> 1) * gap.far + 64 * (part & 1);
}

INLINE void add_tile(float (*sums)[64], __m512 (*sum)[4], const int rows)
{
    for (int row = 0; row < rows; row++)
        for (int part = 0; part < 4; part++) {
            float *so_far = sums[row] + 16 * part;
            _mm512_storeu_ps(so_far, _mm512_add_ps(_mm512_loadu_ps(so_far), sum[row][part]));
        }
}

INLINE void steps_in_fp32(const char *x, long stride, const char *weights, spacing gap, float (*sums)[64], long steps,
                          const int is_bf16, const int rows)
{
    const __m512i upper = _mm512_set1_epi32((int)0xffff0000); /* bf16: the upper half of a float */
    __m512 sum[TURN][4];
    for (int row = 0; row < rows; row++)
        for (int part = 0; part < 4; part++)
            sum[row][part] = _mm512_setzero_ps();
    for (long step = 0; step < steps; step++, x += 4, weights += gap.next)
        for (int part = 0; part < 4; part++) {
            __m512i both = _mm512_loadu_si512(part_of(weights, gap, part));
            __m512 first = _mm512_castsi512_ps(is_bf16 ? _mm512_slli_epi32(both, 16) : both);
            __m512 second = _mm512_castsi512_ps(_mm512_and_si512(both, upper));
            for (int row = 0; row < rows; row++) {
                __m512i two = four_of((const uint8_t *)x + row * stride);
                __m512 one = _mm512_castsi512_ps(is_bf16 ? _mm512_slli_epi32(two, 16) : two);
                sum[row][part] = _mm512_fmadd_ps(one, first, sum[row][part]);
                if (is_bf16) {
                    one = _mm512_castsi512_ps(_mm512_and_si512(two, upper));
                    sum[row][part] = _mm512_fmadd_ps(one, second, sum[row][part]);
                }
            }
        }
    add_tile(sums, sum, rows);
}

#define FP32_STEPS(x, stride, weights, gap, sums, steps, rows) \
    steps_in_fp32(x, stride, weights, gap, sums, steps, 0, rows)
#define WIDE_STEPS(x, stride, weights, gap, sums, steps, rows) \
    steps_in_fp32(x, stride, weights, gap, sums, steps, 1, rows)
TILES(fp32_tile, FAST, FP32_STEPS)
TILES(wide_tile, FAST, WIDE_STEPS)

FAST static void full_product(const char *x, const char *weights, char *y, long rows, long columns, long outputs,
                              long width, long first, long last, tile_product *product, int is_bf16)
{
    const long size = is_bf16 ? 2 : 4, stride = columns * size, steps = stride / 4, deep = (steps + 15) / 16 * 4096;
    spacing gap = {width == 64 ? 128 : deep / 2, width * 4};
    for (long block = first; block < last; block++) {
        if (width == 32 && block * 64 + 32 >= outputs)
            gap.far = 0; /* a block without a second: instead itself, of which nothing is stored */
        float sums[MOST][64] = {{0}};
        for (long step = 0; step < steps; step += TILE)
            for (long row = 0; row < rows; row += TURN)
                product(x + row * stride + step * 4, stride, weights + block * deep + step * gap.next, gap, sums + row,
                        steps - step < TILE ? steps - step : TILE, rows - row);
        for (long row = 0; row < rows; row++)
            for (long at = 0; at < 64; at += 16) {
                __mmask16 mask = within(block * 64 + at, outputs);
                char *into = y + (row * outputs + block * 64 + at) * size;
                __m512 sum = _mm512_loadu_ps(sums[row] + at);
                if (is_bf16)
                    _mm512_mask_cvtepi32_storeu_epi16(into, mask, rounded_to_bf16(sum));
                else
                    _mm512_mask_storeu_ps(into, mask, sum);
            }
    }
}

/* y (rows, outputs) of the outputs from 64 * first to 64 * last of weights as oneDNN packs them, (outputs / width,
 * columns / 16, 16, width) for a width of 64 or 32, with the same bits; at most 16 rows. */
FAST void fp32_product(const void *x, const void *weights, void *y, long rows, long columns, long outputs,
                       long width, long first, long last)
{
    full_product(x, weights, y, rows, columns, outputs, width, first, last, fp32_tile, 0);
}

/* The same in bf16, (outputs / width, columns / 32, 16, width, 2), summed in fp32; columns are even. */
FAST void bf16_product(const void *x, const void *weights, void *y, long rows, long columns, long outputs,
                       long width, long first, long last)
{
    full_product(x, weights, y, rows, columns, outputs, width, first, last, wide_tile, 1);
}

#if defined(__clang__) || __GNUC__ >= 10
#define PAIRS __attribute__((target("avx512f,avx512bw,avx512vbmi,avx512vnni,avx512bf16")))

int can_multiply_pairs(void)
{
    return __builtin_cpu_supports("avx512bf16");
}

PAIRS static inline __attribute__((always_inline)) void steps_in_pairs(const char *x, long stride, const char *weights,
                                                                       spacing gap, float (*sums)[64], long steps,
                                                                       const int rows)
{
    __m512 sum[TURN][4];
    for (int row = 0; row < rows; row++)
        for (int part = 0; part < 4; part++)
            sum[row][part] = _mm512_setzero_ps();
    for (long step = 0; step < steps; step++, x += 4, weights += gap.next)
        for (int part = 0; part < 4; part++) {
            __m512bh both = (__m512bh)_mm512_loadu_si512(part_of(weights, gap, part));
            for (int row = 0; row < rows; row++)
                sum[row][part] = _mm512_dpbf16_ps(sum[row][part],
                                                  (__m512bh)four_of((const uint8_t *)x + row * stride), both);
        }
    add_tile(sums, sum, rows);
}

TILES(pairs_tile, PAIRS, steps_in_pairs)

/* As bf16_product, with the processor's own products of pairs. */
FAST void bf16_pairs_product(const void *x, const void *weights, void *y, long rows, long columns, long outputs,
                             long width, long first, long last)
{
    full_product(x, weights, y, rows, columns, outputs, width, first, last, pairs_tile, 1);
}

#else

int can_multiply_pairs(void)
{
    return 0;
}

#endif

/* Between products: rows of fp32 or bf16, in multiples of 16 numbers, computed in fp32 and rounded once. */

INLINE __m512 sixteen_at(const char *row, long at, int is_bf16)
{
    if (!is_bf16)
        return _mm512_loadu_ps(row + at * 4);
    __m256i half = _mm256_loadu_si256((const void *)(row + at * 2));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

INLINE void put_sixteen(char *row, long at, __m512 wide, int is_bf16)
{
    if (!is_bf16)
        _mm512_storeu_ps(row + at * 4, wide);
    else
        _mm512_mask_cvtepi32_storeu_epi16(row + at * 2, 0xffff, rounded_to_bf16(wide));
}

/* e to the power of x, to 2 units in the last place; nothing below -104, and as of 88 above it. */
INLINE __m512 power_of_e(__m512 x)
{
    x = _mm512_max_ps(_mm512_set1_ps(-104), _mm512_min_ps(_mm512_set1_ps(88), x)); /* a NaN is the second, and stays */
    __m512 twos = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 8);
    x = _mm512_fnmadd_ps(twos, _mm512_set1_ps(0.693145752f), x); /* the logarithm of 2, in two parts */
    x = _mm512_fnmadd_ps(twos, _mm512_set1_ps(1.42860677e-6f), x);
    __m512 power = _mm512_set1_ps(1 / 720.0f);
    const float factors[] = {1 / 120.0f, 1 / 24.0f, 1 / 6.0f, 0.5f, 1, 1};
    for (int next = 0; next < 6; next++)
        power = _mm512_fmadd_ps(power, x, _mm512_set1_ps(factors[next]));
    return _mm512_scalef_ps(power, twos);
}

/* y = x / sqrt(sum of x squared + least) * weight, of each row; weight in fp32. */
FAST void rms_norm(const char *x, const float *weight, char *y, long rows, long columns, float least, int is_bf16)
{
    const long stride = columns * (is_bf16 ? 2 : 4);
    for (long row = 0; row < rows; row++, x += stride, y += stride) {
        __m512 squares = _mm512_setzero_ps();
        for (long at = 0; at < columns; at += 16) {
            __m512 some = sixteen_at(x, at, is_bf16);
            squares = _mm512_fmadd_ps(some, some, squares);
        }
        const __m512 length = _mm512_sqrt_ps(_mm512_set1_ps(_mm512_reduce_add_ps(squares) + least));
        for (long at = 0; at < columns; at += 16) {
            __m512 some = _mm512_div_ps(sixteen_at(x, at, is_bf16), length);
            put_sixteen(y, at, _mm512_mul_ps(some, _mm512_loadu_ps(weight + at)), is_bf16);
        }
    }
}

/* y (rows, columns) = silu(gate) * up, for x (rows, gate and up). */
FAST void gated(const char *x, char *y, long rows, long columns, int is_bf16)
{
    const long stride = columns * (is_bf16 ? 2 : 4);
    for (long row = 0; row < rows; row++, x += 2 * stride, y += stride)
        for (long at = 0; at < columns; at += 16) {
            __m512 gate = sixteen_at(x, at, is_bf16), up = sixteen_at(x, columns + at, is_bf16);
            __m512 power = power_of_e(_mm512_sub_ps(_mm512_setzero_ps(), gate));
            gate = _mm512_div_ps(gate, _mm512_add_ps(_mm512_set1_ps(1), power));
            put_sixteen(y, at, _mm512_mul_ps(gate, up), is_bf16);
        }
}

#else

int can_multiply(void)
{
    return 0;
}

#endif
