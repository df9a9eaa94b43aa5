/* The few of a row who may be among its nearest: see near.h. */

#include "near.h"

#include <math.h>
#include <stdlib.h>

#include "keys.h"
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

void near_tighten(Near *near, int k, float margin) {
  if (near->count <= FEW || near->count <= k + FEW_MORE) return;
  float limit = bound_among(near->value, near->count, k) + margin;
  int64_t count = 0;
  for (int64_t j = 0; j < near->count; j++) { /* onto what was read already */
    float value = near->value[j];
    near->value[count] = value, near->place[count] = near->place[j];
    count += value <= limit;
  }
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

/* Values as integers in their order, each with its place in the list: of integers the compiler
   finds the largest many at a time. */
int near_divide(Near *near, int k, float margin) {
  int64_t key[GROUPS + FEW_MORE], count = near->count, most;
  for (int64_t j = 0; j < count; j++) key[j] = key_of(near->value[j]) * ((int64_t)1 << 32) + j;
  float beyond = INFINITY;
  for (;; count--) {
    most = key[0];
    for (int64_t j = 1; j < count; j++) most = key[j] > most ? key[j] : most;
    if (count == k) break;
    int64_t from = most & INT32_MAX, to = count - 1; /* behind those that are left */
    int32_t place = near->place[from];
    beyond = near->value[from];
    near->value[from] = near->value[to], near->place[from] = near->place[to];
    near->value[to] = beyond, near->place[to] = place;
    key[from] = key[to] - to + from;
  }
  return beyond - near->value[most & INT32_MAX] > margin;
}
