/* The k nearest among each target's own candidates: those of a window, say. No copies of them. */

#include <float.h>
#include <math.h>
#include <stdlib.h>

#include "measure.h"
#include "select.h"

enum { SPARE = 8 };

/* Candidates that a target may choose, in the order of sources, which ties follow. */
static int64_t allowed(const int64_t *index, const uint8_t *mask, int64_t own, int64_t width,
                       int64_t *listed) {
  int64_t count = 0;
  for (int64_t c = 0; c < width; c++) {
    if ((mask && !mask[c]) || index[c] == own) continue;
    int64_t place = count++;
    for (; place > 0 && listed[place - 1] > index[c]; place--) listed[place] = listed[place - 1];
    listed[place] = index[c];
  }
  return count;
}

/* The longest source of an example. */
static float longest(const Problem *p, const float *keys) {
  float most = 0;
  for (int64_t j = 0; j < p->m; j++) {
    float size = dot(keys + j * p->key_row, keys + j * p->key_row, p->d);
    most = size > most || isnan(size) ? size : most;
  }
  return sqrtf(most);
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

/* index, mask or NULL (n, width), shared by all examples; values, places, kept (examples, n, k).
   What a target lacks of k is infinite, names its nearest, or 0, and is not kept. Values are good
   to rounding. Returns 0 where memory does not suffice. */
int windows_nearest(const Problem *p, const int64_t *index, const uint8_t *mask, int64_t width,
                    int threads, float *values, int64_t *places, uint8_t *kept) {
  int served = 1;
#pragma omp parallel num_threads(threads) reduction(&& : served)
  {
    Target t = {.p = p};
    t.listed = malloc((size_t)width * sizeof *t.listed);
    t.value = malloc((size_t)width * sizeof *t.value);
    int64_t entered = -1;
    float most = 0, sources = 0;
    served = t.listed && t.value;
#pragma omp for schedule(static)
    for (int64_t row = 0; row < p->examples * p->n; row++) {
      if (!served) continue;
      int64_t example = row / p->n, i = row % p->n;
      int64_t outer = example / p->heads, head = example % p->heads;
      t.q = p->q + outer * p->q_example + head * p->q_head + i * p->q_row;
      t.keys = p->keys + outer * p->key_example + head * p->key_head;
      t.add = p->bias ? p->bias + outer * p->bias_example + head * p->bias_head : NULL;
      t.zero = p->kind == ANGLES && is_zero(t.q, p->d);
      if (p->kind == PRODUCTS) {
        if (entered != example) {
          entered = example, sources = longest(p, t.keys) * fabsf((float)p->scale), most = 0;
          for (int64_t j = 0; t.add && j < p->m; j++)
            most = fabsf(t.add[j]) > most || isnan(t.add[j]) ? fabsf(t.add[j]) : most;
        }
        t.spread = FLT_EPSILON * (float)(p->d + 12) * (sqrtf(dot(t.q, t.q, p->d)) * sources + most);
      }
      int64_t count = allowed(index + i * width, mask ? mask + i * width : NULL,
                              p->own ? p->own[i] : -1, width, t.listed);
      int found = count < p->k ? (int)count : p->k;
      float *best = values + row * p->k;
      int64_t *place = places + row * p->k;
      if (found) choose(&t, count, found, best, place);
      for (int j = 0; j < p->k; j++) {
        kept[row * p->k + j] = j < found;
        place[j] = j < found ? t.listed[place[j]] : found ? place[0] : 0;
        best[j] = j < found ? best[j] : INFINITY;
      }
    }
    free(t.listed), free(t.value);
  }
  return served;
}
