"""`python -m fedqueue_coordinator` is `fedqueue`."""

from fedqueue_coordinator.cli.main import main

main()
