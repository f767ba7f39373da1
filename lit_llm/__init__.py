"""A large language model's whole life on PyTorch Lightning."""
