// SPDX-License-Identifier: MIT
// The levels of sq4w, sq3w and sq2w: the one place for these numbers, read by C and by Python alike. Entry i is the level of
// the 6-bit index i, whose bits ggml-windows.h names. Printed by `python -m experiments.derive_windows`.
//
// Of sq3w entry i ^ 32 is -1 - entry i, so 32 entries and a sign tell all of them; that costs sq4w 0.08 and sq2w 0.03 dB.
//
// SPLITQ_WINDOWS(name, rms, levels): rms is that of the levels in use, which tells an encoder the scale to begin with
SPLITQ_WINDOWS(sq4w, 45.5f,
     -21,  107,   14,  -37,   66,    5,  -50,   50,   -5,  -65,   35,  -15, -105,   24,  -29,   88,
      13,  -37,   58,    0,  -57,   44,  -10,  -79,   31,  -19,  127,   19,  -29,   75,    6,  -46,
      54,   -2,  -67,   36,  -15,  -94,   24,  -26,   95,   14,  -38,   67,    5,  -50,   45,   -8,
      19,   35,  -20, -122,  -74,  -29,   78,    9,  -42,   57,   -1,  -58,   43,  -10,  -87,   27)
SPLITQ_WINDOWS(sq3w, 45.1f,
    -127,    5,   69,  -11,  -53,   20,   40,  -30,  -12,   65,    5,  -89,  -30,   38,   20,  -52,
      41,  -29,  -53,   21,   75,  -11,  -85,    4,   21,  -53,  -31,   38,    3, -103,  -13,   63,
     126,   -6,  -70,   10,   52,  -21,  -41,   29,   11,  -66,   -6,   88,   29,  -39,  -21,   51,
     -42,   28,   52,  -22,  -76,   10,   84,   -5,  -22,   52,   30,  -39,   -4,  102,   12,  -64)
SPLITQ_WINDOWS(sq2w, 42.2f,
    -127,  -26,   41,    6,   43,    6,  -90,  -25,   -8,  -48,   20,   61,   24,   71,  -10,  -43,
     -26,  -62,    7,   40,    6,   43,  -25,  -76,  -42,   -9,   60,   21,   89,   23,  -42,   -7,
      11,   48,  -19,  -61,  -24,  -71,    9,   44,  112,   23,  -38,   -6,  -42,   -7,   89,   23,
      44,    7,  -63,  -17,  -88,  -23,   44,    7,   25,   68,   -4,  -41,   -7,  -38,   22,   68)
