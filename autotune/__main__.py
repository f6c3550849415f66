"""`python -m gssf_triton.autotune`."""

import sys

from gssf_triton.autotune.cli import main

sys.exit(main())
