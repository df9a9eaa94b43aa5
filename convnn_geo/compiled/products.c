/* The k nearest of a block of targets, by products.

   Products in single precision tell who may be among the k nearest: all that lie no farther beyond
   the k-th than rounding can reach. Where rounding can't change their order either, that is all.
   Elsewhere these few are measured in double precision (in single, where there are few axes), and
   the result, rounded to single, decides; ties go to the lowest index. So the choice does not
   depend on how a product is summed, and no row is ever sorted.

   Sources are packed into panels once an example. A block of rows of products stays in cache.

   A few sources far longer than the rest would make rounding reach far for all: these are measured
   one by one, and the rest are taken from a mean without them. */

#include "products.h"

#include <float.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "measure.h"
#include "near.h"
#include "select.h"

enum { FAR_SHARE = 64, FAR = 4 }; /* one in so many, at most, so many times as long as the mean */

struct Workspace {
  const Problem *problem;
  int64_t example, m, wide;       /* packed now, -1 for none; its sources; rounded up to panels */
  float *panel, *bias;            /* (wide / PANEL, d, PANEL), (wide) */
  float *center, *target;         /* (d), (d, TARGETS) */
  float *row;                     /* (TARGETS, wide) */
  Near near;                      /* who may be among the nearest */
  int32_t *far;                   /* (m / FAR_SHARE + 1), and how many there are */
  int64_t strangers;
  float *length; /* (wide) */
  float longest, largest_bias;    /* of the sources as packed */
  const float *key, *query, *add; /* of the example: rows of sources and targets, bias */
  const float *less;              /* and of pairs */
  const int64_t *own;
};

Workspace *workspace_new(const Problem *problem) {
  Workspace *w = calloc(1, sizeof *w);
  if (!w) return NULL;
  size_t wide = (size_t)(problem->m + PANEL - 1) / PANEL * PANEL, d = (size_t)problem->d;
  w->problem = problem, w->example = -1;
  w->panel = malloc(wide * d * sizeof *w->panel);
  w->bias = malloc(wide * sizeof *w->bias);
  w->center = calloc(d, sizeof *w->center);
  w->target = malloc(d * TARGETS * sizeof *w->target);
  w->row = malloc(wide * TARGETS * sizeof *w->row);
  w->far = malloc(((size_t)problem->m / FAR_SHARE + 1) * sizeof *w->far);
  w->length = malloc(wide * sizeof *w->length);
  int enough = near_new(&w->near, (int64_t)wide);
  if (enough && w->panel && w->bias && w->center && w->target && w->row && w->far && w->length)
    return w;
  workspace_free(w);
  return NULL;
}

void workspace_free(Workspace *w) {
  if (!w) return;
  near_free(&w->near);
  void *parts[] = {w->panel, w->bias, w->center, w->target, w->row, w->far, w->length, w};
  for (size_t i = 0; i < sizeof parts / sizeof *parts; i++) free(parts[i]);
}

static void enter(Workspace *w, int64_t example) {
  const Problem *p = w->problem;
  int64_t outer = example / p->heads, head = example % p->heads;
  w->key = p->keys + outer * p->key_example + head * p->key_head;
  w->query = p->q + outer * p->q_example + head * p->q_head;
  w->add = p->bias ? p->bias + outer * p->bias_example + head * p->bias_head : NULL;
  w->less = p->less ? p->less + outer * p->less_example + head * p->less_head : NULL;
  w->own = p->own, w->m = p->m;
  if (p->target_start) {
    int64_t target = p->target_start[example], source = p->source_start[example];
    w->key = p->keys + source * p->key_row;
    w->query = p->q + target * p->q_row;
    w->add = p->bias ? p->bias + source : NULL;
    w->own = p->own ? p->own + target : NULL;
    w->m = p->source_stop[example] - source;
  }
  w->wide = (w->m + PANEL - 1) / PANEL * PANEL;
  w->example = example;
}

/* Products are as exact as their factors are short, so points are taken from their mean. */
static void find_center(Workspace *w) {
  const Problem *p = w->problem;
  float part = 1 / (float)(w->m - w->strangers);
  for (int64_t axis = 0; axis < p->d; axis++) w->center[axis] = 0;
  for (int64_t j = 0, f = 0; j < w->m; j++) {
    if (f < w->strangers && w->far[f] == j) {
      f++;
      continue;
    }
    for (int64_t axis = 0; axis < p->d; axis++)
      w->center[axis] += part * w->key[j * p->key_row + axis];
  }
}

/* A row becomes a column. Left to itself, the compiler scatters, which is slow. */
#if defined(__GNUC__) && !defined(__clang__)
__attribute__((optimize("no-tree-vectorize")))
#endif
static void stand(const float *row, const float *center, float factor, int64_t d, float *column,
                  int64_t stride) {
  for (int64_t axis = 0; axis < d; axis++)
    column[axis * stride] = factor * (row[axis] - center[axis]);
}

