"""`python -m hasten`: the program where the package is importable, but its script is not on the path."""

from hasten.cli import main

main()
