"""`python -m fedqueue_keeper` runs the command `fedqueue-keeper`."""

from fedqueue_keeper.cli import main

main()
