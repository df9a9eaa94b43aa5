"""Colours of all pictures."""

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#F0E442", "#000000")
"""Okabe and Ito's colours, which the colour-blind can tell apart."""
