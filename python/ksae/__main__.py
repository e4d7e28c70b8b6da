# SPDX-License-Identifier: Apache-2.0
"""`python -m ksae`: the command line, as torchrun starts it."""

from .cli.app import main

if __name__ == "__main__":
    main()
