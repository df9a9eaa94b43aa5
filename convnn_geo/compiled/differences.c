/* Squared Euclidean distances of two points. Of few axes they are summed in single precision, in
   the order of axes and without fused operations, as everywhere else in this package. */

#include "differences.h"

double squared_difference(const float *q, const float *key, int64_t d) {
  double sum[DOUBLES] = {0}, total = 0;
  int64_t axis = 0;
  for (; axis + DOUBLES <= d; axis += DOUBLES)
    for (int lane = 0; lane < DOUBLES; lane++) {
      double difference = (double)q[axis + lane] - key[axis + lane];
      sum[lane] += difference * difference;
    }
  for (; axis < d; axis++) {
    double difference = (double)q[axis] - key[axis];
    total += difference * difference;
  }
  return d < DOUBLES ? total : total + across_doubles(sum);
}

float squared_difference_of_few(const float *q, const float *key, int64_t d) {
  float total = 0;
  for (int64_t axis = 0; axis < d; axis++) {
    float difference = q[axis] - key[axis];
    total += difference * difference;
  }
  return total;
}
