// SPDX-License-Identifier: MIT
// The levels of sq4w, sq3w and sq2w: the one place for these numbers, read by C and by Python alike. Entry i is the level of
// the 6-bit index i, whose bits ggml-windows.h names. Printed by `python -m experiments.derive_windows`.
//
// SPLITQ_WINDOWS(name, rms, levels): rms is that of the levels in use, which tells an encoder the scale to begin with
SPLITQ_WINDOWS(sq4w, 45.5f,
     -21,  107,   14,  -37,   66,    5,  -50,   50,   -5,  -65,   35,  -15, -105,   24,  -29,   88,
      13,  -37,   58,    0,  -57,   44,  -10,  -79,   31,  -19,  127,   19,  -29,   75,    6,  -46,
      54,   -2,  -67,   36,  -15,  -94,   24,  -26,   95,   14,  -38,   67,    5,  -50,   45,   -8,
      19,   35,  -20, -122,  -74,  -29,   78,    9,  -42,   57,   -1,  -58,   43,  -10,  -87,   27)
SPLITQ_WINDOWS(sq3w, 42.0f,
     -95,   61,  -27,   20,  -48,   36,  -11,    4,   -9,    6,  -48,   38,  -26,   19,  -77,   69,
     -50,   38,  -11,    4,  -83,   66,  -27,   18,  -28,   20, -103,   61,   -9,    6,  -48,   39,
      28,  -19,   83,  -65,   11,   -5,   49,  -38,   46,  -37,    9,   -5,  127,  -61,   26,  -20,
      11,   -4,   50,  -37,   28,  -19,   99,  -65,   82,  -64,   25,  -20,   49,  -37,    8,   -5)
SPLITQ_WINDOWS(sq2w, 42.2f,
    -127,  -26,   41,    6,   43,    6,  -90,  -25,   -8,  -48,   20,   61,   24,   71,  -10,  -43,
     -26,  -62,    7,   40,    6,   43,  -25,  -76,  -42,   -9,   60,   21,   89,   23,  -42,   -7,
      11,   48,  -19,  -61,  -24,  -71,    9,   44,  112,   23,  -38,   -6,  -42,   -7,   89,   23,
      44,    7,  -63,  -17,  -88,  -23,   44,    7,   25,   68,   -4,  -41,   -7,  -38,   22,   68)
