"""``python -m tulle``: the command line."""

from tulle.cli.main import main

if __name__ == "__main__":
    main()
