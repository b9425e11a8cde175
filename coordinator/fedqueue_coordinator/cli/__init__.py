"""The command line `fedqueue`: `main` has the app, the other modules its commands."""
