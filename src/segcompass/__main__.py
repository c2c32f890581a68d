"""``python -m segcompass``: the command line, as torchrun starts it."""

from segcompass.apps.cli import main

if __name__ == "__main__":
    main()
