"""`python -m fedqueue_worker` runs the command `fedqueue-worker`. `fedqueue run` and `fedqueue worker` start it so."""

from fedqueue_worker.cli import main

main()
