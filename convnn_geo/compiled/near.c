/* The few of a row who may be among its nearest: see near.h. */

#include "near.h"

#include <math.h>
#include <stdlib.h>

#include "select.h"
#include "tile.h"

#ifdef __AVX512F__
#include <immintrin.h>
#endif

enum { WIDE = 16, FEW = 64 };

typedef float Floats __attribute__((vector_size(4 * WIDE), aligned(4)));
typedef int32_t Ints __attribute__((vector_size(4 * WIDE), aligned(4)));

int near_new(Near *near, int64_t wide) {
  size_t room = (size_t)wide + PANEL + WIDE;
  near->value = malloc(room * sizeof *near->value);
  near->place = malloc(room * sizeof *near->place);
  return near->value && near->place;
}

void near_free(Near *near) { free(near->value), free(near->place); }

void near_list(Near *near, const float *row, int64_t wide, float limit) {
  int64_t count = 0;
#ifdef __AVX512F__
  __m512i place = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  for (int64_t start = 0; start < wide; start += PANEL) {
    __m512 value[2];
    __mmask16 seen[2];
    for (int half = 0; half < 2; half++) {
      value[half] = _mm512_loadu_ps(row + start + half * LANES);
      seen[half] = _mm512_cmp_ps_mask(value[half], _mm512_set1_ps(limit), _CMP_LE_OQ);
    }
    if (!(seen[0] | seen[1])) continue;
    for (int half = 0; half < 2; half++) {
      __m512i here = _mm512_add_epi32(place, _mm512_set1_epi32((int)start + half * LANES));
      _mm512_storeu_si512(near->place + count, _mm512_maskz_compress_epi32(seen[half], here));
      _mm512_storeu_ps(near->value + count, _mm512_maskz_compress_ps(seen[half], value[half]));
      count += __builtin_popcount(seen[half]);
    }
  }
#else
  for (int64_t start = 0; start < wide; start += PANEL) {
    int any = 0;
    for (int j = 0; j < PANEL; j++) any |= row[start + j] <= limit;
    if (!any) continue;
    for (int j = 0; j < PANEL; j++) { /* whether it counts decides what the next overwrites */
      near->place[count] = (int32_t)(start + j), near->value[count] = row[start + j];
      count += row[start + j] <= limit;
    }
  }
#endif
  near->count = count;
}

int near_few(const Near *near, int k) { return near->count <= FEW || near->count <= 2 * k; }

/* A value's rank is the number of those before it. Comparisons give -1 where they hold. */
static void sort_few(Near *near, float *values, int64_t *places) {
  float *value = near->value;
  int count = (int)near->count;
  for (int j = count; j < count + WIDE; j++) value[j] = INFINITY;
  for (int start = 0; start < count; start += WIDE) {
    Floats mine = *(const Floats *)(value + start);
    Ints rank = {0}, here;
    for (int i = 0; i < WIDE; i++) here[i] = start + i;
    for (int j = 0; j < count; j++) {
      Floats other = value[j] - (Floats){0};
      Ints at = j - (Ints){0};
      rank -= (other < mine) | ((other == mine) & (at < here));
    }
    for (int i = 0; i < WIDE && start + i < count; i++)
      values[rank[i]] = value[start + i], places[rank[i]] = near->place[start + i];
  }
}

void near_sort(Near *near, int k, float *values, int64_t *places) {
  if (near->count <= FEW) {
    sort_few(near, values, places);
  } else {
    smallest_of_row(near->value, near->count, k, values, places);
    for (int j = 0; j < k; j++) places[j] = near->place[places[j]];
  }
}

int near_divide(Near *near, int k, float margin) {
  float *value = near->value, beyond = INFINITY, last = -INFINITY;
  for (int64_t count = near->count; count > k; count--) {
    int64_t most = 0;
    for (int64_t j = 1; j < count; j++) most = value[j] > value[most] ? j : most;
    float held = value[most];
    int32_t there = near->place[most];
    beyond = held;
    value[most] = value[count - 1], value[count - 1] = held;
    near->place[most] = near->place[count - 1], near->place[count - 1] = there;
  }
  for (int j = 0; j < k; j++) last = value[j] > last ? value[j] : last;
  return beyond - last > margin;
}