/* Sources far longer than the rest, if they are few. */
static void find_strangers(Workspace *w) {
  float mean = 0;
  for (int64_t j = 0; j < w->m; j++) mean += w->length[j] / (float)w->m;
  w->strangers = 0;
  for (int64_t j = 0; j < w->m; j++) {
    if (w->length[j] <= FAR * mean) continue; /* so are all, where one is NaN or infinite */
    if (w->strangers >= w->m / FAR_SHARE) {
      w->strangers = 0;
      return;
    }
    w->far[w->strangers++] = (int32_t)j;
  }
}

static void pack(Workspace *w) {
  const Problem *p = w->problem;
  float longest = 0, largest = 0, *to = w->panel;
  if (p->kind == POINTS) find_center(w);
  for (int64_t start = 0; start < w->wide; start += PANEL) {
    float size[PANEL] = {0};
    for (int64_t j = 0; j < PANEL; j++) { /* what is missing repeats the last source */
      int64_t key = start + j < w->m ? start + j : w->m - 1;
      stand(w->key + key * p->key_row, w->center, 1, p->d, to + j, PANEL);
    }
    for (int64_t axis = 0; axis < p->d; axis++, to += PANEL)
      for (int j = 0; j < PANEL; j++) size[j] += to[j] * to[j];
    for (int j = 0; j < PANEL; j++) {
      float add = p->kind == POINTS ? size[j] : 0;
      if (w->add) add = w->add[start + j < w->m ? start + j : w->m - 1];
      w->length[start + j] = sqrtf(size[j]);
      w->bias[start + j] = start + j < w->m ? add : INFINITY;
    }
  }
  for (int64_t j = 0, f = 0; j < w->m; j++) {
    float length = w->length[j], add = w->add ? fabsf(w->add[j]) : 0;
    largest = add > largest || isnan(add) ? add : largest;
    if (f < w->strangers && w->far[f] == j)
      f++;
    else
      longest = length > longest || isnan(length) ? length : longest;
  }
  w->longest = longest, w->largest_bias = p->kind == POINTS ? longest * longest : largest;
}

