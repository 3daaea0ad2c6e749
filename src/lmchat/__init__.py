"""lmchat: train your own small chat model, from tokenizer to chat, on PyTorch Lightning."""

__version__ = "0.1.0"
