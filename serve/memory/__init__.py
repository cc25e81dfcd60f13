"""What a model takes of a card: weights, steps, decoding; and which compromise makes it fit. Plain arithmetic."""
