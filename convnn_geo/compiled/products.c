/* The k nearest of a block of targets, by products.

   Products in single precision tell who may be among the k nearest: all that lie no farther beyond
   the k-th than rounding can reach. Where rounding can't change their order either, that is all.
   Elsewhere these few are measured in double precision, and the result, rounded to single, decides;
   ties go to the lowest index. So the choice does not depend on how a product is summed, and no row
   is ever sorted.

   Sources are packed into panels once an example. A block of rows of products stays in cache. */

#include "products.h"

#include <float.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "differences.h"
#include "select.h"

#ifdef __AVX512F__
#include <immintrin.h>
#endif

enum { WIDE = 16, FEW = 64, DOUBLES = 16 };

struct Workspace {
  const Problem *problem;
  int64_t example, wide;          /* packed now, -1 for none; m rounded up to panels */
  float *panel, *bias;            /* (wide / PANEL, d, PANEL), (wide) */
  float *center, *target;         /* (d), (d, TARGETS) */
  float *row, *value;             /* (TARGETS, wide), (wide) */
  int32_t *listed;                /* (wide) */
  float longest, largest_bias;    /* of the sources as packed */
  const float *key, *query, *add; /* of the example: rows of sources and targets, bias */
};

Workspace *workspace_new(const Problem *problem) {
  Workspace *w = calloc(1, sizeof *w);
  if (!w) return NULL;
  size_t wide = (size_t)(problem->m + PANEL - 1) / PANEL * PANEL, d = (size_t)problem->d;
  w->problem = problem, w->example = -1, w->wide = (int64_t)wide;
  w->panel = malloc(wide * d * sizeof *w->panel);
  w->bias = malloc(wide * sizeof *w->bias);
  w->center = calloc(d, sizeof *w->center);
  w->target = malloc(d * TARGETS * sizeof *w->target);
  w->row = malloc(wide * TARGETS * sizeof *w->row);
  w->value = malloc((wide + PANEL) * sizeof *w->value);
  w->listed = malloc((wide + PANEL) * sizeof *w->listed);
  if (w->panel && w->bias && w->center && w->target && w->row && w->value && w->listed) return w;
  workspace_free(w);
  return NULL;
}

void workspace_free(Workspace *w) {
  if (!w) return;
  void *parts[] = {w->panel, w->bias, w->center, w->target, w->row, w->value, w->listed, w};
  for (size_t i = 0; i < sizeof parts / sizeof *parts; i++) free(parts[i]);
}

static void enter(Workspace *w, int64_t example) {
  const Problem *p = w->problem;
  int64_t outer = example / p->heads, head = example % p->heads;
  w->key = p->keys + outer * p->key_example + head * p->key_head;
  w->query = p->q + outer * p->q_example + head * p->q_head;
  w->add = p->bias ? p->bias + outer * p->bias_example + head * p->bias_head : NULL;
  w->example = example;
}

/* Products are as exact as their factors are short, so points are taken from their mean. */
static void find_center(Workspace *w) {
  const Problem *p = w->problem;
  for (int64_t axis = 0; axis < p->d; axis++) w->center[axis] = 0;
  for (int64_t j = 0; j < p->m; j++)
    for (int64_t axis = 0; axis < p->d; axis++)
      w->center[axis] += w->key[j * p->key_row + axis] / (float)p->m;
}

static void pack(Workspace *w) {
  const Problem *p = w->problem;
  float longest = 0, largest = 0, *to = w->panel;
  if (p->kind == POINTS) find_center(w);
  for (int64_t start = 0; start < w->wide; start += PANEL) {
    const float *key[PANEL];
    float size[PANEL] = {0};
    for (int j = 0; j < PANEL; j++) /* what fills the last panel up repeats the last source */
      key[j] = w->key + (start + j < p->m ? start + j : p->m - 1) * p->key_row;
    for (int64_t axis = 0; axis < p->d; axis++, to += PANEL)
      for (int j = 0; j < PANEL; j++) {
        to[j] = key[j][axis] - w->center[axis];
        size[j] += to[j] * to[j];
      }
    for (int j = 0; j < PANEL; j++) {
      float add = p->kind == POINTS ? size[j] : 0;
      if (w->add) add = w->add[start + j < p->m ? start + j : p->m - 1];
      longest = size[j] > longest || isnan(size[j]) ? size[j] : longest;
      largest = fabsf(add) > largest || isnan(add) ? fabsf(add) : largest;
      w->bias[start + j] = start + j < p->m ? add : INFINITY;
    }
  }
  w->longest = sqrtf(longest), w->largest_bias = largest;
}

