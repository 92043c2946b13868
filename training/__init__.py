"""The PyTorch training stage: data, losses, recipes, the loop."""
