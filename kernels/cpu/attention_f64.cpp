// Attention forward for float64: attention.cpp with double for real.
#define TRANSFUSE_ATTENTION_DOUBLE
#include "attention.cpp"
