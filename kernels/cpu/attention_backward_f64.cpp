// Attention backward for float64: attention_backward.cpp with double for real.
#define TRANSFUSE_ATTENTION_DOUBLE
#include "attention_backward.cpp"
