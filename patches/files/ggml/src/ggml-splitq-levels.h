// SPDX-License-Identifier: MIT
// The codebooks of sq4, sq3 and sq2: the one place for these numbers, read by C and by Python alike.
//
// Printed by `python -m experiments.derive_levels`: weights divided by their block's scale are split by
// one-dimensional k-means (k = 3) into a lower, a middle and an upper range (SplitQuantV2, arXiv 2503.07657),
// each range gets equally spaced levels, and the iteration goes on with ranges in place of centres; one code
// counts through all three ranges.
//
// SPLITQ_LEVELS(name, steps_down, steps_up, lower, middle, upper)
//   steps_down, steps_up: how many of the scale's 8-bit steps the encoder tries below and above the
//   scale that maps the block's largest |weight| to level 127
#define SPLITQ_RANGE(...) __VA_ARGS__
SPLITQ_LEVELS(sq4, 2, 5, SPLITQ_RANGE(-127, -103, -79), SPLITQ_RANGE(-63, -51, -39, -27, -15, -2, 10, 22, 34, 46), SPLITQ_RANGE(62, 83, 105))
SPLITQ_LEVELS(sq3, 4, 4, SPLITQ_RANGE(-127, -77), SPLITQ_RANGE(-45, -19, 7, 33), SPLITQ_RANGE(63, 103))
SPLITQ_LEVELS(sq2, 8, 2, SPLITQ_RANGE(-127), SPLITQ_RANGE(-43, 18), SPLITQ_RANGE(90))
#undef SPLITQ_RANGE
