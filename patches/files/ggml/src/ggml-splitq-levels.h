// The codebooks of sq4, sq3 and sq2: the one place for these numbers, read by C and by Python alike.
//
// Derived by `python -m experiments.derive_levels`: a block's weights divided by its scale are split by
// one-dimensional k-means (k = 3) into a lower, a middle and an upper range, and each range gets equally
// spaced levels (SplitQuantV2, arXiv 2503.07657); one code counts through all three ranges.
//
// SPLITQ_LEVELS(name, steps_down, steps_up, lower, middle, upper)
//   steps_down, steps_up: how many of the scale's 8-bit steps the encoder tries below and above the
//   scale that maps the block's largest |weight| to level 127
#define SPLITQ_RANGE(...) __VA_ARGS__
SPLITQ_LEVELS(sq4, 2, 5, SPLITQ_RANGE(-127, -104, -81), SPLITQ_RANGE(-64, -51, -38, -24, -11, 2, 15, 28, 41, 54), SPLITQ_RANGE(69, 88, 106))
SPLITQ_LEVELS(sq3, 4, 4, SPLITQ_RANGE(-127, -77), SPLITQ_RANGE(-45, -19, 7, 34), SPLITQ_RANGE(64, 104))
SPLITQ_LEVELS(sq2, 8, 2, SPLITQ_RANGE(-127), SPLITQ_RANGE(-43, 19), SPLITQ_RANGE(91))
#undef SPLITQ_RANGE
