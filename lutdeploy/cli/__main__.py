"""`python -m lutdeploy.cli`."""

from lutdeploy.cli import cli

if __name__ == "__main__":
    cli()
