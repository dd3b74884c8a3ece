import sys

from amid_ds.cli import main

if __name__ == "__main__":
    sys.exit(main())