/* Rows of bias + <target, key>: a tile of TARGETS x PANEL stays in registers. */
static void multiply(Workspace *w) {
  int64_t d = w->problem->d;
  for (int64_t start = 0; start < w->wide; start += PANEL) {
    const float *panel = w->panel + start * d, *target = w->target;
    Vector left[TARGETS], right[TARGETS];
    for (int i = 0; i < TARGETS; i++) {
      left[i] = *(const Vector *)(w->bias + start);
      right[i] = *(const Vector *)(w->bias + start + LANES);
    }
    for (int64_t axis = 0; axis < d; axis++, panel += PANEL, target += TARGETS) {
      Vector a = *(const Vector *)panel, b = *(const Vector *)(panel + LANES);
      for (int i = 0; i < TARGETS; i++) left[i] += target[i] * a, right[i] += target[i] * b;
    }
    for (int i = 0; i < TARGETS; i++) {
      *(Vector *)(w->row + i * w->wide + start) = left[i];
      *(Vector *)(w->row + i * w->wide + start + LANES) = right[i];
    }
  }
}

static double product(const float *q, const float *key, int64_t d) {
  double sum[DOUBLES] = {0}, total = 0;
  int64_t axis = 0;
  for (; axis + DOUBLES <= d; axis += DOUBLES)
    for (int lane = 0; lane < DOUBLES; lane++)
      sum[lane] += (double)q[axis + lane] * key[axis + lane];
  for (; axis < d; axis++) total += (double)q[axis] * key[axis];
  for (int lane = 0; lane < DOUBLES; lane++) total += sum[lane];
  return total;
}

static int is_zero(const float *vector, int64_t d) {
  float size = 0;
  for (int64_t axis = 0; axis < d; axis++) size += vector[axis] * vector[axis];
  return size < 0.25f;
}

/* The distance that decides. */
static float measure(const Workspace *w, const float *q, int zero, int64_t j) {
  const Problem *p = w->problem;
  const float *key = w->key + j * p->key_row;
  if (p->kind == POINTS) return (float)squared_difference(q, key, p->d);
  if (p->kind == ANGLES)
    return zero || is_zero(key, p->d) ? 1 : (float)(squared_difference(q, key, p->d) / 2);
  double value = -(double)p->scale * product(q, key, p->d);
  return (float)(w->add ? value + w->add[j] : value);
}

/* Values up to a limit, and their places, in order of place. */
static int64_t list(Workspace *w, const float *row, float limit) {
  int64_t count = 0;
#ifdef __AVX512F__
  __m512i place = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  for (int64_t start = 0; start < w->wide; start += LANES) {
    __m512 value = _mm512_loadu_ps(row + start);
    __mmask16 near = _mm512_cmp_ps_mask(value, _mm512_set1_ps(limit), _CMP_LE_OQ);
    if (near) {
      __m512i here = _mm512_add_epi32(place, _mm512_set1_epi32((int)start));
      _mm512_storeu_si512(w->listed + count, _mm512_maskz_compress_epi32(near, here));
      _mm512_storeu_ps(w->value + count, _mm512_maskz_compress_ps(near, value));
      count += __builtin_popcount(near);
    }
  }
#else
  for (int64_t start = 0; start < w->wide; start += PANEL) {
    int any = 0;
    for (int j = 0; j < PANEL; j++) any |= row[start + j] <= limit;
    if (!any) continue;
    for (int j = 0; j < PANEL; j++) { /* whether it counts decides what the next overwrites */
      w->listed[count] = (int32_t)(start + j), w->value[count] = row[start + j];
      count += row[start + j] <= limit;
    }
  }
#endif
  return count;
}

/* Few values sorted, room for WIDE more behind them: a value's rank is the number of those before
   it. */
