"""`python -m outlast.cli` is `outlast`."""

from outlast.cli import main

if __name__ == "__main__":
    main()
