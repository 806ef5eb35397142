# SPDX-License-Identifier: MIT
"""`python -m gguf_splitq`."""

import sys

from .cli import main

sys.exit(main())
