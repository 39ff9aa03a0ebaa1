"""`python -m tl_nodeprune`: the command, where it is not on the PATH."""

import sys

from tl_nodeprune.cli.main import main

sys.exit(main())
