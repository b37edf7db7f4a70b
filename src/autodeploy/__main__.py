"""`python -m autodeploy`: the same as the `autodeploy` command."""

import sys

from autodeploy.cli import main

if __name__ == "__main__":
    sys.exit(main())
