"""Losses over a vocabulary that is spread over the ranks: from hidden states on, logits are never held."""
