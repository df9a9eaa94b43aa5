/* The k nearest among each target's own candidates: those of a window, say. No copies of them. */

#include <float.h>
#include <math.h>
#include <stdlib.h>

#include "measure.h"
#include "near.h"
#include "select.h"

enum { SOME = 32 }; /* targets whose candidates are listed for all examples at once */

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

/* Which sources of an example are zero, of ANGLES; returns the longest one's length. */
static float look_at(const Problem *p, const float *keys, uint8_t *zero) {
  float most = 0;
  for (int64_t j = 0; j < p->m; j++) {
    const float *key = keys + j * p->key_row;
    float size = dot(key, key, p->d);
    most = size > most || isnan(size) ? size : most;
    zero[j] = p->kind == ANGLES && is_zero(key, p->d);
  }
  return sqrtf(most) + TINY * sqrtf((float)p->d);
}

/* One target, and memory for its candidates. */
typedef struct {
  const Problem *p;
  const float *q, *keys, *add;
  const uint8_t *zeros; /* which sources are, of ANGLES */
  int zero;             /* whether q is */
  float spread;         /* of PRODUCTS: how far off they may be in single precision */
  int64_t *listed;
  float *row; /* (rounded up to panels) */
  Near near;
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
  int64_t j = t->listed[c];
  const float *key = t->keys + j * p->key_row;
  if (p->kind == PRODUCTS)
    return (t->add ? t->add[j] : 0) - (float)p->scale * dot(t->q, key, p->d);
  if (p->kind == ANGLES && (t->zero || t->zeros[j])) return 1;
  return squared_distance(t->q, key, p->d) * (p->kind == ANGLES ? 0.5f : 1);
}

/* The k nearest of count candidates by single precision, and by the distance that decides where
   that does not tell them apart. Returns 0 where it can't tell who they may be. */
static int choose_roughly(Target *t, int64_t count, int k, float *best, int64_t *place) {
  int64_t wide = (count + PANEL - 1) / PANEL * PANEL, order[GROUPS + 1];
  float some[GROUPS + 1];
  int finite = 1, one_more = k < count && k < GROUPS, sure = 0;
  for (int64_t c = 0; c < count; c++) {
    t->row[c] = rough(t, c);
    finite &= fabsf(t->row[c]) <= FLT_MAX;
  }
  for (int64_t c = count; c < wide; c++) t->row[c] = INFINITY;
  if (!finite) return 0;
  float nearest = bound(t->row, count, k);
  float off = 2 * (t->spread + FLT_EPSILON * (float)(t->p->d + 12) * fabsf(nearest)) + 1e-34f;
  if (!(nearest + off < FLT_MAX)) return 0; /* some source is NaN, or too long to tell */
  near_list(&t->near, t->row, wide, nearest + off);
  near_tighten(&t->near, k, off);
  if (near_few(&t->near, k) && (one_more || count == k)) {
    int seen = t->near.count < k + one_more ? k : k + one_more;
    near_sort(&t->near, seen, some, order);
    sure = apart(some, seen, off);
  }
  if (!sure) {
    for (int64_t c = 0; c < t->near.count; c++) t->near.value[c] = exact(t, t->near.place[c]);
    near_sort(&t->near, k, some, order);
  }
  for (int j = 0; j < k; j++) best[j] = some[j], place[j] = order[j];
  return 1;
}

/* The k nearest of count candidates, k at most count: values, and which candidates they are. */
static void choose(Target *t, int64_t count, int k, float *best, int64_t *place) {
  if (t->p->d > FEW_AXES && choose_roughly(t, count, k, best, place)) return;
  for (int64_t c = 0; c < count; c++) t->row[c] = exact(t, c);
  smallest_of_row(t->row, count, k, best, place);
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
  float *longest = malloc((size_t)p->examples * sizeof *longest);
  uint8_t *zeros = malloc((size_t)(p->examples * p->m));
  int served = 1;
#pragma omp parallel num_threads(threads) reduction(&& : served)
  {
    int64_t *listed = malloc((size_t)(SOME * width) * sizeof *listed), count[SOME];
    int64_t wide = (width + PANEL - 1) / PANEL * PANEL;
    Target t = {.p = p, .row = malloc((size_t)wide * sizeof *t.row)};
    served = near_new(&t.near, wide) && longest && zeros && listed && t.row;
#pragma omp for schedule(static)
    for (int64_t e = 0; e < p->examples; e++)
      if (longest && zeros) longest[e] = look_at(p, keys_of(p, e), zeros + e * p->m);
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
        t.keys = keys_of(p, example), t.zeros = zeros + example * p->m;
        t.add = p->bias ? p->bias + outer * p->bias_example + head * p->bias_head : NULL;
        for (int64_t i = 0; i < rows; i++) {
          t.q = q + (start + i) * p->q_row, t.listed = listed + i * width;
          t.zero = p->kind == ANGLES && is_zero(t.q, p->d);
          if (p->kind == PRODUCTS) t.spread = spread_of(&t, longest[example], count[i]);
          nearest_of(&t, example * p->n + start + i, count[i], values, places, kept);
        }
      }
    }
    near_free(&t.near), free(listed), free(t.row);
  }
  free(longest), free(zeros);
  return served;
}
