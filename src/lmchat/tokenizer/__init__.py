"""Text to token ids and back (`bpe`), its files (`files`), and conversations as rows of ids (`render`)."""
