/* The k nearest on a grid by how far a place is plus how far a feature is, exactly.

   Offsets come in the order of how far they lead. A target looks at the sources at some of them at
   a time, until the place alone is farther than its k-th nearest: features only add to that. Sums
   are in double precision, and compared as they are in single: so no order of theirs decides. Of
   many channels a sum in single precision tells first who can't be among the nearest. */

#include <float.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#include "differences.h"
#include "insert.h"
#include "vectors.h"

enum { AXES = 3, SOME = 16 }; /* offsets that are looked at together */
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
  const int32_t *offset;   /* (AXES, count) */
  const double *far;       /* (count), how far each leads, in order */
  int64_t count;
  double border; /* how far what is no offset leads, at least */
  double weight; /* of features */
} Rings;

enum { FREE = 256, PART = 8, FEWER = 16 }; /* of look, and of how many may look at more */

/* One target: its place, and its feature and the sources' of its example. */
typedef struct {
  const Rings *r;
  int32_t place[AXES];
  int64_t own;
  const float *q, *keys;
  const uint8_t *zero_key;
  int zero;
} Target;

static Target target_of(const Rings *r, int64_t example, int64_t i) {
  Target t = {.r = r, .own = r->own ? r->own[i] : -1, .q = r->q + (example * r->n + i) * r->c};
  t.keys = r->keys + example * r->m * r->c, t.zero_key = r->zero_key + example * r->m;
  t.zero = r->zero_q[example * r->n + i];
  int64_t rest = r->at[i];
  for (int axis = AXES - 1; axis >= 0; axis--) {
    t.place[axis] = (int32_t)(rest % r->size[axis]);
    rest /= r->size[axis];
  }
  return t;
}

/* Some numbers of an array, what lies past its end 0. */
#define SOME_OF(to, array, start, count)                                                     \
  do {                                                                                       \
    int64_t left = (count) - (start);                                                        \
    if (left >= SOME) memcpy(to, (array) + (start), sizeof to);                              \
    else memset(to, 0, sizeof to), memcpy(to, (array) + (start), (size_t)left * sizeof *to); \
  } while (0)

/* The sources at the offsets from o on, and how far they lead. Returns how many there are; behind
   these the first stands again. */
static int sources_at(const Target *t, int64_t o, int32_t *source, double *far) {
  const Rings *r = t->r;
  int32_t there[SOME] = {0}, inside[SOME], moved[SOME];
  double leads[SOME];
  int count = 0;
  SOME_OF(leads, r->far, o, r->count);
  for (int j = 0; j < SOME; j++) inside[j] = o + j < r->count;
  for (int axis = 0; axis < AXES; axis++) {
    int32_t size = (int32_t)r->size[axis], place = t->place[axis];
    SOME_OF(moved, r->offset + axis * r->count, o, r->count);
    for (int j = 0; j < SOME; j++) {
      int32_t at = place + moved[j];
      inside[j] &= (at >= 0) & (at < size);
      there[j] = there[j] * size + at;
    }
  }
  for (int j = 0; j < SOME; j++) { /* whether it is on the grid decides what the next overwrites */
    source[count] = there[j], far[count] = leads[j];
    count += inside[j] & (there[j] != t->own);
  }
  for (int j = count; j < SOME; j++) source[j] = count ? source[0] : 0, far[j] = 0;
  return count;
}

/* Squared differences of few channels, one after another. */
static void squares_of(const Target *t, const int32_t *source, double *square) {
  int64_t c = t->r->c;
  for (int j = 0; j < SOME; j++) square[j] = 0;
  for (int64_t axis = 0; axis < c; axis++) {
    float key[SOME];
    for (int j = 0; j < SOME; j++) key[j] = t->keys[source[j] * c + axis];
    for (int j = 0; j < SOME; j++) {
      double difference = (double)t->q[axis] - key[j];
      square[j] += difference * difference;
    }
  }
}

/* Distances from squares, which are lost. */
static void distances(const Target *t, const int32_t *source, const double *far, double *square,
                      float *value) {
  const Rings *r = t->r;
  double weight = r->kind == ANGLES ? r->weight / 2 : r->weight;
  if (r->kind == ANGLES)
    for (int j = 0; j < SOME; j++) square[j] = t->zero | t->zero_key[source[j]] ? 2 : square[j];
  if (r->kind == ROOTS)
    for (int j = 0; j < SOME; j++) square[j] = sqrt(square[j]);
  for (int j = 0; j < SOME; j++) value[j] = (float)(far[j] + weight * square[j]);
}

/* Keep those who are near enough by sums in single precision; returns how many they are. */
static int narrow(const Target *t, int32_t *source, double *far, int count, float limit) {
  int64_t c = t->r->c;
  double square[SOME] = {0}, least = 1 - FLT_EPSILON * ((double)c + 12);
  float value[SOME];
  for (int j = 0; j < count; j++) {
    float rough = squared_distance(t->q, t->keys + source[j] * c, c);
    square[j] = rough <= FLT_MAX ? least * rough : 0; /* too large to tell */
  }
  distances(t, source, far, square, value);
  int kept = 0;
  for (int j = 0; j < count; j++) {
    source[kept] = source[j], far[kept] = far[j];
    kept += value[j] <= limit;
  }
  return kept;
}

/* Offer those sources who may be among the nearest. */
static void offer_some(const Target *t, int32_t *source, double *far, int count, Nearest *found) {
  int64_t c = t->r->c;
  double square[SOME] = {0};
  float value[SOME];
  if (c < LANES) {
    squares_of(t, source, square);
  } else {
    if (nearest_limit(found) < INFINITY) count = narrow(t, source, far, count, nearest_limit(found));
    for (int j = 0; j < count; j++)
      square[j] = squared_difference(t->q, t->keys + source[j] * c, c);
  }
  distances(t, source, far, square, value);
  for (int j = 0; j < count; j++) offer(found, value[j], source[j]);
}

/* Returns whether places told enough: whether no more than a part of all sources was looked at,
   and none that was not can be nearer. */
static int look(const Target *t, Nearest *found) {
  const Rings *r = t->r;
  int64_t seen = 0, budget = r->m / PART + FREE;
  int32_t source[SOME];
  double far[SOME];
  for (int64_t o = 0; o < r->count; o += SOME) {
    if ((float)r->far[o] > nearest_limit(found)) return seen <= budget;
    int count = sources_at(t, o, source, far);
    offer_some(t, source, far, count, found);
    seen += count;
  }
  if (isinf(r->border)) return seen <= budget;
  return (float)r->border > nearest_limit(found) ? seen <= budget : -1;
}

/* value and place (examples, n, k), in order of (value, place). Returns 0 where not served: where
   many targets looked at much, or one at all that there is to look at. */
int rings_nearest(const Rings *r, float *value, int64_t *place) {
  int64_t rows = r->examples * r->n, allowed = rows / FEWER, spent = 0;
#pragma omp parallel num_threads(r->threads)
  {
    Nearest found;
    int enough = nearest_new(&found, r->k);
#pragma omp for schedule(dynamic, 32)
    for (int64_t row = 0; row < rows; row++) {
      int64_t before;
#pragma omp atomic read
      before = spent;
      if (before > allowed) continue;
      int told = -1;
      if (enough) {
        Target t = target_of(r, row / r->n, row % r->n);
        nearest_clear(&found);
        told = look(&t, &found);
        nearest_tell(&found, value + row * r->k, place + row * r->k);
      }
      if (told == 1) continue;
#pragma omp atomic
      spent += told < 0 ? allowed + 1 : 1;
    }
    nearest_free(&found);
  }
  return spent <= allowed;
}
