/* out_i = bias + sum_j W_j rho_ij x[index_ij]: neighbours are read where they lie, never copied.

   The taps are packed into panels of outputs, so that a tile of sums stays in registers while all
   neighbours and channels pass. */

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "tile.h"

typedef struct {
  int64_t n, k, c, d;
  const float *rows;    /* (m, c) */
  const int64_t *index; /* (k, n); strides are counted in numbers */
  const float *rho;     /* (k, n), or NULL */
  int64_t index_tap, index_target, rho_tap, rho_target;
  const float *panel;   /* (panels, k, c, PANEL) */
  const float *bias;    /* (panels, PANEL) */
} Taps;

/* Taps (k, d, c) as (panels, k, c, PANEL); bias behind them; what is missing is zero. */
static void pack(const float *taps, const float *bias, int64_t k, int64_t d, int64_t c,
                 float *panel) {
  for (int64_t start = 0; start < d; start += PANEL)
    for (int64_t j = 0; j < k; j++)
      for (int64_t channel = 0; channel < c; channel++, panel += PANEL)
        for (int64_t o = 0; o < PANEL; o++)
          panel[o] = start + o < d ? taps[(j * d + start + o) * c + channel] : 0;
  for (int64_t start = 0; start < d; start += PANEL, panel += PANEL)
    for (int64_t o = 0; o < PANEL; o++) panel[o] = bias && start + o < d ? bias[start + o] : 0;
}

/* One neighbour of each target, all channels: sums += rho x W. */
static inline void add(Vector *left, Vector *right, const float *const *row, const float *rho,
                       const float *panel, int64_t c) {
  for (int64_t channel = 0; channel < c; channel++, panel += PANEL) {
    Vector a = *(const Vector *)panel, b = *(const Vector *)(panel + LANES);
    for (int i = 0; i < TARGETS; i++) {
      float x = rho ? row[i][channel] * rho[i] : row[i][channel];
      left[i] += x * a, right[i] += x * b;
    }
  }
}

static void block(const Taps *t, int64_t start, float *out) {
  int count = t->n - start < TARGETS ? (int)(t->n - start) : TARGETS;
  for (int64_t from = 0; from < t->d; from += PANEL) {
    const float *panel = t->panel + from * t->k * t->c;
    int64_t width = t->d - from < PANEL ? t->d - from : PANEL;
    Vector left[TARGETS], right[TARGETS];
    for (int i = 0; i < TARGETS; i++) {
      left[i] = *(const Vector *)(t->bias + from);
      right[i] = *(const Vector *)(t->bias + from + LANES);
    }
    for (int64_t j = 0; j < t->k; j++, panel += t->c * PANEL) {
      const float *row[TARGETS];
      float rho[TARGETS];
      for (int i = 0; i < TARGETS; i++) { /* targets that are missing repeat the last */
        int64_t target = start + (i < count ? i : count - 1);
        row[i] = t->rows + t->index[j * t->index_tap + target * t->index_target] * t->c;
        rho[i] = t->rho ? t->rho[j * t->rho_tap + target * t->rho_target] : 1;
      }
      if (t->rho)
        add(left, right, row, rho, panel, t->c);
      else
        add(left, right, row, NULL, panel, t->c);
    }
    for (int i = 0; i < count; i++) {
      float sum[PANEL];
      memcpy(sum, left + i, sizeof *left), memcpy(sum + LANES, right + i, sizeof *right);
      memcpy(out + (start + i) * t->d + from, sum, (size_t)width * sizeof *sum);
    }
  }
}

/* Depthwise taps (k, c), bias (c) or NULL; out (n, c). */
void gather_depthwise(const Taps *t, const float *taps, const float *bias, int threads,
                      float *out) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t i = 0; i < t->n; i++) {
    float *restrict sum = out + i * t->c;
    for (int64_t channel = 0; channel < t->c; channel++) sum[channel] = bias ? bias[channel] : 0;
    for (int64_t j = 0; j < t->k; j++) {
      const float *row = t->rows + t->index[j * t->index_tap + i * t->index_target] * t->c;
      const float *tap = taps + j * t->c;
      float rho = t->rho ? t->rho[j * t->rho_tap + i * t->rho_target] : 1;
      for (int64_t channel = 0; channel < t->c; channel++)
        sum[channel] += row[channel] * rho * tap[channel];
    }
  }
}

/* Of t without panel and bias: taps (k, d, c), bias (d) or NULL; out (n, d).
   Returns 0 where memory does not suffice. */
int gather_taps(const Taps *given, const float *taps, const float *bias, int threads, float *out) {
  Taps t = *given;
  int64_t k = t.k, c = t.c, d = t.d, n = t.n;
  int64_t wide = (d + PANEL - 1) / PANEL * PANEL;
  float *panel = malloc((size_t)(wide * (k * c + 1)) * sizeof *panel);
  if (panel) {
    pack(taps, bias, k, d, c, panel);
    t.panel = panel, t.bias = panel + wide * k * c;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t item = 0; item < (n + TARGETS - 1) / TARGETS; item++)
      block(&t, item * TARGETS, out);
  }
  free(panel);
  return panel != NULL;
}
