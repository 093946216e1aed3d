"""CIFAR-sized images."""
