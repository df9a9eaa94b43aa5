/* The k nearest on a grid by how far a place is plus how far a feature is, exactly.

   Offsets come in the order of how far they lead. A target looks at the source at each of them,
   until the place alone is farther than its k-th nearest: features only add to that. Sums are in
   double precision, and compared as they are in single: so no order of theirs decides. */

#include <math.h>
#include <stdint.h>

#include "differences.h"
#include "insert.h"

enum { AXES = 3 };
enum Kind { ANGLES, SQUARES, ROOTS };

typedef struct {
  int32_t kind, k, threads;
  int64_t examples, n, m, c;
  int64_t size[AXES];      /* of the grid of sources, 1 for axes that there are not */
  const float *q, *keys;   /* (examples, n, c), (examples, m, c) */
  const uint8_t *zero_q;   /* (examples, n), of ANGLES: which vectors have no direction */
  const uint8_t *zero_key; /* (examples, m) */
  const int64_t *at;       /* (n), the place of each target on the grid */
  const int64_t *own;      /* (n), a source that each target is not to find, or NULL */
  const int32_t *offset;   /* (count, AXES) */
  const double *far;       /* (count), how far each leads, in order */
  int64_t count;
  double border; /* how far what is no offset leads, at least */
  double weight; /* of features */
} Rings;

enum { FREE = 256, PART = 8, FEWER = 16 }; /* of look, and of how many may look at more */

static double feature(const Rings *r, int64_t target, int64_t source) {
  const float *q = r->q + target * r->c, *key = r->keys + source * r->c;
  if (r->kind == ANGLES) {
    if (r->zero_q[target] || r->zero_key[source]) return 1;
    return squared_difference(q, key, r->c) / 2;
  }
  double square = squared_difference(q, key, r->c);
  return r->kind == ROOTS ? sqrt(square) : square;
}

/* Returns whether places told enough: whether no more than a part of all sources was looked at,
   and none that was not can be nearer. */
static int look(const Rings *r, int64_t example, int64_t i, Nearest *found) {
  int64_t seen = 0, budget = r->m / PART + FREE;
  int64_t place[AXES], rest = r->at[i], own = r->own ? r->own[i] : -1;
  for (int axis = AXES - 1; axis >= 0; axis--) {
    place[axis] = rest % r->size[axis];
    rest /= r->size[axis];
  }
  for (int64_t o = 0; o < r->count; o++) {
    if (found->count == found->k && (float)r->far[o] > found->value[found->k - 1])
      return seen <= budget;
    int64_t source = 0;
    int inside = 1;
    for (int axis = 0; axis < AXES; axis++) {
      int64_t there = place[axis] + r->offset[o * AXES + axis];
      inside &= there >= 0 && there < r->size[axis];
      source = source * r->size[axis] + there;
    }
    if (!inside || source == own) continue;
    seen++;
    double near = feature(r, example * r->n + i, example * r->m + source);
    offer(found, (float)(r->far[o] + r->weight * near), source);
  }
  int settled = isinf(r->border) ||
                (found->count == found->k && (float)r->border > found->value[found->k - 1]);
  return settled ? seen <= budget : -1;
}

/* value and place (examples, n, k), in order of (value, place). Returns 0 where not served: where
   many targets looked at much, or one at all that there is to look at. */
int rings_nearest(const Rings *r, float *value, int64_t *place) {
  int64_t rows = r->examples * r->n, allowed = rows / FEWER, spent = 0;
#pragma omp parallel for num_threads(r->threads) schedule(dynamic, 32)
  for (int64_t row = 0; row < rows; row++) {
    int64_t before;
#pragma omp atomic read
    before = spent;
    if (before > allowed) continue;
    Nearest found = {value + row * r->k, place + row * r->k, 0, r->k};
    int told = look(r, row / r->n, row % r->n, &found);
    if (told == 1) continue;
#pragma omp atomic
    spent += told < 0 ? allowed + 1 : 1;
  }
  return spent <= allowed;
}
