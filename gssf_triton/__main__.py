"""`python -m gssf_triton`: the same as `gssf-triton`."""

import sys

from gssf_triton.command import main

sys.exit(main())
