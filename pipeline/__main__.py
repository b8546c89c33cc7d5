"""`python -m pipeline` is the `carve` command."""

from pipeline.cli import main

if __name__ == "__main__":
    main()
