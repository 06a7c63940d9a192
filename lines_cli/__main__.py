"""`python -m lines_cli`, and the console script `lines`."""

from lines_cli.cli import signals, streams


def main() -> None:
    """Mind signals and closed descriptors first, then import all that the command line needs."""
    streams.occupy()
    signals.install()
    from lines_cli.cli.app import main as run

    run()


if __name__ == "__main__":
    main()
