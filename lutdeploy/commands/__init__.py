"""The commands, one file each; lutdeploy/cli.py gathers them."""
