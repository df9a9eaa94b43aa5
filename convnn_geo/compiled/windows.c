/* The k nearest among each target's own candidates: those of a window, say. No copies of them. */

#include <float.h>
#include <math.h>
#include <stdlib.h>

#include "measure.h"
#include "select.h"

enum { SPARE = 8, SOME = 32 }; /* targets whose candidates are listed for all examples at once */

static int ascending(const void *a, const void *b) {
  int64_t x = *(const int64_t *)a, y = *(const int64_t *)b;
  return (x > y) - (x < y);
}

/* Candidates that a target may choose, in the order of sources, which ties follow. */
static int64_t allowed(const int64_t *index, const uint8_t *mask, int64_t own, int64_t width,
                       int64_t *listed) {
  int64_t count = 0;
  int sorted = 1;
  for (int64_t c = 0; c < width; c++) {
    if ((mask && !mask[c]) || index[c] == own) continue;
    sorted &= !count || listed[count - 1] < index[c];
    listed[count++] = index[c];
  }
  if (!sorted) qsort(listed, (size_t)count, sizeof *listed, ascending);
  return count;
}

static const float *keys_of(const Problem *p, int64_t example) {
  return p->keys + example / p->heads * p->key_example + example % p->heads * p->key_head;
}

/* The longest source of an example. */
static float longest(const Problem *p, const float *keys) {
  float most = 0;
  for (int64_t j = 0; j < p->m; j++) {
    float size = dot(keys + j * p->key_row, keys + j * p->key_row, p->d);
    most = size > most || isnan(size) ? size : most;
  }
  return sqrtf(most) + TINY * sqrtf((float)p->d);
}

/* One target, and memory for its candidates. */
typedef struct {
  const Problem *p;
  const float *q, *keys, *add;
  int zero;     /* whether q is, of ANGLES */
  float spread; /* of PRODUCTS: how far off they may be in single precision */
  int64_t *listed;
  float *value;
} Target;

/* How far off products may be. */
static float spread_of(const Target *t, float longest, int64_t count) {
  const Problem *p = t->p;
  float most = 0, length = sqrtf(dot(t->q, t->q, p->d)) + TINY * sqrtf((float)p->d);
  for (int64_t c = 0; t->add && c < count; c++) most = fmaxf(most, fabsf(t->add[t->listed[c]]));
  return FLT_EPSILON * (float)(p->d + 12) * (fabsf((float)p->scale) * length * longest + most);
}

static float exact(const Target *t, int64_t c) {
  int64_t j = t->listed[c];
  const float *key = t->keys + j * t->p->key_row;
  return (float)distance_of(t->p, t->q, t->zero, key, t->add ? t->add[j] : 0);
}

/* In single precision; of differences off by a share of itself. */
static float rough(const Target *t, int64_t c) {
  const Problem *p = t->p;
  const float *key = t->keys + t->listed[c] * p->key_row;
  if (p->kind == PRODUCTS)
    return (t->add ? t->add[t->listed[c]] : 0) - (float)p->scale * dot(t->q, key, p->d);
  if (p->kind == ANGLES && (t->zero || is_zero(key, p->d))) return 1;
  return squared_distance(t->q, key, p->d) * (p->kind == ANGLES ? 0.5f : 1);
}

/* The k nearest of count candidates, k at most count: values, and which candidates they are.
   Single precision proposes some more; where it tells all of the k and the next apart, that is all.
   Elsewhere those proposed are measured, and where others may be nearer, all are. */
