// SPDX-License-Identifier: MIT
// The levels of sq4w, sq3w and sq2w: the one place for these numbers, read by C and by Python alike. Entry i is the level of
// the 6-bit index i, whose bits ggml-windows.h names. Printed by `python -m experiments.derive_windows`.
//
// SPLITQ_WINDOWS(name, rms, levels): rms is that of the levels in use, which tells an encoder the scale to begin with
SPLITQ_WINDOWS(sq4w, 44.6f,
      24,  -30,   68,   -1,  -65,   32,  -23,   87,    7,  -52,   41,  -14,  126,   14,  -42,   49,
     -10,  -95,   20,  -36,   59,   -4,  -75,   27,  -27,   75,    3,  -57,   36,  -19,   96,   10,
     -49,   43,  -14, -127,   14,  -40,   52,   -7,  -86,   22,  -31,   65,    0,  -66,   30,  -24,
      79,    5,  -57,   36,  -20,  107,   11,  -46,   46,  -12, -106,   19,  -35,   57,   -5,  -77)
SPLITQ_WINDOWS(sq3w, 44.6f,
      23,  -32,   55,  -13,  -27,   64,   -2,  -81,   70,    4,  -74,   22,    7,  -57,   32,  -31,
     120,    5,  -56,   33,   16,  -49,   36,  -20,  -38,   45,  -17,   97,   51,  -11, -102,   14,
     -51,   39,  -19,   62,   43,  -12,   87,    4,  -10, -127,   14,  -52,  -95,   20,  -41,   41,
      -1,  -79,   17,  -39,  -68,   23,  -34,   61,   33,  -29,   67,   -2,  -18,   81,    1,  -63)
SPLITQ_WINDOWS(sq2w, 44.6f,
      24,  -30,   71,    0,  -57,   28,  -16,   82,    9,  -53,   44,  -17,  127,    6,  -35,   39,
      -8,  -85,   25,  -38,   56,  -11,  -61,   24,  -25,   56,    9,  -55,   36,  -26,   98,    6,
     -47,   42,   -9, -119,   16,  -42,   55,   -8,  -77,   15,  -28,   65,    2,  -71,   34,  -28,
      73,    4,  -45,   32,  -13,   96,   15,  -45,   52,  -19,  -89,   13,  -28,   46,    2,  -85)
