"""Encoding and decoding (`bpe`), vocabulary files (`files`), and rendering of conversations (`render`)."""
