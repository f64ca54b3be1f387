"""A recipe of one's own: the frequency of a noisy sine wave."""
