"""`python -m m0kit` is the `m0kit` command."""

from m0kit.cli.commands import main

if __name__ == "__main__":
    main()
