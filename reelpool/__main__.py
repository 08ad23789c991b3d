"""`python -m reelpool` is `reelpool`."""

from reelpool.cli import main

if __name__ == "__main__":
    main()
