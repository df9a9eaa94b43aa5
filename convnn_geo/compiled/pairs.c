/* Of chosen pairs: products or squared differences, summed in double precision, and what these give
   back. Sources are read where they lie, never copied. */

#include <stdint.h>
#include <string.h>

#include "measure.h"

enum PairKind { OF_PRODUCTS, OF_SQUARES };

typedef struct {
  int32_t kind, threads;
  int64_t examples, n, m, d, k;
  const float *q, *keys; /* (examples, n, d), (examples, m, d) */
  const int64_t *index;  /* (examples, n, k), or (n, k) that all share */
  int64_t index_example; /* numbers from one example's index to the next one's */
} Pairs;

static const int64_t *chosen_by(const Pairs *p, int64_t row) {
  return p->index + row / p->n * p->index_example + row % p->n * p->k;
}

/* Into sums (examples, n, k), or rounded, whichever is not NULL. Returns 0 where an index is none of
   a source. */
int pairs_measure(const Pairs *p, double *sums, float *rounded) {
  int sound = 1;
#pragma omp parallel for num_threads(p->threads) schedule(static) reduction(&& : sound)
  for (int64_t row = 0; row < p->examples * p->n; row++) {
    const int64_t *source = chosen_by(p, row);
    const float *q = p->q + row * p->d, *keys = p->keys + row / p->n * p->m * p->d;
    for (int64_t j = 0; j < p->k; j++) {
      sound = sound && source[j] >= 0 && source[j] < p->m;
      if (!sound) break;
      const float *key = keys + source[j] * p->d;
      double sum = p->kind == OF_SQUARES ? squared_difference(q, key, p->d) : product(q, key, p->d);
      if (sums) sums[row * p->k + j] = sum;
      else rounded[row * p->k + j] = (float)sum;
    }
  }
  return sound;
}

/* What a pair whose result has this gradient gives one of its points; the other point is given. */
static inline void add(const Pairs *p, float grad, const float *own, const float *other, float *to) {
  if (p->kind == OF_PRODUCTS) {
    for (int64_t axis = 0; axis < p->d; axis++) to[axis] += grad * other[axis];
  } else {
    for (int64_t axis = 0; axis < p->d; axis++) to[axis] += 2 * grad * (own[axis] - other[axis]);
  }
}

static void add_to_targets(const Pairs *p, const float *grad, float *to_q) {
#pragma omp parallel for num_threads(p->threads) schedule(static)
  for (int64_t row = 0; row < p->examples * p->n; row++) {
    const int64_t *source = chosen_by(p, row);
    const float *keys = p->keys + row / p->n * p->m * p->d;
    for (int64_t j = 0; j < p->k; j++)
      add(p, grad[row * p->k + j], p->q + row * p->d, keys + source[j] * p->d, to_q + row * p->d);
  }
}

/* A part of an example's sources is one thread's, so that sums have one order. */
static void add_to_sources(const Pairs *p, const float *grad, float *to_keys) {
  int64_t parts = p->examples < p->threads ? p->threads : 1;
#pragma omp parallel for num_threads(p->threads) schedule(static)
  for (int64_t item = 0; item < p->examples * parts; item++) {
    int64_t example = item / parts, part = item % parts;
    int64_t first = p->m * part / parts, end = p->m * (part + 1) / parts;
    for (int64_t row = example * p->n; row < (example + 1) * p->n; row++) {
      const int64_t *source = chosen_by(p, row);
      for (int64_t j = 0; j < p->k; j++) {
        if (source[j] < first || source[j] >= end) continue;
        int64_t at = (example * p->m + source[j]) * p->d;
        add(p, grad[row * p->k + j], p->keys + at, p->q + row * p->d, to_keys + at);
      }
    }
  }
}

/* From gradients (examples, n, k) to targets and sources, which are zero, or NULL. */
void pairs_gradient(const Pairs *p, const float *grad, float *to_q, float *to_keys) {
  if (to_q) add_to_targets(p, grad, to_q);
  if (to_keys) add_to_sources(p, grad, to_keys);
}
