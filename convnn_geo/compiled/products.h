/* The k nearest of a block of targets, by products: what products.c gives to others. */

#pragma once

#include <stdint.h>

#include "tile.h"

/* How far apart two vectors are. Scale and bias are those of PRODUCTS. */
enum Kind {
  POINTS,  /* |q - key|^2 */
  ANGLES,  /* |q - key|^2 / 2 of vectors of length one; 1 from and to a zero vector */
  PRODUCTS /* bias - scale <q, key> */
};

/* What is wanted of the nearest. */
enum Wanted {
  ORDER,  /* in order; values are good to rounding */
  VALUES, /* in order; values are those that were compared */
  SET     /* in any order; values are good to rounding */
};

/* Whose k nearest are wanted: examples of n targets and m sources of d axes.
   Axes are contiguous; a stride is counted in numbers, 0 where all share.
   Examples of unequal size are runs of the rows of one, n and m those of the largest. */
typedef struct {
  int32_t kind, k, wanted;
  int64_t examples, heads, n, m, d; /* examples counts each head */
  const float *q, *keys, *bias;     /* bias (m) of an example, or NULL */
  int64_t q_example, q_head, q_row, key_example, key_head, key_row, bias_example, bias_head;
  const uint8_t *mask; /* where choice is allowed, or NULL; columns are contiguous */
  int64_t mask_example, mask_head, mask_row;
  const float *less; /* what each pair's distance is less by, or NULL; likewise */
  int64_t less_example, less_head, less_row;
  const int64_t *own; /* (n), a source that each target is not to find, -1 for none; or NULL */
  double scale;
  const int64_t *target_start; /* (examples + 1), where each example's targets start; or NULL */
  const int64_t *source_start, *source_stop; /* (examples), its sources; or NULL */
} Problem;

typedef struct Workspace Workspace;

/* How many targets an example has. */
static inline int64_t targets_of(const Problem *p, int64_t example) {
  return p->target_start ? p->target_start[example + 1] - p->target_start[example] : p->n;
}

/* NULL where memory does not suffice. */
Workspace *workspace_new(const Problem *problem);
void workspace_free(Workspace *workspace);

/* The k nearest of the targets start to start + TARGETS of an example, as far as there are any:
   values and places (TARGETS, k), in order of (value, place) unless a set will do; places count the
   example's sources. What is hidden comes last, as infinity, and after it what is not there, as
   infinity at -1. Returns 0 where numbers are not finite, or too large to tell. */
int nearest_of_block(Workspace *workspace, int64_t example, int64_t start, float *values,
                     int64_t *places);