static void sort_few(float *value, const int32_t *place, int count, int k, float *values,
                     int64_t *places) {
  for (int j = count; j < count + WIDE; j++) value[j] = INFINITY;
  for (int start = 0; start < count; start += WIDE) {
    int32_t rank[WIDE] = {0};
    for (int j = 0; j < count; j++)
      for (int i = 0; i < WIDE; i++)
        rank[i] += (value[j] < value[start + i]) |
                   ((value[j] == value[start + i]) & (j - start < i));
    for (int i = 0; i < WIDE && start + i < count; i++)
      if (rank[i] < k) values[rank[i]] = value[start + i], places[rank[i]] = place[start + i];
  }
}

static void sort(Workspace *w, int64_t count, int k, float *values, int64_t *places) {
  if (count <= FEW) {
    sort_few(w->value, w->listed, (int)count, k, values, places);
  } else {
    smallest_of_row(w->value, count, k, values, places);
    for (int j = 0; j < k; j++) places[j] = w->listed[places[j]];
  }
}

/* Whether each of the first k lies farther before the next than rounding reaches. */
static int apart(const float *values, int64_t k, float margin) {
  int close = 0;
  for (int64_t j = 1; j < k; j++) close |= !(values[j] - values[j - 1] > margin);
  return !close;
}

/* same: what all products of the row leave out of its distances. */
static void nearest_of_row(Workspace *w, const float *row, int64_t i, float margin, float same,
                           float *values, int64_t *places) {
  const Problem *p = w->problem;
  int k = p->k, one_more = k < p->m && k < GROUPS;
  float some[GROUPS + 1], limit = bound(row, p->m, k) + margin;
  int64_t order[GROUPS + 1], count = list(w, row, limit < FLT_MAX ? limit : FLT_MAX);
  int found = count < k ? (int)count : k, seen = count < k + one_more ? (int)count : k + one_more;
  if (!p->exact) sort(w, count, seen, some, order);
  if (!p->exact && apart(some, seen, margin) && (one_more || count <= k)) {
    for (int j = 0; j < found; j++) values[j] = some[j] + same, places[j] = order[j];
  } else {
    const float *q = w->query + i * p->q_row;
    int zero = p->kind == ANGLES && is_zero(q, p->d);
    for (int64_t j = 0; j < count; j++) w->value[j] = measure(w, q, zero, w->listed[j]);
    sort(w, count, found, values, places);
  }
  for (int64_t j = 0; j < p->m && found < k; j++) /* what is hidden, where little else is */
    if (row[j] == INFINITY) values[found] = INFINITY, places[found++] = j;
}

int nearest_of_block(Workspace *w, int64_t example, int64_t start, float *values,
                     int64_t *places) {
  const Problem *p = w->problem;
  int rows = p->n - start < TARGETS ? (int)(p->n - start) : TARGETS;
  float margin[TARGETS], same[TARGETS], factor = p->kind == POINTS ? 2 : p->kind == ANGLES ? 1 : p->scale;
  if (w->example != example) enter(w, example), pack(w);
  for (int i = 0; i < TARGETS; i++) { /* rows that are missing repeat the last */
    const float *q = w->query + (start + (i < rows ? i : rows - 1)) * p->q_row;
    float size = 0;
    for (int64_t axis = 0; axis < p->d; axis++) {
      float x = q[axis] - w->center[axis];
      w->target[axis * TARGETS + i] = -factor * x;
      size += x * x;
    }
    /* Twice the error of a sum of d terms; of their squares' sums; of centring and rounding. */
    float reach = fabsf(factor) * sqrtf(size) * w->longest + w->largest_bias, d = (float)p->d;
    margin[i] = FLT_EPSILON * ((d + 12) * reach + d * w->largest_bias + 6 * size);
    margin[i] += (d + 12) * FLT_MIN;
    same[i] = p->kind == POINTS ? size : p->kind == ANGLES ? 1 : 0;
    if (!(reach + size < FLT_MAX / 16)) return 0;
  }
  multiply(w);
  for (int i = 0; i < rows; i++) {
    float *row = w->row + i * w->wide;
    if (p->mask) {
      const uint8_t *mask = p->mask + example / p->heads * p->mask_example +
                            example % p->heads * p->mask_head + (start + i) * p->mask_row;
      for (int64_t j = 0; j < p->m; j++) row[j] = mask[j] ? row[j] : INFINITY;
    }
    if (p->own && p->own[start + i] >= 0) row[p->own[start + i]] = INFINITY;
    nearest_of_row(w, row, start + i, margin[i], same[i], values + i * p->k, places + i * p->k);
  }
  return 1;
}
