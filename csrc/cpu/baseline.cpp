// What any processor runs and any compiler builds.
#define ILNAS_ISA baseline
#include "cpu/kernels.inl"