/* Packed anew where there are strangers, who had drawn the mean towards them. */
static void prepare(Workspace *w) {
  w->strangers = 0;
  pack(w);
  if (w->problem->kind == ANGLES) return;
  find_strangers(w);
  if (w->strangers) pack(w);
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

/* The distance that decides. */
static float measure(const Workspace *w, const float *q, int zero, int64_t i, int64_t j) {
  const Problem *p = w->problem;
  double value = distance_of(p, q, zero, w->key + j * p->key_row, w->add ? w->add[j] : 0);
  return (float)(w->less ? value - w->less[i * p->less_row + j] : value);
}

/* Distances that decide, of all that are listed. Equal keys, of which there may be many, stand side
   by side, as they are tied: they are measured once. */
static void measure_listed(Workspace *w, const float *q, int zero, int64_t i) {
  const Problem *p = w->problem;
  Near *near = &w->near;
  for (int64_t j = 0; j < near->count; j++) {
    int64_t now = near->place[j], last = j ? near->place[j - 1] : -1;
    size_t size = (size_t)p->d * sizeof *w->key;
    int same = j && !w->less && (!w->add || w->add[now] == w->add[last]);
    if (same && !memcmp(w->key + now * p->key_row, w->key + last * p->key_row, size))
      near->value[j] = near->value[j - 1];
    else
      near->value[j] = measure(w, q, zero, i, now);
  }
}

/* same: what all products of the row leave out of its distances. */
static void nearest_of_row(Workspace *w, const float *row, int64_t i, float margin, float same,
                           float *values, int64_t *places) {
  const Problem *p = w->problem;
  Near *near = &w->near;
  int k = p->k < w->m ? p->k : (int)w->m, one_more = k < w->m && k < GROUPS;
  float some[GROUPS + 1], nearest = bound(row, w->m, k), size = 0;
  /* What pairs are less by is rounded, too, by a share of what comes out and of what it came from;
     who is far less near than the limit may be off by more. */
  if (w->less) margin = 2 * margin + 8 * FLT_EPSILON * (fabsf(nearest) + fabsf(same));
  float limit = nearest + margin;
  for (int64_t f = 0; f < w->strangers; f++) {
    float value = row[w->far[f]]; /* rounded once, by a share of itself */
    if (value <= limit) size = fmaxf(size, fmaxf(fabsf(value), fabsf(limit)));
  }
  if (size > 0) margin += 4 * FLT_EPSILON * (size + fabsf(same)), limit = nearest + margin;
  near_list(near, row, w->wide, limit < FLT_MAX ? limit : FLT_MAX);
  if (w->less) {
    for (int64_t j = 0; j < near->count; j++) size = fmaxf(size, fabsf(near->value[j]));
    margin += 8 * FLT_EPSILON * size;
  }
  near_tighten(near, k, margin);
  int64_t order[GROUPS + 1], count = near->count;
  int found = count < k ? (int)count : k, seen = count < k + one_more ? (int)count : k + one_more;
  int sure = 0;
  if (p->wanted == SET && count >= k && count <= k + FEW_MORE) {
    sure = near_divide(near, k, margin);
    for (int j = 0; sure && j < k; j++)
      values[j] = near->value[j] + same, places[j] = near->place[j];
  } else if (p->wanted != VALUES && near_few(near, k) && (one_more || count <= k)) {
    near_sort(near, seen, some, order);
    sure = apart(some, seen, margin);
    for (int j = 0; sure && j < found; j++) values[j] = some[j] + same, places[j] = order[j];
  }
  if (!sure) {
    const float *q = w->query + i * p->q_row;
    int zero = p->kind == ANGLES && is_zero(q, p->d);
    measure_listed(w, q, zero, i);
    near_sort(near, found, some, order);
    memcpy(values, some, (size_t)found * sizeof *some);
    memcpy(places, order, (size_t)found * sizeof *order);
  }
  for (int64_t j = 0; j < w->m && found < k; j++) /* what is hidden, where little else is */
    if (row[j] == INFINITY) values[found] = INFINITY, places[found++] = j;
  for (; found < p->k; found++) values[found] = INFINITY, places[found] = -1;
}

int nearest_of_block(Workspace *w, int64_t example, int64_t start, float *values,
                     int64_t *places) {
  const Problem *p = w->problem;
  int64_t left = targets_of(p, example) - start;
  int rows = left < TARGETS ? (int)left : TARGETS;
  float margin[TARGETS], same[TARGETS];
  float factor = p->kind == POINTS ? 2 : p->kind == ANGLES ? 1 : p->scale;
  if (w->example != example) {
    enter(w, example);
    if (w->m) prepare(w);
  }
  if (!w->m) { /* nobody to choose */
    for (int64_t i = 0; i < (int64_t)rows * p->k; i++) values[i] = INFINITY, places[i] = -1;
    return 1;
  }
  for (int i = 0; i < TARGETS; i++) { /* rows that are missing repeat the last */
    const float *q = w->query + (start + (i < rows ? i : rows - 1)) * p->q_row;
    float size = squared_distance(q, w->center, p->d);
    stand(q, w->center, -factor, p->d, w->target + i, TARGETS);
    /* Twice the error of a sum of d terms; of their squares' sums; of centring and rounding; and
       that of the distance that decides, where it is in single precision, too. */
    float d = (float)p->d, tiny = TINY * sqrtf(d); /* whose square vanishes */
    float reach = fabsf(factor) * (sqrtf(size) + tiny) * (w->longest + tiny) + w->largest_bias;
    margin[i] = FLT_EPSILON * ((d + 12) * reach + d * w->largest_bias + 6 * size);
    if (p->d <= FEW_AXES) margin[i] += FLT_EPSILON * (d + 4) * (reach + w->largest_bias + size);
    margin[i] += (d + 12) * FLT_MIN;
    same[i] = p->kind == POINTS ? size : p->kind == ANGLES ? 1 : 0;
    if (!(reach + size < FLT_MAX / 16)) return 0;
  }
  multiply(w);
  for (int i = 0; i < rows; i++) {
    float *row = w->row + i * w->wide;
    if (w->less) {
      const float *less = w->less + (start + i) * p->less_row;
      int lost = 0;
      for (int64_t j = 0; j < w->m; j++) row[j] -= less[j], lost |= !(row[j] >= -FLT_MAX);
      if (lost) return 0; /* NaN, or nearer than any number */
    }
    if (w->strangers) {
      const float *q = w->query + (start + i) * p->q_row;
      int zero = p->kind == ANGLES && is_zero(q, p->d);
      for (int64_t f = 0; f < w->strangers; f++)
        row[w->far[f]] = measure(w, q, zero, start + i, w->far[f]) - same[i];
    }
    if (p->mask) {
      const uint8_t *mask = p->mask + example / p->heads * p->mask_example +
                            example % p->heads * p->mask_head + (start + i) * p->mask_row;
      for (int64_t j = 0; j < w->m; j++) row[j] = mask[j] ? row[j] : INFINITY;
    }
    if (w->own && w->own[start + i] >= 0) row[w->own[start + i]] = INFINITY;
    nearest_of_row(w, row, start + i, margin[i], same[i], values + i * p->k, places + i * p->k);
  }
  return 1;
}
