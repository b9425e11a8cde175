"""The command line `fedqueue`."""
