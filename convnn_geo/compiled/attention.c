/* Attention over the k nearest keys, forward and backward; nothing of size n m, no copies of keys.

   out_i = sum_j keep_ij w_ij value_j,  w_i = softmax_j(-distance_ij / temperature). */

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "products.h"
#include "vectors.h"

typedef struct {
  Problem problem;
  int64_t width; /* channels of a value */
  const float *value;
  int64_t value_example, value_head, value_row;
  const float *keep; /* (examples, n, k), what dropout makes of a weight; or NULL */
  float temperature;
} Attention;

static const float *values_of(const Attention *a, int64_t example) {
  int64_t heads = a->problem.heads;
  return a->value + example / heads * a->value_example + example % heads * a->value_head;
}

/* exp(x) for -87 < x <= 0: 2^whole by the exponent's bits, the rest by a polynomial. */
static inline float exponential(float x) {
  float whole = rintf(x * 1.44269504f);
  float part = x - whole * 0.693359375f + whole * 2.12194440e-4f; /* ln 2 in two parts */
  float sum = 1.9875691e-4f;
  sum = sum * part + 1.3981999e-3f;
  sum = sum * part + 8.3334519e-3f;
  sum = sum * part + 4.1665796e-2f;
  sum = sum * part + 1.6666665e-1f;
  sum = sum * part + 5.0000001e-1f;
  sum = sum * part * part + part + 1;
  int32_t bits = ((int32_t)whole + 127) << 23;
  float power;
  memcpy(&power, &bits, sizeof power);
  return sum * power;
}

/* Distances become weights; those at infinity weigh nothing. */
static void softmax(const float *distance, int k, float temperature, float *weight) {
  float total = 0, least = INFINITY;
  for (int j = 0; j < k; j++) least = distance[j] < least ? distance[j] : least;
  if (least == INFINITY) {
    memset(weight, 0, (size_t)k * sizeof *weight);
    return;
  }
  for (int j = 0; j < k; j++) {
    float score = (least - distance[j]) / temperature;
    weight[j] = score > -87 ? exponential(score) : 0; /* what is less is no normal number */
  }
  for (int j = 0; j < k; j++) total += weight[j];
  for (int j = 0; j < k; j++) weight[j] /= total;
}

/* out = sum_j weight_j row_j of so many vectors, a constant wherever this is called. Rows without
   weight have no part, be they infinite or NaN. */
static inline void combine_vectors(int vectors, const float *rows, int64_t stride,
                                   const int64_t *place, const float *weight, int k, float *out) {
  Vector sum[4] = {0};
  for (int j = 0; j < k; j++) {
    if (weight[j] == 0) continue;
    const float *row = rows + place[j] * stride;
    for (int part = 0; part < vectors; part++)
      sum[part] += weight[j] * *(const Vector *)(row + part * LANES);
  }
  memcpy(out, sum, (size_t)vectors * sizeof *sum);
}

/* The same of any width. */
static void combine(const float *rows, int64_t stride, const int64_t *place, const float *weight,
                    int k, int64_t width, float *out) {
  int64_t start = 0, rest = width % LANES;
  for (; start + 4 * LANES <= width; start += 4 * LANES)
    combine_vectors(4, rows + start, stride, place, weight, k, out + start);
  if (start + 2 * LANES <= width) {
    combine_vectors(2, rows + start, stride, place, weight, k, out + start);
    start += 2 * LANES;
  }
  if (start + LANES <= width) {
    combine_vectors(1, rows + start, stride, place, weight, k, out + start);
    start += LANES;
  }
  if (!rest) return;
  float sum[LANES] = {0};
  for (int j = 0; j < k; j++) {
    if (weight[j] == 0) continue;
    const float *row = rows + place[j] * stride + start;
    for (int64_t c = 0; c < rest; c++) sum[c] += weight[j] * row[c];
  }
  memcpy(out + start, sum, (size_t)rest * sizeof *sum);
}

