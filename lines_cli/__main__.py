"""`python -m lines_cli`, and the console script `lines`."""

from lines_cli.cli import main

if __name__ == "__main__":
    main()