static void choose(const Target *t, int64_t count, int k, float *best, int64_t *place) {
  int64_t d = t->p->d;
  int some = k + SPARE < GROUPS ? k + SPARE : GROUPS, sure = 1;
  if (some > count) some = (int)count;
  if (d > FEW_AXES) {
    float value[GROUPS];
    int64_t index[GROUPS];
    for (int64_t c = 0; c < count; c++) t->value[c] = rough(t, c);
    smallest_of_row(t->value, count, some, value, index);
    float off = t->spread + FLT_EPSILON * (float)(d + 12) * fabsf(value[some - 1]) + 1e-34f;
    for (int j = 1; j < some && j <= k; j++) sure &= value[j] - value[j - 1] > off;
    sure &= fabsf(value[0]) <= FLT_MAX && fabsf(value[k - 1]) <= FLT_MAX;
    if (some == k && count > k) sure = 0; /* nobody has looked at who is next */
    if (sure) {
      for (int j = 0; j < k; j++) best[j] = value[j], place[j] = index[j];
      return;
    }
    if (some == count || value[some - 1] - value[k - 1] > off) {
      for (int j = 1; j < some; j++) { /* in the order of sources again */
        int64_t here = index[j];
        int to = j;
        for (; to > 0 && index[to - 1] > here; to--) index[to] = index[to - 1];
        index[to] = here;
      }
      for (int j = 0; j < some; j++) t->value[j] = exact(t, index[j]);
      smallest_of_row(t->value, some, k, best, place);
      for (int j = 0; j < k; j++) place[j] = index[place[j]];
      return;
    }
  }
  for (int64_t c = 0; c < count; c++) t->value[c] = exact(t, c);
  smallest_of_row(t->value, count, k, best, place);
}

static void nearest_of(Target *t, int64_t row, int64_t count, float *values, int64_t *places,
                       uint8_t *kept) {
  int k = t->p->k, found = count < k ? (int)count : k;
  values += row * k, places += row * k, kept += row * k;
  if (found) choose(t, count, found, values, places);
  for (int j = 0; j < k; j++) {
    kept[j] = j < found;
    places[j] = j < found ? t->listed[places[j]] : found ? places[0] : 0;
    values[j] = j < found ? values[j] : INFINITY;
  }
}

/* index, mask or NULL (n, width), shared by all examples; values, places, kept (examples, n, k).
   What a target lacks of k is infinite, names its nearest, or 0, and is not kept. Values are good
   to rounding. Returns 0 where memory does not suffice. */
int windows_nearest(const Problem *p, const int64_t *index, const uint8_t *mask, int64_t width,
                    int threads, float *values, int64_t *places, uint8_t *kept) {
  float *spread = malloc((size_t)p->examples * sizeof *spread);
  int served = 1;
#pragma omp parallel num_threads(threads) reduction(&& : served)
  {
    int64_t *listed = malloc((size_t)(SOME * width) * sizeof *listed), count[SOME];
    Target t = {.p = p, .value = malloc((size_t)width * sizeof *t.value)};
    served = spread && listed && t.value;
#pragma omp for schedule(static)
    for (int64_t example = 0; example < p->examples; example++)
      if (spread && p->kind == PRODUCTS) spread[example] = longest(p, keys_of(p, example));
#pragma omp for schedule(static)
    for (int64_t start = 0; start < p->n; start += SOME) {
      if (!served) continue;
      int64_t rows = p->n - start < SOME ? p->n - start : SOME;
      for (int64_t i = 0; i < rows; i++)
        count[i] = allowed(index + (start + i) * width, mask ? mask + (start + i) * width : NULL,
                           p->own ? p->own[start + i] : -1, width, listed + i * width);
      for (int64_t example = 0; example < p->examples; example++) {
        int64_t outer = example / p->heads, head = example % p->heads;
        const float *q = p->q + outer * p->q_example + head * p->q_head;
        t.keys = keys_of(p, example);
        t.add = p->bias ? p->bias + outer * p->bias_example + head * p->bias_head : NULL;
        for (int64_t i = 0; i < rows; i++) {
          t.q = q + (start + i) * p->q_row, t.listed = listed + i * width;
          t.zero = p->kind == ANGLES && is_zero(t.q, p->d);
          if (p->kind == PRODUCTS) t.spread = spread_of(&t, spread[example], count[i]);
          nearest_of(&t, example * p->n + start + i, count[i], values, places, kept);
        }
      }
    }
    free(listed), free(t.value);
  }
  free(spread);
  return served;
}