/* weight, place (examples, n, k); out with strides. Returns 0 where not served. */
int attention_forward(const Attention *a, int threads, float *weight, int64_t *place, float *out,
                      int64_t out_example, int64_t out_head, int64_t out_row) {
  const Problem *p = &a->problem;
  int64_t blocks = (p->n + TARGETS - 1) / TARGETS;
  int k = p->k, served = 1;
#pragma omp parallel num_threads(threads) reduction(&& : served)
  {
    Workspace *workspace = workspace_new(p);
    float *distance = malloc((size_t)(TARGETS * k) * sizeof *distance);
    float *kept = malloc((size_t)k * sizeof *kept);
    served = workspace && distance && kept;
#pragma omp for schedule(static)
    for (int64_t item = 0; item < p->examples * blocks; item++) {
      if (!served) continue;
      int64_t example = item / blocks, start = item % blocks * TARGETS;
      int64_t at = (example * p->n + start) * k;
      served = nearest_of_block(workspace, example, start, distance, place + at);
      float *to = out + example / p->heads * out_example + example % p->heads * out_head;
      for (int64_t i = start; served && i < start + TARGETS && i < p->n; i++, at += k) {
        softmax(distance + (i - start) * k, k, a->temperature, weight + at);
        const float *used = weight + at;
        if (a->keep) {
          for (int j = 0; j < k; j++) kept[j] = weight[at + j] * a->keep[at + j];
          used = kept;
        }
        combine(values_of(a, example), a->value_row, place + at, used, k, a->width,
                to + i * out_row);
      }
    }
    workspace_free(workspace);
    free(distance), free(kept);
  }
  return served;
}

static void add(float *to, const float *from, float factor, int64_t width) {
  for (int64_t c = 0; c < width; c++) to[c] += factor * from[c];
}

/* One target; pairs without weight have no part. A distance's gradient is own q + other key to the
   target, and the reverse to the key. */
static void back(const Attention *a, const float *q, const float *keys, const float *value,
                 const float *grad, const float *weight, const float *keep, const int64_t *place,
                 float *slope, float *grad_q, float *grad_keys, float *grad_value,
                 float *grad_bias, float *grad_pair) {
  const Problem *p = &a->problem;
  float own = p->kind == POINTS ? 2 : p->kind == ANGLES ? 1 : 0;
  float other = p->kind == PRODUCTS ? -p->scale : -own, mean = 0;
  int zero = p->kind == ANGLES && is_zero(q, p->d);
  for (int j = 0; j < p->k; j++) {
    float kept = keep ? keep[j] : 1;
    slope[j] = 0;
    if (weight[j] * kept == 0) continue;
    slope[j] = kept * dot(grad, value + place[j] * a->value_row, a->width);
    mean += weight[j] * slope[j];
    add(grad_value + place[j] * a->width, grad, weight[j] * kept, a->width);
  }
  for (int j = 0; j < p->k; j++) {
    if (grad_pair) grad_pair[j] = 0;
    if (weight[j] == 0) continue;
    const float *key = keys + place[j] * p->key_row;
    float *grad_key = grad_keys + place[j] * p->d;
    float s = weight[j] * (mean - slope[j]) / a->temperature; /* of the distance */
    grad_bias[place[j]] += s;
    if (grad_pair) grad_pair[j] = s;
    if (zero || (p->kind == ANGLES && is_zero(key, p->d))) continue;
    for (int64_t c = 0; c < p->d; c++) {
      grad_q[c] += s * (own * q[c] + other * key[c]);
      grad_key[c] += s * (own * key[c] + other * q[c]);
    }
  }
}

/* grad (examples, n, width), contiguous like the gradients, which are zeros before; examples do not
   share keys. grad_bias is (examples, m), grad_pair (examples, n, k), of distances, or NULL. The
   order of sums is fixed. */
int attention_backward(const Attention *a, int threads, const float *grad, const float *weight,
                       const int64_t *place, float *grad_q, float *grad_keys, float *grad_value,
                       float *grad_bias, float *grad_pair) {
  const Problem *p = &a->problem;
  int served = 1;
#pragma omp parallel num_threads(threads) reduction(&& : served)
  {
    float *slope = malloc((size_t)p->k * sizeof *slope);
    served = slope != NULL;
#pragma omp for schedule(static)
    for (int64_t example = 0; example < p->examples; example++) {
      if (!served) continue;
      int64_t outer = example / p->heads, head = example % p->heads;
      const float *q = p->q + outer * p->q_example + head * p->q_head;
      const float *keys = p->keys + outer * p->key_example + head * p->key_head;
      for (int64_t i = 0; i < p->n; i++) {
        int64_t row = example * p->n + i, at = row * p->k;
        back(a, q + i * p->q_row, keys, values_of(a, example), grad + row * a->width, weight + at,
             a->keep ? a->keep + at : NULL, place + at, slope, grad_q + row * p->d,
             grad_keys + example * p->m * p->d, grad_value + example * p->m * a->width,
             grad_bias + example * p->m, grad_pair ? grad_pair + at : NULL);
      }
    }
    free(slope);
  }
  return served;
}
