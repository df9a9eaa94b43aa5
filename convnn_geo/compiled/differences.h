/* Of one pair of points: what differences.c gives to others. */

#include <stdint.h>

/* Squared Euclidean distance, summed in double precision. */
double squared_difference(const float *q, const float *key, int64_t d);
