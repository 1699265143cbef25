"""Attacks: one family, one file. An attack is a function `(key, logits_fn, x, target) -> x_adv`."""
