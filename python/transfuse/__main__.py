"""`python -m transfuse` is the command `transfuse`."""

import sys

from transfuse.cli import main

sys.exit(main())
