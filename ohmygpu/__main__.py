"""`python -m ohmygpu` is `omg`."""

import sys

from ohmygpu.cli import main

sys.exit(main())
