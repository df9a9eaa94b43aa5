"""Colours of all pictures."""

COLORS = ("#0072B2", "#D55E00", "#009E73", "#000000", "#E69F00", "#56B4E9", "#CC79A7", "#F0E442")
"""Okabe and Ito's colours, which the colour-blind can tell apart; last those that are near grey to
some of them, since photographs are drawn in grey.
"""
